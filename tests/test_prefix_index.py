"""The prefix index through its facade, on both twins.

Besides our own cases these cover, in our words, what the index tests of smg check by name (event tree, token
tree, string tree) wherever it applies to a block index: see the section titles.
"""

import sys
import threading

import numpy as np
import pytest
from backends import BACKENDS, new_backend

from mulsched._prefix_index_py import PrefixIndexPy
from mulsched.errors import (
    DuplicateInstance,
    InvalidArgument,
    InvalidType,
    UnknownBlock,
    UnknownInstance,
)
from mulsched.prefix_index import PrefixIndex


def path(*keys):
    return np.array(keys, dtype=np.uint64)


def named(index, *instances):
    for instance in instances:
        index.add_instance(instance, engine_hashes=True)
    return index


def state(index):
    return index.dump(), len(index), {name: index.blocks(name) for name in index.instances}


# -- empty, single, exact, partial ----------------------------------------------------------------------


def test_a_new_index_is_empty(index):
    assert len(index) == 0
    assert index.n_nodes == 0
    assert index.match(path(1, 2)).shape == (0,)
    assert index.instances == ()


def test_an_instance_without_content_matches_nothing(index):
    index.add_instance("a")
    assert index.match_by_instance(path(1, 2)) == {"a": 0}


def test_a_stored_path_matches_itself_its_prefixes_and_its_extensions(index):
    index.add_instance("a")
    assert index.store("a", path(1, 2, 3)) == 3
    for keys, expected in ((path(1, 2, 3), 3), (path(1, 2), 2), (path(1, 2, 3, 4), 3), (path(1), 1)):
        assert index.match_by_instance(keys) == {"a": expected}


def test_a_path_that_parts_in_the_middle_matches_up_to_there(index):
    index.add_instance("a")
    index.store("a", path(1, 2, 3, 4))
    assert index.match_by_instance(path(1, 2, 9, 4)) == {"a": 2}
    assert index.match_by_instance(path(9, 2, 3, 4)) == {"a": 0}


def test_an_empty_path_stores_and_matches_nothing(index):
    index.add_instance("a")
    assert index.store("a", path()) == 0
    assert index.match_by_instance(path()) == {"a": 0}
    assert len(index) == 0


def test_a_single_block_is_a_path(index):
    index.add_instance("a")
    index.store("a", path(7))
    assert index.match_by_instance(path(7, 8)) == {"a": 1}


def test_the_same_block_after_different_prefixes_is_different(index):
    index.add_instance("a")
    index.store("a", path(1, 5))
    index.store("a", path(2, 6))
    assert index.match_by_instance(path(1, 6)) == {"a": 1}
    assert index.match_by_instance(path(5)) == {"a": 0}
    assert len(index) == 4


def test_keys_at_the_edges_of_64_bits_are_keys(index):
    index.add_instance("a")
    index.store("a", path(0, 2**64 - 1, 0))
    assert index.match_by_instance(path(0, 2**64 - 1, 0)) == {"a": 3}


# -- several instances ----------------------------------------------------------------------------------


def test_instances_match_to_their_own_depths(index):
    index.add_instance("a")
    index.add_instance("b")
    index.store("a", path(1, 2, 3, 4))
    index.store("b", path(1, 2))
    assert index.match_by_instance(path(1, 2, 3, 4)) == {"a": 4, "b": 2}
    assert len(index) == 4


def test_disjoint_instances_do_not_mix(index):
    index.add_instance("a")
    index.add_instance("b")
    index.store("a", path(1, 2))
    index.store("b", path(3, 4))
    assert index.match_by_instance(path(3, 4)) == {"a": 0, "b": 2}


def test_shared_prefixes_are_stored_once(index):
    for name in "abc":
        index.add_instance(name)
        index.store(name, path(1, 2, 3))
    assert len(index) == 3
    assert index.n_nodes == 1
    assert [index.blocks(name) for name in "abc"] == [3, 3, 3]


def test_storing_again_adds_nothing(index):
    index.add_instance("a")
    index.store("a", path(1, 2, 3))
    assert index.store("a", path(1, 2, 3)) == 0
    assert index.store("a", path(1, 2)) == 0
    assert index.blocks("a") == 3


@pytest.mark.parametrize("count", [1, 64, 65, 1000, 4096])
def test_any_number_of_instances_is_told_apart(index, count):
    for i in range(count):
        index.add_instance(f"i{i}")
        index.store(f"i{i}", path(1, 2, 3)[: i % 3 + 1])
    assert index.match(path(1, 2, 3)).tolist() == [i % 3 + 1 for i in range(count)]
    for i in range(0, count, 2):
        index.remove_instance(f"i{i}")
    matched = index.match(path(1, 2, 3))
    assert [matched[index.row(f"i{i}")] for i in range(1, count, 2)] == [
        i % 3 + 1 for i in range(1, count, 2)
    ]
    index.check()


def test_a_path_that_goes_on_adds_only_what_is_new(index):
    index.add_instance("a")
    index.store("a", path(1, 2))
    assert index.store("a", path(1, 2, 3, 4)) == 2
    assert index.blocks("a") == 4
    assert index.n_nodes == 1


