"""What only the native core can get wrong: calls that no facade would make, and failed allocations."""

import subprocess
import sys

import numpy as np
import pytest
from backends import BACKENDS

if "native" in BACKENDS:
    from mulsched import _native

    WORDS = np.arange(3, dtype=np.uint64)

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
            lambda index: _native.FusedScore((), None),
            lambda index: _native.FusedScore([99], None),
            lambda index: _native.FusedScore([1], [1.0, 2.0]),
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

    def test_a_fused_score_takes_arrays():
        assert _native.FusedScore(np.array([1, 2]), np.array([0.5, 2.0])) is not None

    OUT_OF_MEMORY = """
import mmap, resource
import numpy as np
import mulsched
index = mulsched.PrefixIndex()
index.add_instance("a", engine_hashes=True)
index.store("a", [1, 2, 3], engine_hashes=[1, 2, 3])
n = 20_000_000
keys = np.arange(n, dtype=np.uint64)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 8 * n * 3, used + 8 * n * 3))
try:
    index.store("a", keys, engine_hashes=keys)
except MemoryError:
    print("MemoryError")
for call in (lambda: index.store("a", [9], engine_hashes=[9]), lambda: index.remove("a", [1])):
    try:
        call()
    except RuntimeError as error:
        print(error)
print(index.match_by_instance([1]))
"""

    def test_after_a_failed_allocation_the_index_says_so_and_does_no_harm():
        done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
        broken = "the index is unusable after a failed allocation: make a new one"
        assert done.stdout.splitlines() == ["MemoryError", broken, broken, "{'a': 0}"], done.stderr
