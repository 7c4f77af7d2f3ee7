"""What only the native core can get wrong: calls that no facade would make. Failed allocations: csrc/stress.cpp."""

import numpy as np
import pytest
from backends import BACKENDS

from mulsched.indicators import COLUMNS

if "native" in BACKENDS:
    from mulsched import _native

    WORDS = np.arange(3, dtype=np.uint64)

    def charge(tiers):
        table = np.zeros((len(COLUMNS), 1), dtype=np.int64)
        _native.charge_tiers(tiers, WORDS, 13, 4, np.zeros(1, dtype=np.int64), table)
        return table[COLUMNS.index("lower_tier_tokens"), 0]

    def a_tier():
        index = _native.PrefixIndex()
        index.add_row(0, -1, False)
        index.store(0, WORDS)
        return index

    @pytest.mark.parametrize(
        "call",
        [
            lambda index: _native.hash_blocks([1], 0, 0),
            lambda index: _native.hash_text_blocks("a", 0, 0),
            lambda index: index.add_row(2**32 - 1, -1, False),
            lambda index: index.resize(0, -1),
            lambda index: index.store(7, WORDS),
            lambda index: index.blocks(7),
            lambda index: index.match(WORDS, np.empty(1, dtype=object)),
            lambda index: index.match(WORDS.astype(np.uint32), np.empty(1, dtype=np.int64)),
            lambda index: index.match(WORDS.reshape(1, 3), np.empty(1, dtype=np.int64)),
            lambda index: index.store_named(1, None, WORDS[:2], WORDS),
            lambda index: _native.FusedScore((), (), (), "first", 0),
            lambda index: _native.FusedScore([99], (), (), "first", 0),
            lambda index: _native.FusedScore([1], [1.0, 2.0], [None, None], "first", 0),
            lambda index: _native.FusedScore([1], [1.0], (), "first", 0),
            lambda index: _native.FusedScore([1], [1.0], ["min_max"], "first", 0),
            lambda index: charge([(index, 1.5)]),
            lambda index: charge([(index, float("nan"))]),
        ],
    )
    def test_a_call_out_of_bounds_raises_and_changes_nothing(call):
        index = _native.PrefixIndex()
        index.add_row(0, 5, False)
        index.add_row(1, -1, True)
        index.store(0, WORDS)
        before = index.edges(), index.memory()["total"]
        with pytest.raises((ValueError, LookupError)):
            call(index)
        index.check()
        assert (index.edges(), index.memory()["total"]) == before

    def test_a_read_only_result_is_refused():
        index = _native.PrefixIndex()
        out = np.empty(1, dtype=np.int64)
        out.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            index.match(WORDS, out)

    def test_tiers_that_nobody_else_holds_live_while_they_are_asked():
        assert charge((a_tier(), 0.5) for _ in range(3)) == 12

    def test_a_fused_score_takes_arrays():
        assert (
            _native.FusedScore(np.array([1, 2]), np.array([0.5, 2.0]), [None, "max"], "random", -1)
            is not None
        )