def test_a_match_lets_each_instance_go_where_its_path_ends(index):
    keys = np.arange(64, dtype=np.uint64)
    for i in range(64):
        index.add_instance(f"i{i}")
        index.store(f"i{i}", keys[: 64 - i])
    assert index.match(keys).tolist() == list(range(64, 0, -1))
    assert len(index) == 64
    assert index.n_nodes == 64


def test_several_paths_of_one_instance_do_not_mix(index):
    index.add_instance("a")
    paths = [np.arange(100 * i, 100 * i + 50, dtype=np.uint64) for i in range(20)]
    for keys in paths:
        index.store("a", keys)
    assert [index.match_by_instance(keys)["a"] for keys in paths] == [50] * 20
    assert index.match_by_instance(np.concatenate([paths[0], paths[1]])) == {"a": 50}


def test_counts_follow_every_operation(index):
    named(index, "a", "b")
    seen = []
    for act in (
        lambda: index.store("a", path(1, 2, 3), engine_hashes=[1, 2, 3]),
        lambda: index.store("b", path(1, 2, 9), engine_hashes=[1, 2, 9]),
        lambda: index.store("a", path(1, 2, 3), engine_hashes=[1, 2, 3]),
        lambda: index.remove("a", [2]),
        lambda: index.remove("b", [2]),
        lambda: index.clear("a"),
        lambda: index.remove_instance("b"),
    ):
        act()
        seen.append((len(index), [index.blocks(i) for i in index.instances]))
    assert seen == [
        (3, [3, 0]),
        (4, [3, 3]),
        (4, [3, 3]),
        (4, [3, 3]),  # of block 2 a had two copies
        (4, [3, 2]),
        (2, [0, 2]),
        (0, [0]),
    ]


# -- shape of the tree: split, merge, no growth -----------------------------------------------------------


def test_parting_paths_split_an_edge_and_a_removal_merges_it_back(index):
    index.add_instance("a")
    index.store("a", path(1, 2, 3, 4))
    assert index.n_nodes == 1
    index.store("a", path(1, 2, 9))
    assert index.n_nodes == 3
    index.discard("a", path(1, 2, 9), start=2)
    assert index.n_nodes == 1


def test_splits_at_the_first_and_at_the_last_block(index):
    index.add_instance("a")
    index.store("a", path(1, 2, 3))
    index.store("a", path(9, 2, 3))
    index.store("a", path(1, 2, 8))
    index.store("a", path(1, 7))
    assert [
        index.match_by_instance(p)["a"] for p in (path(1, 2, 3), path(1, 2, 8), path(1, 7), path(9, 2))
    ] == [
        3,
        3,
        2,
        2,
    ]
    index.check()


def test_a_tree_that_shrinks_to_nothing_gives_its_memory_back(index):
    empty = index.memory()["total"]
    named(index, "a")
    rng = np.random.default_rng(1)
    hashes = np.arange(20_000, dtype=np.uint64)
    for start in range(0, 20_000, 50):
        keys = rng.integers(0, 2**63, 50, dtype=np.uint64)
        index.store("a", keys, engine_hashes=hashes[start : start + 50])
    full = index.memory()["total"]
    for start in range(0, 20_000, 50):
        index.remove("a", hashes[start : start + 50])
    assert index.n_nodes == 0
    assert full > 20_000 * 8
    index.remove_instance("a")
    assert index.memory()["total"] <= empty + 64 * 1024


def test_rapid_stores_and_removals_do_not_grow_the_tree(index):
    named(index, "a")
    for turn in range(300):
        index.store("a", path(1, 2, turn + 10), engine_hashes=[1, 2, turn + 10])
        if turn:
            index.remove("a", [turn + 9])
    assert index.n_nodes == 1
    assert index.blocks("a") == 3


# -- engine hashes ----------------------------------------------------------------------------------------


def test_blocks_follow_the_parent_that_an_engine_hash_names(index):
    named(index, "a")
    index.store("a", path(1, 2), engine_hashes=[11, 12])
    index.store("a", path(3), parent=12, engine_hashes=[13])
    index.store("a", path(4), parent=11, engine_hashes=[14])
    assert index.match_by_instance(path(1, 2, 3)) == {"a": 3}
    assert index.match_by_instance(path(1, 4)) == {"a": 2}


def test_a_deep_chain_of_continuations_is_one_node(index):
    named(index, "a")
    index.store("a", path(0), engine_hashes=[0])
    for i in range(1, 500):
        index.store("a", path(i), parent=i - 1, engine_hashes=[i])
    assert index.match_by_instance(np.arange(500, dtype=np.uint64)) == {"a": 500}
    assert index.n_nodes == 1


def test_hashes_may_be_bytes_or_negative(index):
    named(index, "a")
    index.store("a", path(1), engine_hashes=[b"\x00" * 32])
    index.store("a", path(2), parent=b"\x00" * 32, engine_hashes=[-5])
    index.store("a", path(3), parent=2**64 - 5, engine_hashes=[7])
    assert index.blocks("a") == 3
    assert index.remove("a", [b"\x00" * 32, -5]) == 2


def test_blocks_may_follow_a_path_that_the_instance_does_not_hold(index):
    named(index, "a")
    assert index.store("a", path(3, 4), after=path(1, 2), engine_hashes=[13, 14]) == 2
    assert index.blocks("a") == 2
    assert index.match_by_instance(path(1, 2, 3, 4)) == {"a": 0}
    index.store("a", path(1, 2), engine_hashes=[11, 12])
    assert index.match_by_instance(path(1, 2, 3, 4)) == {"a": 4}


def test_a_path_leads_to_the_block_that_a_name_names(index):
    named(index, "a")
    index.add_instance("lru", capacity_blocks=3)
    index.store("a", path(1, 2, 3), engine_hashes=[11, 12, 13])
    index.store("lru", path(1, 2, 3))
    assert index.path("a", 12).tolist() == [1, 2]
    assert (index.path("a", 99), index.path("lru", 12)) == (None, None)


def test_an_unknown_parent_raises_and_stores_nothing(index):
    named(index, "a", "b")
    index.store("b", path(1), engine_hashes=[1])
    before = state(index)
    with pytest.raises(UnknownBlock, match="'a' holds no block with engine hash 1"):
        index.store("a", path(2), parent=1, engine_hashes=[2])
    assert state(index) == before


def test_removing_a_block_in_the_middle_hides_what_follows_for_that_instance_only(index):
    named(index, "a", "b")
    for name in "ab":
        index.store(name, path(1, 2, 3, 4), engine_hashes=[1, 2, 3, 4])
    assert index.remove("a", [2]) == 1
    assert index.match_by_instance(path(1, 2, 3, 4)) == {"a": 1, "b": 4}
    assert index.blocks("a") == 3


def test_removal_does_not_cascade_and_a_block_stored_again_closes_the_gap(index):
    named(index, "a")
    index.store("a", path(1, 2, 3), engine_hashes=[1, 2, 3])
    index.remove("a", [1])
    assert index.match_by_instance(path(1, 2, 3)) == {"a": 0}
    index.store("a", path(1), engine_hashes=[1])
    assert index.match_by_instance(path(1, 2, 3)) == {"a": 3}
    assert index.n_nodes == 1


def test_removing_what_is_not_there_is_counted_and_changes_nothing(index):
    named(index, "a")
    index.store("a", path(1), engine_hashes=[1])
    before = state(index)
    assert index.remove("a", [5, 6]) == 0
    assert index.removed_unknown == 2
    assert state(index) == before


def test_a_block_with_two_names_is_held_until_both_are_gone(index):
    named(index, "a")
    index.store("a", path(1), engine_hashes=[10])
    assert index.store("a", path(1), engine_hashes=[20]) == 0
    index.remove("a", [10])
    assert index.match_by_instance(path(1)) == {"a": 1}
    index.remove("a", [20])
    assert index.match_by_instance(path(1)) == {"a": 0}


def test_a_name_that_is_used_again_moves(index):
    named(index, "a")
    index.store("a", path(1), engine_hashes=[10])
    index.store("a", path(2), engine_hashes=[10])
    assert index.match_by_instance(path(1)) == {"a": 0}
    assert index.match_by_instance(path(2)) == {"a": 1}


# An engine that caches a block twice says so twice, and again when each copy leaves.


def test_a_block_stored_twice_under_one_name_is_held_until_both_copies_are_gone(index):
    named(index, "a")
    index.store("a", path(1, 2), engine_hashes=[10, 20])
    assert index.store("a", path(2), parent=10, engine_hashes=[20]) == 0
    assert index.remove("a", [20]) == 1
    assert index.match_by_instance(path(1, 2)) == {"a": 2}
    assert index.remove("a", [20]) == 1
    assert index.match_by_instance(path(1, 2)) == {"a": 1}
    assert index.remove("a", [20]) == 0
    assert index.removed_unknown == 1


def test_blocks_may_follow_a_block_that_lost_one_of_its_copies(index):
    named(index, "a")
    index.store("a", path(1), engine_hashes=[10])
    index.store("a", path(1), engine_hashes=[10])
    index.remove("a", [10])
    assert index.store("a", path(2), parent=10, engine_hashes=[20]) == 1
    assert index.match_by_instance(path(1, 2)) == {"a": 2}


def test_a_store_counts_copies_of_some_of_its_blocks_and_brings_others(index):
    named(index, "a")
    index.store("a", path(1, 2), engine_hashes=[10, 20])
    assert index.store("a", path(1, 2, 3), engine_hashes=[10, 20, 30]) == 1
    index.remove("a", [30, 20, 10])
    assert index.match_by_instance(path(1, 2, 3)) == {"a": 2}
    index.check()


def test_one_removal_may_take_several_copies(index):
    named(index, "a")
    for _ in range(3):
        index.store("a", path(1), engine_hashes=[10])
    assert index.remove("a", [10, 10]) == 2
    assert index.blocks("a") == 1
    assert index.remove("a", [10, 10]) == 1
    assert index.blocks("a") == 0


def test_a_name_that_moves_forgets_its_copies(index):
    named(index, "a")
    index.store("a", path(1), engine_hashes=[10])
    index.store("a", path(1), engine_hashes=[10])
    index.store("a", path(2), engine_hashes=[10])
    assert index.match_by_instance(path(1)) == {"a": 0}
    assert index.remove("a", [10]) == 1
    assert index.match_by_instance(path(2)) == {"a": 0}


def test_each_name_of_a_block_counts_its_own_copies(index):
    named(index, "a")
    for name in (10, 20, 10):
        index.store("a", path(1), engine_hashes=[name])
    index.remove("a", [10, 20])
    assert index.blocks("a") == 1
    index.remove("a", [10])
    assert index.blocks("a") == 0


@pytest.mark.parametrize(
    "empty",
    [
        lambda index: index.clear("a"),
        lambda index: index.reset("a", engine_hashes=True),
        lambda index: (index.remove_instance("a"), named(index, "a")),
    ],
    ids=["clear", "reset", "removed and added"],
)
def test_an_emptied_instance_has_forgotten_its_copies(index, empty):
    named(index, "a")
    for _ in range(2):
        index.store("a", path(1), engine_hashes=[10])
    empty(index)
    index.store("a", path(1), engine_hashes=[10])
    index.remove("a", [10])
    assert index.blocks("a") == 0


def test_copies_count_as_memory_of_names(index):
    named(index, "a")
    keys = np.arange(1000, dtype=np.uint64)
    index.store("a", keys, engine_hashes=keys)
    before = index.memory()["names"]
    index.store("a", keys, engine_hashes=keys)
    assert index.memory()["names"] > before + 1000 * 8
    index.clear("a")
    assert index.memory()["names"] < before


@pytest.mark.parametrize("copies", [{99: 1}, {10: 0}], ids=["of no name", "none"])
def test_check_finds_a_wrong_count_of_copies(copies):
    tree = PrefixIndexPy()
    tree.add_row(0, -1, True)
    tree.store_named(0, None, path(10), path(1))
    tree._tree.rows[0].extra_copies = copies
    with pytest.raises(AssertionError, match="invariant 8"):
        tree.check()


def test_a_chain_of_continuations_is_each_instances_own(index):
    named(index, "a", "b")
    for name, length in (("a", 30), ("b", 20)):
        for i in range(length):
            index.store(name, path(i), parent=i - 1 if i else None, engine_hashes=[i])
    index.remove("a", [10])
    assert index.match_by_instance(np.arange(30, dtype=np.uint64)) == {"a": 10, "b": 20}


def test_names_are_bound_one_after_the_other(index):
    named(index, "a")
    index.store("a", path(1, 2), engine_hashes=[10, 20])
    # 10 moves from the first block to the third: the path goes on below a block that is no longer held
    assert index.store("a", path(3, 4), parent=20, engine_hashes=[10, 30]) == 2
    assert index.blocks("a") == 3
    assert index.match_by_instance(path(1, 2, 3, 4)) == {"a": 0}
    index.store("a", path(1), engine_hashes=[40])
    assert index.match_by_instance(path(1, 2, 3, 4)) == {"a": 4}


def test_a_name_given_twice_in_one_call_stays_with_the_last_block(index):
    named(index, "a")
    assert index.store("a", path(1, 2), engine_hashes=[10, 10]) == 2
    assert index.blocks("a") == 1
    index.store("a", path(3), parent=10, engine_hashes=[11])
    index.store("a", path(1), engine_hashes=[12])
    assert index.match_by_instance(path(1, 2, 3)) == {"a": 3}


def test_a_name_may_be_its_own_parent(index):
    named(index, "a")
    index.store("a", path(1), engine_hashes=[10])
    assert index.store("a", path(2), parent=10, engine_hashes=[10]) == 1
    assert index.blocks("a") == 1
    index.store("a", path(1), engine_hashes=[11])
    assert index.match_by_instance(path(1, 2)) == {"a": 2}


def test_names_are_each_instances_own(index):
    named(index, "a", "b")
    index.store("a", path(1), engine_hashes=[10])
    index.store("b", path(2), engine_hashes=[10])
    index.remove("a", [10])
    assert index.match_by_instance(path(2)) == {"a": 0, "b": 1}


def test_long_paths_may_be_stored_in_turns(index):
    named(index, "a", "b")
    keys = np.arange(600, dtype=np.uint64)
    for start in range(0, 600, 50):
        for name, key in (("a", keys), ("b", keys + np.uint64(1000))):
            part = key[start : start + 50]
            parent = int(key[start - 1]) if start else None
            index.store(name, part, parent=parent, engine_hashes=part)
    assert index.match_by_instance(keys) == {"a": 600, "b": 0}
    assert index.match_by_instance(keys + np.uint64(1000)) == {"a": 0, "b": 600}
    assert index.n_nodes == 2


def test_a_long_path_loses_and_regains_its_tail(index):
    named(index, "a")
    keys = np.arange(2000, dtype=np.uint64) + np.uint64(9)
    index.store("a", keys, engine_hashes=keys)
    index.remove("a", keys[1200:])
    assert index.match_by_instance(keys) == {"a": 1200}
    index.store("a", keys[1200:], parent=int(keys[1199]), engine_hashes=keys[1200:])
    assert index.match_by_instance(keys) == {"a": 2000}
    assert index.n_nodes == 1


# -- predicted caches: LRU ----------------------------------------------------------------------------------


def test_the_tail_leaves_before_its_prefix(index):
    index.add_instance("a", capacity_blocks=4)
    index.store("a", path(1, 2, 3))
    index.store("a", path(7, 8))
    assert index.match_by_instance(path(1, 2, 3)) == {"a": 2}
    assert index.match_by_instance(path(7, 8)) == {"a": 2}
    assert index.blocks("a") == 4


def test_the_least_recently_stored_path_leaves_first(index):
    index.add_instance("a", capacity_blocks=4)
    index.store("a", path(1, 2))
    index.store("a", path(3, 4))
    index.store("a", path(1, 2))
    index.store("a", path(5, 6))
    assert [index.match_by_instance(p)["a"] for p in (path(1, 2), path(3, 4), path(5, 6))] == [2, 0, 2]


def test_a_path_longer_than_the_cache_keeps_its_head(index):
    index.add_instance("a", capacity_blocks=3)
    assert index.store("a", path(1, 2, 3, 4, 5)) == 5
    assert index.match_by_instance(path(1, 2, 3, 4, 5)) == {"a": 3}


def test_a_shared_prefix_outlives_its_branches(index):
    index.add_instance("a", capacity_blocks=4)
    for last in (10, 11, 12, 13):
        index.store("a", path(1, 2, last))
    assert index.match_by_instance(path(1, 2, 13)) == {"a": 3}
    assert index.match_by_instance(path(1, 2, 10)) == {"a": 2}


def test_a_match_does_not_refresh(index):
    index.add_instance("a", capacity_blocks=2)
    index.store("a", path(1))
    index.store("a", path(2))
    index.match(path(1))
    index.store("a", path(3))
    assert index.match_by_instance(path(1)) == {"a": 0}


def test_eviction_on_one_instance_leaves_the_others_alone(index):
    index.add_instance("a", capacity_blocks=2)
    index.add_instance("b", capacity_blocks=9)
    for name in "ab":
        index.store(name, path(1, 2))
        index.store(name, path(3, 4))
    assert index.match_by_instance(path(1, 2)) == {"a": 0, "b": 2}


def test_a_cache_of_one_block_holds_the_head_of_the_newest_path(index):
    index.add_instance("a", capacity_blocks=1)
    for first in (1, 2, 3):
        index.store("a", path(first, 9))
    assert [index.match_by_instance(path(first, 9))["a"] for first in (1, 2, 3)] == [0, 0, 1]


def test_a_branch_point_is_joined_again_when_a_branch_is_evicted(index):
    index.add_instance("a", capacity_blocks=4)
    index.store("a", path(1, 2, 3))
    index.store("a", path(1, 2, 4))
    assert index.n_nodes == 3
    index.store("a", path(1, 2, 4, 5))
    assert index.n_nodes == 1
    assert index.match_by_instance(path(1, 2, 3)) == {"a": 2}


def test_resizing_an_empty_cache_keeps_it_empty(index):
    index.add_instance("a", capacity_blocks=5)
    index.resize("a", 2)
    assert index.blocks("a") == 0
    index.store("a", path(1, 2, 3))
    assert index.blocks("a") == 2


def test_resizing_evicts_down(index):
    index.add_instance("a", capacity_blocks=5)
    index.store("a", path(1, 2, 3, 4, 5))
    index.resize("a", 2)
    assert index.blocks("a") == 2
    assert index.match_by_instance(path(1, 2, 3)) == {"a": 2}


def test_discard_takes_only_the_rest_of_the_path(index):
    index.add_instance("a")
    index.store("a", path(1, 2, 3, 4))
    index.store("a", path(1, 2, 9))
    assert index.discard("a", path(1, 2, 3, 4), start=2) == 2
    assert index.match_by_instance(path(1, 2, 3)) == {"a": 2}
    assert index.match_by_instance(path(1, 2, 9)) == {"a": 3}


def test_discard_reaches_past_a_hole(index):
    index.add_instance("a")
    index.store("a", path(1, 2, 3, 4))
    index.discard("a", path(1, 2), start=1)
    assert index.discard("a", path(1, 2, 3, 4), start=1) == 2
    assert index.match_by_instance(path(1, 2, 3, 4)) == {"a": 1}


def test_discard_leaves_what_is_deeper_than_its_keys(index):
    index.add_instance("a")
    index.store("a", path(1, 2, 3))
    assert index.discard("a", path(1, 2)) == 2
    assert index.blocks("a") == 1
    index.store("a", path(1, 2))
    assert index.match_by_instance(path(1, 2, 3)) == {"a": 3}


@pytest.mark.parametrize("start", [0, 2, 5, 10**30])
def test_discarding_what_is_not_there_changes_nothing(index, start):
    index.add_instance("a")
    index.add_instance("b")
    index.store("b", path(1, 2, 3))
    before = state(index)
    assert index.discard("a", path(1, 2, 3), start=start) == 0
    assert index.discard("b", path(9, 2, 3), start=start) == 0
    assert state(index) == before


# -- life of instances --------------------------------------------------------------------------------------


def test_clear_empties_one_instance_and_it_can_be_filled_again(index):
    named(index, "a", "b")
    for name in "ab":
        index.store(name, path(1, 2), engine_hashes=[1, 2])
    index.clear("a")
    assert index.match_by_instance(path(1, 2)) == {"a": 0, "b": 2}
    index.store("a", path(1, 2), engine_hashes=[1, 2])
    assert index.match_by_instance(path(1, 2)) == {"a": 2, "b": 2}


def test_a_removed_instance_is_forgotten_and_its_row_used_again(index):
    for name in "abc":
        index.add_instance(name)
        index.store(name, path(1, 2))
    index.remove_instance("b")
    index.remove_instance("a")
    assert index.instances == ("c",)
    assert index.add_instance("d") == 0
    assert index.match_by_instance(path(1, 2)) == {"c": 2, "d": 0}
    assert index.n_rows == 3


def test_an_instance_that_comes_back_starts_empty(index):
    named(index, "a", "b")
    for name in "ab":
        index.store(name, path(1, 2), engine_hashes=[1, 2])
    index.remove_instance("a")
    named(index, "a")
    assert index.match_by_instance(path(1, 2)) == {"a": 0, "b": 2}
    with pytest.raises(UnknownBlock):
        index.store("a", path(3), parent=2, engine_hashes=[3])


def test_freed_rows_match_nothing(index):
    for name in "abc":
        index.add_instance(name)
        index.store(name, path(1, 2))
    index.remove_instance("b")
    assert index.match(path(1, 2)).tolist() == [2, 0, 2]


def test_reset_changes_the_kind_and_keeps_the_row(index):
    index.add_instance("a", capacity_blocks=3)
    index.store("a", path(1, 2))
    row = index.row("a")
    index.reset("a", engine_hashes=True)
    assert index.row("a") == row
    assert index.blocks("a") == 0
    index.store("a", path(1), engine_hashes=[1])
    assert index.blocks("a") == 1


def test_dump_shows_edges_depths_and_holders(index):
    index.add_instance("gpu-0")
    index.add_instance("gpu-1")
    index.store("gpu-0", path(1, 2, 3, 4, 5))
    index.store("gpu-1", path(1, 2))
    assert index.dump().splitlines() == [
        "5 blocks in 2 nodes, 2 instances",
        "[0:2] 0000000000000001 0000000000000002 | gpu-0, gpu-1",
        "  [2:5] 0000000000000003 0000000000000004 0000000000000005 | gpu-0",
    ]


# -- bad input: every public call, state unchanged ------------------------------------------------------------

BAD_CALLS = [
    (lambda i: i.add_instance("named"), DuplicateInstance, "'named' is there already"),
    (lambda i: i.add_instance(5), InvalidType, "instance must be a str, got int"),
    (lambda i: i.add_instance("x", capacity_blocks=0), InvalidArgument, "at least 1, got 0"),
    (lambda i: i.add_instance("x", capacity_blocks=-4), InvalidArgument, "at least 1, got -4"),
    (lambda i: i.add_instance("x", capacity_blocks=float("nan")), InvalidType, "must be an int, got float"),
    (lambda i: i.add_instance("x", capacity_blocks=True), InvalidType, "must be an int, got bool"),
    (
        lambda i: i.add_instance("x", capacity_blocks=5, engine_hashes=True),
        InvalidArgument,
        "exclude each other",
    ),
    (lambda i: i.remove_instance("x"), UnknownInstance, "unknown instance 'x'"),
    (lambda i: i.remove_instance([]), UnknownInstance, "unknown instance"),
    (lambda i: i.reset("x"), UnknownInstance, "unknown instance 'x'"),
    (lambda i: i.reset("lru", capacity_blocks=0), InvalidArgument, "at least 1, got 0"),
    (lambda i: i.resize("lru", 0), InvalidArgument, "at least 1, got 0"),
    (lambda i: i.resize("plain", 5), InvalidArgument, "is unbounded; this needs a bounded one"),
    (lambda i: i.resize("x", 5), UnknownInstance, "unknown instance 'x'"),
    (lambda i: i.row("x"), UnknownInstance, "unknown instance 'x'"),
    (lambda i: i.blocks("x"), UnknownInstance, "unknown instance 'x'"),
    (lambda i: i.clear("x"), UnknownInstance, "unknown instance 'x'"),
    (lambda i: i.store("x", path(1)), UnknownInstance, "unknown instance 'x'"),
    (lambda i: i.store("named", path(1)), InvalidArgument, "needs engine_hashes"),
    (lambda i: i.store("named", path(1, 2), engine_hashes=[1]), InvalidArgument, "2 keys need as many"),
    (lambda i: i.store("named", path(1), engine_hashes=["a"]), InvalidType, "int or bytes, got str"),
    (lambda i: i.store("named", path(1), engine_hashes=[2**64]), InvalidArgument, "fit into 64 bits"),
    (lambda i: i.store("named", path(1), engine_hashes=7), InvalidType, "sequence of int or bytes, got int"),
    (
        lambda i: i.store("named", path(1), engine_hashes="ab"),
        InvalidType,
        "sequence of int or bytes, got str",
    ),
    (lambda i: i.store("named", path(1), parent=99, engine_hashes=[1]), UnknownBlock, "engine hash 99"),
    (lambda i: i.store("named", path(1), parent=1.5, engine_hashes=[1]), InvalidType, "got float"),
    (lambda i: i.store("plain", path(1), engine_hashes=[1]), InvalidArgument, "without engine_hashes"),
    (lambda i: i.store("plain", path(1), parent=1), InvalidArgument, "without engine_hashes"),
    (lambda i: i.store("plain", "abc"), InvalidType, "64-bit integers, got str"),
    (lambda i: i.store("plain", None), InvalidType, "64-bit integers, got NoneType"),
    (lambda i: i.store("plain", [1, "b"]), InvalidType, "got str at position 1"),
    (lambda i: i.store("plain", [1, True]), InvalidType, "got bool at position 1"),
    (lambda i: i.store("plain", [1, -2]), InvalidArgument, "got -2 at position 1"),
    (lambda i: i.store("plain", [1, 2**64]), InvalidArgument, "at position 1"),
    (lambda i: i.store("plain", np.array([1.0])), InvalidType, "got dtype float64"),
    (lambda i: i.store("plain", np.array([3, -1])), InvalidArgument, "got -1 at position 1"),
    (lambda i: i.store("plain", np.zeros((2, 2), np.uint64)), InvalidArgument, "one dimension"),
    (lambda i: i.remove("x", [1]), UnknownInstance, "unknown instance 'x'"),
    (lambda i: i.remove("plain", [1]), InvalidArgument, "is unbounded; this needs a named one"),
    (lambda i: i.remove("named", [None]), InvalidType, "int or bytes, got NoneType"),
    (lambda i: i.discard("x", path(1)), UnknownInstance, "unknown instance 'x'"),
    (lambda i: i.discard("named", path(1)), InvalidArgument, "use remove"),
    (lambda i: i.discard("plain", path(1), start=-1), InvalidArgument, "at least 0, got -1"),
    (lambda i: i.discard("plain", path(1), start="0"), InvalidType, "must be an int, got str"),
    (lambda i: i.add_instance("x", capacity_blocks="9"), InvalidType, "must be an int, got str"),
    (lambda i: i.reset([]), UnknownInstance, "unknown instance"),
    (lambda i: i.reset("plain", capacity_blocks=2.0), InvalidType, "must be an int, got float"),
    (lambda i: i.reset("lru", capacity_blocks=5, engine_hashes=True), InvalidArgument, "exclude each other"),
    (lambda i: i.resize("lru", float("nan")), InvalidType, "must be an int, got float"),
    (lambda i: i.resize("lru", None), InvalidType, "must be an int, got NoneType"),
    (lambda i: i.resize("named", 5), InvalidArgument, "is named; this needs a bounded one"),
    (lambda i: i.row(None), UnknownInstance, "unknown instance None"),
    (lambda i: i.store("named", "abc", engine_hashes=[1]), InvalidType, "64-bit integers, got str"),
    (lambda i: i.store("named", [-1], engine_hashes=[1]), InvalidArgument, "got -1 at position 0"),
    (lambda i: i.store("named", path(), engine_hashes=[1]), InvalidArgument, "0 keys need as many"),
    (lambda i: i.store("named", path(1), parent=True, engine_hashes=[1]), InvalidType, "got bool"),
    (lambda i: i.store("named", path(1), parent=2**64, engine_hashes=[1]), InvalidArgument, "64 bits"),
    (lambda i: i.store("named", path(1), engine_hashes=np.array([0.5])), InvalidType, "dtype float64"),
    (lambda i: i.store("named", path(1), engine_hashes=np.ones((1, 1), int)), InvalidArgument, "one dim"),
    (
        lambda i: i.store("named", path(1), parent=11, after=path(1), engine_hashes=[1]),
        InvalidArgument,
        "either parent or after, got both",
    ),
    (lambda i: i.store("named", path(1), after="abc", engine_hashes=[1]), InvalidType, "after must be"),
    (lambda i: i.store("plain", path(1), after=path(2)), InvalidArgument, "without engine_hashes"),
    (lambda i: i.path("x", 11), UnknownInstance, "unknown instance 'x'"),
    (lambda i: i.path("named", 1.5), InvalidType, "got float"),
    (lambda i: i.store("lru", b"abc"), InvalidType, "64-bit integers, got bytes"),
    (lambda i: i.store("lru", [float("nan")]), InvalidType, "got float at position 0"),
    (lambda i: i.remove("named", 11), InvalidType, "sequence of int or bytes, got int"),
    (lambda i: i.remove("named", b"ab"), InvalidType, "sequence of int or bytes, got bytes"),
    (lambda i: i.remove("named", [11, "b"]), InvalidType, "int or bytes, got str"),
    (lambda i: i.remove("named", [11, -(2**63) - 1]), InvalidArgument, "fit into 64 bits"),
    (lambda i: i.remove("lru", [1]), InvalidArgument, "is bounded; this needs a named one"),
    (lambda i: i.discard("plain", "abc"), InvalidType, "64-bit integers, got str"),
    (lambda i: i.discard("plain", [1, -1]), InvalidArgument, "got -1 at position 1"),
    (lambda i: i.discard("plain", path(1), start=True), InvalidType, "must be an int, got bool"),
    (lambda i: i.discard("plain", path(1), start=0.5), InvalidType, "must be an int, got float"),
    (lambda i: i.match_by_instance(None), InvalidType, "64-bit integers, got NoneType"),
    (lambda i: i.match_by_instance([-1]), InvalidArgument, "got -1 at position 0"),
    (lambda i: i.match("abc"), InvalidType, "64-bit integers, got str"),
    (lambda i: i.match(np.array([0.5])), InvalidType, "got dtype float64"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_a_bad_call_raises_and_changes_nothing(index, call, error, message):
    named(index, "named")
    index.add_instance("plain")
    index.add_instance("lru", capacity_blocks=3)
    index.store("named", path(1, 2), engine_hashes=[11, 12])
    index.store("plain", path(1, 3))
    index.store("lru", path(4, 5))
    before = state(index)
    with pytest.raises(error, match=message):
        call(index)
    assert state(index) == before
    assert index.removed_unknown == 0
    index.check()


def test_lists_and_signed_arrays_are_keys_too(index):
    index.add_instance("a")
    index.store("a", [1, 2, 3])
    assert index.match_by_instance(np.array([1, 2], dtype=np.int64)) == {"a": 2}
    assert index.match_by_instance(path(1, 0, 2, 0, 3)[::2]) == {"a": 3}


# -- parity and threads ---------------------------------------------------------------------------------------


def test_both_twins_word_errors_and_dumps_alike(monkeypatch):
    said = []
    for name in BACKENDS:
        monkeypatch.setattr("mulsched.prefix_index._new_backend", lambda name=name: new_backend(name))
        index = named(PrefixIndex(), "named")
        index.add_instance("plain")
        index.add_instance("lru", capacity_blocks=3)
        index.store("plain", path(1, 2))
        messages = [index.dump()]
        for call, error, _ in BAD_CALLS:
            with pytest.raises(error) as caught:
                call(index)
            messages.append(str(caught.value))
        said.append(messages)
    assert all(messages == said[0] for messages in said)


@pytest.fixture
def hasty():
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run_together(*tasks):
    """Run each in a thread; return what they raised."""
    raised = []
    start = threading.Barrier(len(tasks))

    def run(task):
        start.wait()
        try:
            task()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.usefixtures("hasty")
def test_threads_see_and_leave_only_whole_states(index):
    keys = np.arange(50, dtype=np.uint64)
    index.add_instance("whole")
    index.store("whole", keys)
    for name in "ab":
        index.add_instance(name, capacity_blocks=40)
    seen = set()
    done = threading.Event()

    def write(name):
        try:
            for turn in range(800):
                # splits the edge that "whole" holds, and joins it again
                index.store(name, np.append(keys[: turn % 50], np.uint64(99)))
        finally:
            done.set()

    def read():
        while not done.is_set():
            seen.add(int(index.match(keys)[0]))

    assert run_together(lambda: write("a"), lambda: write("b"), read, read) == []
    assert seen <= {50}
    index.check()


def test_a_capacity_beyond_63_bits_is_refused_and_loses_no_row(index):
    index.add_instance("a", capacity_blocks=5)
    index.add_instance("b")
    index.remove_instance("b")
    for call in (index.add_instance, index.reset, index.resize):
        name = "c" if call == index.add_instance else "a"
        with pytest.raises(InvalidArgument, match=r"capacity_blocks must be below 2\*\*63"):
            call(name, capacity_blocks=2**63)
    assert index.add_instance("c") == 1
    assert index.store("a", path(1)) == 1


def test_keys_that_ask_the_index_while_they_are_read_do_not_hang(index):
    index.add_instance("a")
    assert index.store("a", (index.blocks("a") + i for i in range(3))) == 3


def test_a_prompt_that_grows_by_turns_does_not_keep_every_length_of_it(index):
    index.add_instance("a")
    keys = np.arange(2000, dtype=np.uint64)
    index.store("a", keys)
    for at in range(1, 2000, 10):
        index.store("a", np.append(keys[:at], np.uint64(10_000 + at)))
    assert index.memory()["edges"] < 2200 * 8 * 12


def test_unaligned_keys_are_keys(index):
    index.add_instance("a")
    raw = bytearray(1) + path(5, 6, 7).tobytes()
    index.store("a", np.frombuffer(raw, dtype=np.uint64, offset=1))
    assert index.match_by_instance(path(5, 6, 7)) == {"a": 3}


def test_questions_by_name_are_safe_beside_changes(index):
    errors, done = [], threading.Event()

    def ask():
        while not done.is_set():
            try:
                index.match_by_instance(path(1, 2))
            except Exception as error:
                errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(300):
        index.add_instance("x")
        index.store("x", path(1))
        index.remove_instance("x")
    done.set()
    asking.join()
    assert errors == []
