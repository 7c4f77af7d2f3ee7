"""The native core: a shim on csrc/ that checks buffers, owns memory and translates errors.

The algorithms are in csrc/*.hpp; the readable twins in _prefix_index_py.py, _block_keys_py.py and
_columns_py.py. The GIL is released for long stores and removals, long prompts to hash and walks of the
whole tree; a match or a pick, about 10 microseconds for 8,192 blocks, keeps it. A thread may wait for the
index while it holds the GIL: the thread that has the index never asks for the GIL before it gives it back.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBUF_STRIDED_RO, PyBUF_WRITABLE,
    PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector

import operator

import numpy as np

from mulsched.errors import DuplicateRequest, InvalidArgument, InvalidTokens, InvalidType

cdef extern from "Python.h":
    # with borrowed references, as the loop over a prompt's tokens wants them
    PyObject** PySequence_Fast_ITEMS(object)
    Py_ssize_t PySequence_Fast_GET_SIZE(object)
    bint PyLong_CheckExact(PyObject*)
    long PyLong_AsLongAndOverflow(PyObject*, int*)

cdef extern from *:
    """
    #ifndef MULSCHED_SOURCE_DIGEST
    #define MULSCHED_SOURCE_DIGEST ""
    #endif
    """
    const char* MULSCHED_SOURCE_DIGEST

cdef extern from "xxh3.hpp" namespace "mulsched" nogil:
    uint64_t c_xxh3_64 "mulsched::xxh3_64"(const void*, size_t, uint64_t) noexcept
    void c_hash_blocks "mulsched::hash_blocks"(
        const uint32_t*, size_t, size_t, uint64_t, uint64_t*) noexcept
    size_t first_invalid[Token](const Token*, size_t) noexcept

cdef extern from "msgpack_integers.hpp" namespace "mulsched" nogil:
    cbool read_array_header(const uint8_t*, size_t, size_t&, size_t&) noexcept
    size_t read_integers[Word](const uint8_t*, size_t, size_t, size_t, Word*) noexcept

cdef extern from "kv_event.hpp" namespace "mulsched" nogil:
    enum class KvKind "mulsched::KvKind":
        kStart, kAfterParent, kRemoved

    cdef cppclass CKvEvent "mulsched::KvEvent":
        KvKind kind
        uint64_t n_blocks, parent

cdef extern from "kv_events.hpp" namespace "mulsched" nogil:
    cdef cppclass CKvPart "mulsched::KvPart":
        cbool plain
        size_t begin, end, first_event, first_hash, first_token, n_events, n_hashes, n_tokens
        string_view medium, lora_name
        uint64_t block_size, lora_id

    const uint64_t kNoId "mulsched::KvBatch::kNoId"

    cdef cppclass CKvBatch "mulsched::KvBatch":
        double timestamp
        uint64_t rank
        size_t ignored
        vector[CKvPart] parts
        vector[CKvEvent] events
        const uint64_t* hashes()
        const uint32_t* tokens()
        size_t n_hashes()
        cbool plain_within(size_t) noexcept
        cbool split(const uint8_t*, size_t, uint64_t, size_t) except +

cdef extern from "prefix_tree.hpp" namespace "mulsched" nogil:
    uint32_t common_prefix_or(uint32_t, const uint64_t*, size_t, const uint64_t*, size_t) noexcept

cdef extern from "prefix_index.hpp" namespace "mulsched" nogil:
    cdef cppclass CMemory "mulsched::PrefixTree::Memory":
        size_t nodes, edges, holders, blocks, names

    cdef cppclass CEdge "mulsched::PrefixIndex::Edge":
        uint32_t start
        vector[uint64_t] keys
        vector[uint32_t] rows

    cdef cppclass CApplied "mulsched::PrefixIndex::Applied":
        int64_t blocks_stored, stores_refused, blocks_removed, blocks_known

    cdef cppclass CPrefixIndex "mulsched::PrefixIndex":
        CPrefixIndex() except +
        void add_row(uint32_t, int64_t, cbool) except +
        void remove_row(uint32_t) except +
        void resize(uint32_t, int64_t) except +
        void clear(uint32_t) except +
        int64_t store(uint32_t, const uint64_t*, size_t) except +
        int64_t store_named(
            uint32_t, cbool, uint64_t, const uint64_t*, const uint64_t*, size_t, cbool) except +
        int64_t store_named_after(
            uint32_t, const uint64_t*, size_t, const uint64_t*, const uint64_t*, size_t, cbool) except +
        vector[uint64_t] path(uint32_t, uint64_t) except +
        int64_t remove_named(uint32_t, const uint64_t*, size_t) except +
        CApplied apply_run(
            uint32_t, const CKvEvent*, size_t, const uint64_t*, const uint64_t*, cbool) except +
        int64_t discard(uint32_t, const uint64_t*, size_t, size_t) except +
        void match(const uint64_t*, size_t, int64_t*, size_t) noexcept
        void match_from(const uint64_t*, size_t, int64_t*, size_t) noexcept
        int64_t blocks(uint32_t) except +
        int64_t unique_blocks() except +
        size_t nodes() except +
        CMemory memory() except +
        string check() except +
        vector[CEdge] edges() except +
        vector[vector[uint64_t]] lru(uint32_t) except +

cdef extern from "kv_apply.hpp" namespace "mulsched" nogil:
    size_t c_apply_parts "mulsched::apply_parts"(
        CPrefixIndex&, uint32_t, const CKvBatch&, size_t, size_t, uint64_t, cbool, CApplied&) except +

cdef extern from "select.hpp" namespace "mulsched" nogil:
    const size_t kColumns
    const size_t kLoadColumns

    cdef cppclass CLoadView "mulsched::LoadView":
        const int64_t* data
        size_t n_rows

    enum class Divisor "mulsched::Divisor":
        kNone, kMax, kPrompt

    cdef cppclass CFusedScore "mulsched::FusedScore":
        vector[size_t] columns
        vector[double] weights
        vector[Divisor] divisors

    void c_fill_columns "mulsched::fill_columns"(
        const CPrefixIndex&, const CPrefixIndex*, const uint64_t*, size_t, int64_t, int64_t,
        const int64_t*, size_t, const CLoadView&, int64_t*) except +
    cdef cppclass CTier "mulsched::Tier":
        const CPrefixIndex* index
        double cost_ratio

    void c_charge_tiers "mulsched::charge_tiers"(
        const vector[CTier]&, const uint64_t*, size_t, int64_t, int64_t, const int64_t*, size_t,
        int64_t*) except +
    enum class Ties "mulsched::Ties":
        kLeastRecent, kRandom, kFirst

    Py_ssize_t c_score_and_pick "mulsched::score_and_pick"(
        const CFusedScore&, Ties, uint64_t, int64_t, int64_t, const int64_t*, const int64_t*, size_t,
        double*) noexcept

cdef extern from "failure.hpp" namespace "mulsched" nogil:
    cdef cppclass CClassFound "mulsched::ClassFound":
        int64_t depth
        uint64_t hash
        double load
        int64_t holders

    cdef cppclass CCandidates "mulsched::Candidates":
        const int64_t* table
        size_t loads, n

    cdef cppclass COccupancy "mulsched::Occupancy":
        COccupancy(double, double) except +
        double load()
        size_t nodes()
        CClassFound examine(const uint64_t*, size_t, const CCandidates&) except +
        size_t dispatch(const uint64_t*, size_t, const CCandidates&, size_t, double, CClassFound&,
                        vector[uint64_t]&) except +
        cbool first_token(size_t)
        void forget() noexcept
        cbool end(size_t, vector[uint64_t]&) except +

SOURCE_DIGEST = (<bytes> MULSCHED_SOURCE_DIGEST).decode()
"""Digest of the sources this module was built from; tests/test_build.py compares it with the checkout."""

cdef object new_array = np.empty
cdef object uint32_dtype = np.dtype(np.uint32)
cdef object uint64_dtype = np.dtype(np.uint64)

# Below these sizes the work takes less than about 10 us and giving up the GIL costs more than it brings.
cdef size_t HASH_BYTES_WITH_GIL = 64 * 1024
cdef size_t STORE_BLOCKS_WITH_GIL = 256


# -- block keys -----------------------------------------------------------------------------------------

def xxh3_64(data, uint64_t seed):
    """Return XXH3-64 of a bytes-like object."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return c_xxh3_64(view.buf, <size_t> view.len, seed)
    finally:
        PyBuffer_Release(&view)


cdef object keys_of(const uint32_t* tokens, size_t n_tokens, size_t block_size, uint64_t seed):
    cdef size_t n_blocks = n_tokens // block_size
    cdef Py_buffer out
    keys = new_array(n_blocks, uint64_dtype)
    PyObject_GetBuffer(keys, &out, PyBUF_WRITABLE)
    if n_tokens * sizeof(uint32_t) > HASH_BYTES_WITH_GIL:
        with nogil:
            c_hash_blocks(tokens, n_blocks, block_size, seed, <uint64_t*> out.buf)
    else:
        c_hash_blocks(tokens, n_blocks, block_size, seed, <uint64_t*> out.buf)
    PyBuffer_Release(&out)
    return keys


cdef int raise_invalid_token(object token, size_t position) except -1:
    raise InvalidTokens(f"tokens must lie in 0..2**32-1, got {token} at position {position}")


cdef int convert_token(object token, size_t position, uint32_t* out) except -1:
    """The slow way, for what is not exactly an int."""
    if isinstance(token, bool) or not hasattr(token, "__index__"):
        raise InvalidType(f"tokens must be integers, got {type(token).__name__} at position {position}")
    index = operator.index(token)
    if not 0 <= index < 2**32:
        raise_invalid_token(index, position)
    out[0] = <uint32_t> index
    return 0


cdef int convert_tokens(object items, size_t n, uint32_t* words) except -1:
    """Convert a list or tuple of n tokens; reads exact ints without a reference count."""
    cdef PyObject** tokens = PySequence_Fast_ITEMS(items)
    cdef long value  # 64 bits wherever this builds
    cdef list copy
    cdef int overflow = 0
    cdef size_t i
    for i in range(n):
        if not PyLong_CheckExact(tokens[i]):
            break
        value = PyLong_AsLongAndOverflow(tokens[i], &overflow)
        if overflow != 0 or value < 0 or value > 0xFFFFFFFF:
            raise_invalid_token(<object> tokens[i], i)
        words[i] = <uint32_t> value
    else:
        return 0
    # From here on __index__ may run and change a list under our hands: read a copy.
    copy = []  # making it may collect garbage, and so run code: look at the list again
    if <size_t> PySequence_Fast_GET_SIZE(items) != n:
        raise RuntimeError("the list of tokens changed while it was read")
    tokens = PySequence_Fast_ITEMS(items)
    for i in range(n):
        copy.append(<object> tokens[i])
    for i in range(n):
        convert_token(copy[i], i, &words[i])
    return 0


cdef object hash_sequence(object items, size_t block_size, uint64_t seed):
    cdef size_t n = <size_t> PySequence_Fast_GET_SIZE(items)  # not len(), which a subclass may override
    cdef uint32_t* words = <uint32_t*> PyMem_Malloc(n * sizeof(uint32_t))
    if words == NULL:
        raise MemoryError()
    try:
        convert_tokens(items, n, words)
        return keys_of(words, n, block_size, seed)
    finally:
        PyMem_Free(words)


ctypedef fused Token:
    int32_t
    uint32_t
    int64_t
    uint64_t


cdef object hash_words(Token* tokens, size_t n, size_t block_size, uint64_t seed):
    """Hash contiguous tokens: 4 bytes each in place, 8 bytes each by way of a copy."""
    cdef size_t invalid = first_invalid(tokens, n), i
    cdef uint32_t* words
    if invalid < n:
        raise_invalid_token(tokens[invalid], invalid)
    if sizeof(Token) == sizeof(uint32_t):
        return keys_of(<const uint32_t*> tokens, n, block_size, seed)
    words = <uint32_t*> PyMem_Malloc(n * sizeof(uint32_t))
    if words == NULL:
        raise MemoryError()
    try:
        for i in range(n):
            words[i] = <uint32_t> tokens[i]
        return keys_of(words, n, block_size, seed)
    finally:
        PyMem_Free(words)


def hash_blocks(tokens, size_t block_size, uint64_t seed):
    """Return the key of each whole block; see ``mulsched.block_keys``."""
    cdef Py_buffer view
    cdef size_t n
    cdef char kind
    if block_size < 1:
        raise ValueError("block_size must be at least 1")
    if isinstance(tokens, (list, tuple)):
        return hash_sequence(tokens, block_size, seed)
    if not PyObject_CheckBuffer(tokens):
        raise InvalidType(
            f"tokens must be a list, tuple, array or buffer of integers, got {type(tokens).__name__}")
    PyObject_GetBuffer(tokens, &view, PyBUF_STRIDED_RO | PyBUF_FORMAT)
    try:
        if view.ndim != 1:
            raise InvalidArgument(f"tokens must have one dimension, got {view.ndim}")
        kind = integer_kind(&view)
        if kind == 0:
            raise InvalidType("tokens must be 32-bit or 64-bit native integers, got buffer format "
                              f"{'B' if view.format == NULL else view.format.decode()!r}")
        n = <size_t> view.shape[0]
        # some exporters (ctypes) give no strides for what is contiguous
        if n > 0 and ((view.strides != NULL and view.strides[0] != view.itemsize)
                      or <size_t> view.buf % <size_t> view.itemsize != 0):
            return hash_blocks(np.require(np.asarray(tokens), requirements="CA"), block_size, seed)
        if view.itemsize == 4:
            if kind == c"i":
                return hash_words[int32_t](<int32_t*> view.buf, n, block_size, seed)
            return hash_words[uint32_t](<uint32_t*> view.buf, n, block_size, seed)
        if kind == c"i":
            return hash_words[int64_t](<int64_t*> view.buf, n, block_size, seed)
        return hash_words[uint64_t](<uint64_t*> view.buf, n, block_size, seed)
    finally:
        PyBuffer_Release(&view)


cdef char integer_kind(const Py_buffer* view) noexcept:
    """'i' for signed, 'u' for unsigned native integers of 4 or 8 bytes, 0 for anything else."""
    cdef const char* code = view.format
    if code == NULL or (view.itemsize != 4 and view.itemsize != 8):
        return 0
    if code[0] == c"@" or code[0] == c"=" or code[0] == c"<":  # the build insists on little-endian
        code += 1
    if code[0] == 0 or code[1] != 0:
        return 0
    if code[0] in (c"i", c"l", c"q"):
        return c"i"
    if code[0] in (c"I", c"L", c"Q"):
        return c"u"
    return 0


def hash_text_blocks(str text, Py_ssize_t block_chars, uint64_t seed):
    """Return the key of each whole block of characters; see ``mulsched.text_block_keys``."""
    if block_chars < 1:
        raise ValueError("block_chars must be at least 1")
    cdef bytes encoded = text.encode()
    cdef const unsigned char* start = encoded
    cdef const unsigned char* at = start
    cdef Py_ssize_t n_blocks = len(text) // block_chars, block, i
    cdef Py_buffer out
    keys = new_array(n_blocks, uint64_dtype)
    PyObject_GetBuffer(keys, &out, PyBUF_WRITABLE)
    for block in range(n_blocks):
        start = at
        if len(encoded) == len(text):  # ASCII: a byte is a character
            at += block_chars
        else:
            for i in range(block_chars):
                # the first byte tells how many follow
                at += 1 if at[0] < 0x80 else 2 if at[0] < 0xE0 else 3 if at[0] < 0xF0 else 4
        (<uint64_t*> out.buf)[block] = c_xxh3_64(start, <size_t> (at - start), seed)
    PyBuffer_Release(&out)
    return keys


# -- integers in messages -------------------------------------------------------------------------------

def unpack_uint32(data):
    """Return a msgpack array of integers in 0..2**32-1; None if data is anything else."""
    return unpack(data, uint32_dtype)


def unpack_uint64(data):
    """Return a msgpack array of integers as 64-bit words, negative ones too; None if data is anything else."""
    return unpack(data, uint64_dtype)


cdef object unpack(object data, object dtype):
    cdef Py_buffer view, out
    cdef const uint8_t* start
    cdef size_t count = 0, begin = 0, size, end
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        start = <const uint8_t*> view.buf
        size = <size_t> view.len
        if not read_array_header(start, size, count, begin):
            return None
        words = new_array(count, dtype)
        PyObject_GetBuffer(words, &out, PyBUF_WRITABLE)
        if out.itemsize == 4:
            end = read_integers[uint32_t](start, size, begin, count, <uint32_t*> out.buf)
        else:
            end = read_integers[uint64_t](start, size, begin, count, <uint64_t*> out.buf)
        PyBuffer_Release(&out)
        return words if end == size else None
    finally:
        PyBuffer_Release(&view)


cdef object array_of(const void* items, size_t count, size_t item_bytes, object shape, object dtype):
    cdef Py_buffer out
    array = new_array(shape, dtype)
    PyObject_GetBuffer(array, &out, PyBUF_WRITABLE)
    memcpy(out.buf, items, count * item_bytes)
    PyBuffer_Release(&out)
    return array


cdef object text_or_none(string_view text):
    return text.data()[:text.size()].decode("ascii") if text.size() > 0 else None


@cython.final
@cython.freelist(8)
cdef class KvMessage:
    """A batch of KV events, split into parts: runs of plain events, and single events that are not plain."""

    cdef CKvBatch batch
    cdef bytes data  # in which the batch's texts lie

    def __len__(self):
        """Return how many parts there are."""
        return self.batch.parts.size()

    @property
    def timestamp(self):
        """When, in seconds on the engine's clock."""
        return self.batch.timestamp

    @property
    def rank(self):
        """The data-parallel rank, or None."""
        return None if self.batch.rank == kNoId else self.batch.rank

    @property
    def ignored(self):
        """How many events are of another cache group, or without tokens."""
        return self.batch.ignored

    def plain_within(self, size_t most):
        """Return whether all parts are runs, those of other media than the GPU of at most ``most`` events."""
        return self.batch.plain_within(most)

    def part(self, size_t position):
        """Return a run (medium, lora_name, lora_id, block_size, table, block_hashes, token_ids).

        As in ``mulsched.types.EventRun``; of an event that is not plain, its place (begin, end).
        """
        if position >= self.batch.parts.size():
            raise IndexError(f"one of {self.batch.parts.size()} parts expected, got {position}")
        cdef CKvPart* part = &self.batch.parts[position]
        if not part.plain:
            return part.begin, part.end
        return (
            text_or_none(part.medium),
            text_or_none(part.lora_name),
            None if part.lora_id == kNoId else part.lora_id,
            part.block_size,
            array_of(self.batch.events.data() + part.first_event, part.n_events, sizeof(CKvEvent),
                     (part.n_events, 3), uint64_dtype),
            array_of(self.batch.hashes() + part.first_hash, part.n_hashes, sizeof(uint64_t), part.n_hashes,
                     uint64_dtype),
            array_of(self.batch.tokens() + part.first_token, part.n_tokens, sizeof(uint32_t), part.n_tokens,
                     uint32_dtype),
        )

    def apply(self, PrefixIndex index not None, uint32_t row, size_t begin, size_t block_size, uint64_t seed,
              cbool counts_copies):
        """Apply the parts from ``begin`` on, up to the first that is no run of such blocks on the GPU.

        Return which that is, and what ``PrefixIndex.apply_run`` would.
        """
        cdef CApplied applied
        if block_size < 1:
            raise ValueError("block_size must be at least 1")
        if self.batch.events.size() <= STORE_BLOCKS_WITH_GIL and self.batch.n_hashes() <= STORE_BLOCKS_WITH_GIL:
            begin = c_apply_parts(index.index.get()[0], row, self.batch, begin, block_size, seed, counts_copies,
                                  applied)
        else:
            with nogil:
                begin = c_apply_parts(index.index.get()[0], row, self.batch, begin, block_size, seed,
                                      counts_copies, applied)
        return begin, (applied.blocks_stored, applied.stores_refused, applied.blocks_removed,
                       applied.blocks_known)


def split_kv_events(bytes data not None, uint64_t group_idx, size_t max_parts):
    """Return a batch in parts; None for what is framed in another way, or has more parts than ``max_parts``."""
    cdef KvMessage message = KvMessage.__new__(KvMessage)
    cdef const uint8_t* start = data
    message.data = data
    cdef size_t size = <size_t> len(data)
    cdef cbool framed
    if size <= HASH_BYTES_WITH_GIL:
        framed = message.batch.split(start, size, group_idx, max_parts)
    else:
        with nogil:
            framed = message.batch.split(start, size, group_idx, max_parts)
    return message if framed else None


# -- prefix index ---------------------------------------------------------------------------------------

@cython.final
@cython.freelist(8)
cdef class Words:
    """A contiguous buffer of 8-byte items, held as long as this object lives."""

    cdef Py_buffer view

    def __dealloc__(self):
        PyBuffer_Release(&self.view)  # nothing, if there never was a buffer

    cdef size_t length(self) noexcept:
        return <size_t> self.view.shape[0]


cdef Words words_of(object array, int flags=PyBUF_SIMPLE, int ndim=1):
    cdef Words words = Words.__new__(Words)
    PyObject_GetBuffer(array, &words.view, flags | PyBUF_ND | PyBUF_FORMAT)
    if (words.view.itemsize != 8 or words.view.ndim != ndim
            or (words.view.format != NULL and words.view.format[0] == c"O")):
        raise ValueError(f"expected {ndim} dimensions of 8-byte items, "
                         f"got {words.view.ndim} of {words.view.itemsize} bytes")
    return words


cdef class PrefixIndex:
    """The C++ prefix index; the interface is ``mulsched.prefix_index.Backend``."""

    cdef unique_ptr[CPrefixIndex] index

    def __cinit__(self):
        self.index.reset(new CPrefixIndex())

    def add_row(self, uint32_t row, int64_t capacity, cbool named):
        """Start an empty row."""
        self.index.get().add_row(row, capacity, named)

    def remove_row(self, uint32_t row):
        """Forget the row and everything it holds."""
        with nogil:
            self.index.get().remove_row(row)

    def resize(self, uint32_t row, int64_t capacity):
        """Change the capacity of a bounded row and evict down to it."""
        with nogil:
            self.index.get().resize(row, capacity)

    def store(self, uint32_t row, keys):
        """Hold the whole path on an unnamed row; return the blocks not held before."""
        cdef Words path = words_of(keys)
        cdef const uint64_t* blocks = <const uint64_t*> path.view.buf
        cdef size_t n = path.length()
        cdef int64_t newly
        cdef vector[uint64_t] copied
        if n <= STORE_BLOCKS_WITH_GIL:
            return self.index.get().store(row, blocks, n)
        copied.assign(blocks, blocks + n)  # without the GIL others may write to the caller's buffer
        with nogil:
            newly = self.index.get().store(row, copied.data(), n)
        return newly

    def store_named(self, uint32_t row, parent, hashes, keys, cbool counts_copies=True):
        """Append blocks after the one that parent names; return blocks newly held, -1: unknown parent."""
        cdef Words path = words_of(keys), named = words_of(hashes)
        cdef const uint64_t* blocks = <const uint64_t*> path.view.buf
        cdef const uint64_t* names = <const uint64_t*> named.view.buf
        cdef size_t n = path.length()
        cdef int64_t newly
        cdef cbool has_parent = parent is not None
        cdef uint64_t parent_hash = parent if has_parent else 0
        if named.length() != n:
            raise ValueError(f"{n} keys need as many hashes, got {named.length()}")
        cdef vector[uint64_t] copied
        if n <= STORE_BLOCKS_WITH_GIL:
            return self.index.get().store_named(row, has_parent, parent_hash, names, blocks, n, counts_copies)
        copied.assign(blocks, blocks + n)
        copied.insert(copied.end(), names, names + n)
        with nogil:
            newly = self.index.get().store_named(
                row, has_parent, parent_hash, copied.data() + n, copied.data(), n, counts_copies)
        return newly

    def store_named_after(self, uint32_t row, path, hashes, keys, cbool counts_copies=True):
        """Append blocks after a path of which the row need not hold anything; return blocks newly held."""
        cdef Words above = words_of(path), blocks = words_of(keys), named = words_of(hashes)
        if named.length() != blocks.length():
            raise ValueError(f"{blocks.length()} keys need as many hashes, got {named.length()}")
        return self.index.get().store_named_after(
            row, <const uint64_t*> above.view.buf, above.length(), <const uint64_t*> named.view.buf,
            <const uint64_t*> blocks.view.buf, blocks.length(), counts_copies)

    def path(self, uint32_t row, uint64_t name):
        """Return the keys up to the block that the row knows by this name; None if it knows none."""
        cdef vector[uint64_t] keys = self.index.get().path(row, name)
        if keys.empty():
            return None
        out = new_array(keys.size(), uint64_dtype)
        cdef Words words = words_of(out, PyBUF_WRITABLE)
        memcpy(words.view.buf, keys.data(), keys.size() * sizeof(uint64_t))
        return out

    def remove_named(self, uint32_t row, hashes):
        """Take a copy of each name, and with its last copy the name; return how many were known."""
        cdef Words named = words_of(hashes)
        cdef const uint64_t* names = <const uint64_t*> named.view.buf
        cdef size_t n = named.length()
        cdef int64_t known
        if n <= STORE_BLOCKS_WITH_GIL:
            return self.index.get().remove_named(row, names, n)
        with nogil:  # without a copy: each name is looked up once, so one that changes meanwhile does no harm
            known = self.index.get().remove_named(row, names, n)
        return known

    def apply_run(self, uint32_t row, table, hashes, keys, cbool counts_copies=True):
        """Store and remove in turn; return blocks stored, stores refused, blocks removed and known."""
        cdef Words events = words_of(table, PyBUF_SIMPLE, 2), named = words_of(hashes), path = words_of(keys)
        cdef const uint64_t* names = <const uint64_t*> named.view.buf
        cdef const uint64_t* blocks = <const uint64_t*> path.view.buf
        cdef const CKvEvent* first = <const CKvEvent*> events.view.buf
        cdef size_t n = events.length(), n_hashes = 0, n_keys = 0, i
        cdef CApplied applied
        cdef vector[CKvEvent] run
        cdef vector[uint64_t] copied
        if events.view.shape[1] != 3:
            raise ValueError(f"a table of 3 columns expected, got {events.view.shape[1]}")
        run.assign(first, first + n)  # first, so that what is checked is what is used
        for i in range(n):
            if <uint64_t> run[i].kind > <uint64_t> KvKind.kRemoved:
                raise ValueError(f"a kind of event in 0..2 expected, got {<uint64_t> run[i].kind}")
            if run[i].n_blocks > named.length() - n_hashes:
                break
            n_hashes += run[i].n_blocks
            if run[i].kind != KvKind.kRemoved:
                n_keys += run[i].n_blocks
        else:
            i = n
        if i < n or n_hashes != named.length() or n_keys != path.length():
            raise ValueError("as many hashes as the events have blocks and as many keys as they store expected, "
                             f"got {named.length()} and {path.length()}")
        if n_hashes <= STORE_BLOCKS_WITH_GIL:
            applied = self.index.get().apply_run(row, run.data(), n, names, blocks, counts_copies)
        else:
            copied.assign(names, names + n_hashes)
            copied.insert(copied.end(), blocks, blocks + n_keys)
            with nogil:
                applied = self.index.get().apply_run(
                    row, run.data(), n, copied.data(), copied.data() + n_hashes, counts_copies)
        return applied.blocks_stored, applied.stores_refused, applied.blocks_removed, applied.blocks_known

    def discard(self, uint32_t row, keys, size_t start):
        """Stop holding blocks start and later of the path on an unnamed row; return how many were held."""
        cdef Words path = words_of(keys)
        return self.index.get().discard(row, <const uint64_t*> path.view.buf, path.length(), start)

    def clear(self, uint32_t row):
        """Hold nothing on this row."""
        with nogil:
            self.index.get().clear(row)

    def match(self, keys, out):
        """Write per row how many leading blocks of keys it holds."""
        cdef Words path = words_of(keys), matched = words_of(out, PyBUF_WRITABLE)
        self.index.get().match(<const uint64_t*> path.view.buf, path.length(),
                               <int64_t*> matched.view.buf, matched.length())

    def match_from(self, keys, out):
        """Move each row's entry on over the blocks of keys that it holds from there."""
        cdef Words path = words_of(keys), reached = words_of(out, PyBUF_WRITABLE)
        self.index.get().match_from(<const uint64_t*> path.view.buf, path.length(),
                                    <int64_t*> reached.view.buf, reached.length())

    def blocks(self, uint32_t row):
        """Return how many blocks the row holds."""
        return self.index.get().blocks(row)

    def unique_blocks(self):
        """Return how many blocks are held by at least one row."""
        return self.index.get().unique_blocks()

    def nodes(self):
        """Return how many nodes the tree has, the root not counted."""
        return self.index.get().nodes()

    def memory(self):
        """Return bytes allocated, by part."""
        cdef CMemory m
        with nogil:
            m = self.index.get().memory()
        return {"nodes": m.nodes, "edges": m.edges, "holders": m.holders, "blocks": m.blocks,
                "names": m.names, "total": m.nodes + m.edges + m.holders + m.blocks + m.names}

    def check(self):
        """Raise AssertionError with the number of an invariant that does not hold."""
        cdef string broken
        with nogil:
            broken = self.index.get().check()
        if not broken.empty():
            raise AssertionError(broken.decode())

    def edges(self):
        """Return every node in depth-first order: (start depth, keys, holder rows)."""
        cdef vector[CEdge] edges
        cdef size_t i
        with nogil:
            edges = self.index.get().edges()
        return [(edges[i].start, edges[i].keys, edges[i].rows) for i in range(edges.size())]

    def lru(self, uint32_t row):
        """Return the key paths of the row's nodes, next to be evicted first."""
        cdef vector[vector[uint64_t]] paths
        with nogil:
            paths = self.index.get().lru(row)
        return paths


def common_blocks(keys, others):
    """Return how many leading blocks of ``keys`` the one of ``others`` has that has most of them."""
    cdef Words path = words_of(keys), other
    cdef uint32_t shared = 0
    for array in others:
        other = words_of(array)
        shared = common_prefix_or(shared, <const uint64_t*> path.view.buf, path.length(),
                                  <const uint64_t*> other.view.buf, other.length())
    return shared


# -- columns and the fused pick -------------------------------------------------------------------------

cdef class FusedScore:
    """A score the core computes itself, and who wins among equals.

    ``columns`` are positions in ``mulsched.indicators.COLUMNS``; with ``weights`` their sum is taken, each over
    its divisor, None, "max" or "prompt", without their product. ``ties`` and ``seed`` as in ``mulsched.Router``.
    """

    cdef CFusedScore score
    cdef Ties ties
    cdef uint64_t seed

    def __cinit__(self, columns, weights, divisors, ties, seed):
        columns, weights, divisors = tuple(columns), tuple(weights), tuple(divisors)
        if not columns or (weights and len(weights) != len(columns)) or len(divisors) != len(weights):
            raise ValueError("one weight and divisor for each of at least one column expected")
        for column in columns:
            if not 0 <= column < kColumns:
                raise ValueError(f"no column {column}")
            self.score.columns.push_back(column)
        for weight in weights:
            self.score.weights.push_back(weight)
        for divisor in divisors:
            self.score.divisors.push_back(
                {None: Divisor.kNone, "max": Divisor.kMax, "prompt": Divisor.kPrompt}[divisor])
        self.ties = {"least_recent": Ties.kLeastRecent, "random": Ties.kRandom, "first": Ties.kFirst}[ties]
        self.seed = seed % 2**64


cdef int64_t* fill(PrefixIndex index, PrefixIndex in_flight, Words path, int64_t prompt_tokens,
                   int64_t block_size, Words rows, object load, Words out) except NULL:
    """Fill the columns of the candidate rows; return where they are."""
    cdef Words table = words_of(load, PyBUF_SIMPLE, 2)
    cdef const int64_t* candidates = <const int64_t*> rows.view.buf
    cdef const CPrefixIndex* coming = NULL
    cdef CLoadView view
    cdef size_t i
    if table.length() != kLoadColumns:
        raise ValueError(f"a load table of {kLoadColumns} columns expected, got {table.length()}")
    check_table(rows, out)
    for i in range(rows.length()):
        if not 0 <= candidates[i] < table.view.shape[1]:
            raise ValueError(f"row {candidates[i]} lies outside the load table")
    if prompt_tokens < 1 or block_size < 1:
        raise ValueError(f"at least one token a prompt and a block expected, got {prompt_tokens}, {block_size}")
    if in_flight is not None:
        coming = in_flight.index.get()
    view.data = <const int64_t*> table.view.buf
    view.n_rows = <size_t> table.view.shape[1]
    c_fill_columns(index.index.get()[0], coming, <const uint64_t*> path.view.buf, path.length(),
                   prompt_tokens, block_size, candidates, rows.length(), view, <int64_t*> out.view.buf)
    return <int64_t*> out.view.buf


def fill_columns(PrefixIndex index not None, PrefixIndex in_flight, keys, int64_t prompt_tokens,
                 int64_t block_size, rows, load, out):
    """Fill ``out``, shape (columns, candidates), for the candidate rows; see ``mulsched.indicators``."""
    fill(index, in_flight, words_of(keys), prompt_tokens, block_size, words_of(rows), load,
         words_of(out, PyBUF_WRITABLE, 2))


cdef int check_table(Words rows, Words out) except -1:
    if (out.length() != kColumns or rows.length() < 1
            or <size_t> out.view.shape[1] != rows.length()):
        raise ValueError("a table of shape (columns, candidates) expected")
    return 0


def charge_tiers(tiers, keys, int64_t prompt_tokens, int64_t block_size, rows, out):
    """Count in filled ``out`` what ``tiers``, pairs of index and cost ratio, hold; see ``mulsched.lower_tiers``."""
    cdef Words path = words_of(keys), candidates = words_of(rows), table = words_of(out, PyBUF_WRITABLE, 2)
    cdef const int64_t* values = <const int64_t*> candidates.view.buf
    cdef vector[CTier] asked
    cdef CTier tier
    cdef PrefixIndex index
    cdef size_t i
    check_table(candidates, table)
    for i in range(candidates.length()):
        if values[i] < (0 if i == 0 else values[i - 1]):
            raise ValueError(f"rows that ascend from 0 expected, got {values[i]} at position {i}")
    if prompt_tokens < 1 or block_size < 1:
        raise ValueError(f"at least one token a prompt and a block expected, got {prompt_tokens}, {block_size}")
    tiers = tuple(tiers)  # held, so that the indexes live
    for index, tier.cost_ratio in tiers:
        if index is None:
            raise TypeError("an index expected, got None")
        if not 0 <= tier.cost_ratio <= 1:
            raise ValueError(f"a cost ratio in 0..1 expected, got {tier.cost_ratio}")
        tier.index = index.index.get()
        asked.push_back(tier)
    c_charge_tiers(asked, <const uint64_t*> path.view.buf, path.length(), prompt_tokens, block_size, values,
                   candidates.length(), <int64_t*> table.view.buf)


def pick(int64_t prompt_tokens, rows, out, scores, FusedScore score not None, int64_t decision):
    """Fill ``scores`` from filled ``out``; return the position of the pick, or -1 if one is not finite."""
    cdef Words candidates = words_of(rows), table = words_of(out, PyBUF_SIMPLE, 2)
    cdef Words values = words_of(scores, PyBUF_WRITABLE)
    check_table(candidates, table)
    if values.length() != candidates.length():
        raise ValueError(f"{candidates.length()} candidates need as many scores, got {values.length()}")
    return c_score_and_pick(score.score, score.ties, score.seed, decision, prompt_tokens,
                            <const int64_t*> candidates.view.buf, <const int64_t*> table.view.buf,
                            candidates.length(), <double*> values.view.buf)


def select(PrefixIndex index not None, PrefixIndex in_flight, keys, int64_t prompt_tokens,
           int64_t block_size, rows, load, out, scores, FusedScore score not None, int64_t decision,
           occupancy):
    """Fill ``out`` and ``scores``; return the position of the pick, or -1 if a score is not finite.

    ``occupancy``, if it is native, is going to be asked about ``keys`` and ``out``.
    """
    cdef Words candidates = words_of(rows), values = words_of(scores, PyBUF_WRITABLE)
    cdef Words path = words_of(keys), columns = words_of(out, PyBUF_WRITABLE, 2)
    cdef const int64_t* table = fill(
        index, in_flight, path, prompt_tokens, block_size, candidates, load, columns)
    if values.length() != candidates.length():
        raise ValueError(f"{candidates.length()} candidates need as many scores, got {values.length()}")
    if type(occupancy) is Occupancy:
        (<Occupancy> occupancy).hand_over(keys, out, path, columns)
    return c_score_and_pick(score.score, score.ties, score.seed, decision, prompt_tokens,
                            <const int64_t*> candidates.view.buf, table, candidates.length(),
                            <double*> values.view.buf)


# -- failure detector -----------------------------------------------------------------------------------

cdef class Occupancy:
    """Load in flight by prefix class; the twin is OccupancyPy, the checks are FailureDetector's."""

    cdef unique_ptr[COccupancy] core
    cdef dict slots  # by request
    # what was looked at last: held, so that no other arrays get its addresses
    cdef object keys, table
    cdef Words path, columns

    def __cinit__(self, double confidence, double horizon):
        self.core.reset(new COccupancy(confidence, horizon))
        self.slots = {}

    @property
    def load(self):
        """The weight of all requests in flight."""
        return self.core.get().load()

    def nodes(self):
        """Return how many classes have a request in flight."""
        return self.core.get().nodes()

    def examine(self, keys, table, size_t loads):
        """Return depth, hash, load and holders of the class of which a copy is wanted, None without one."""
        cdef CCandidates candidates = self.look_at(keys, table, loads)
        return found_or_none(self.core.get().examine(
            <const uint64_t*> self.path.view.buf, self.path.length(), candidates))

    def dispatch(self, request_id, keys, table, size_t loads, double weight, size_t chosen):
        """Count a request in for a candidate; return what examine finds and the classes that left alarm, None for neither."""
        cdef CCandidates candidates
        cdef CClassFound found
        cdef vector[uint64_t] ended
        if request_id in self.slots:
            raise DuplicateRequest(f"request {request_id!r} is in flight already")
        candidates = self.look_at(keys, table, loads)
        if chosen >= candidates.n:
            raise ValueError(f"one of {candidates.n} candidates expected, got {chosen}")
        self.slots[request_id] = self.core.get().dispatch(
            <const uint64_t*> self.path.view.buf, self.path.length(), candidates, chosen, weight, found, ended)
        if found.depth == 0 and ended.size() == 0:
            return None
        return found_or_none(found), ended

    cdef int hand_over(self, object keys, object table, Words path, Words columns) except -1:
        """Take the buffers of a decision, to look at it next."""
        self.core.get().forget()
        self.keys, self.table, self.path, self.columns = keys, table, path, columns
        return 0

    cdef CCandidates look_at(self, object keys, object table, size_t loads) except *:
        cdef CCandidates candidates
        cdef Words columns
        if loads >= kColumns:
            raise ValueError(f"one of {kColumns} columns expected, got {loads}")
        if keys is not self.keys or table is not self.table:
            columns = words_of(table, PyBUF_SIMPLE, 2)
            if columns.length() != kColumns or columns.view.shape[1] < 1:
                raise ValueError(f"{kColumns} columns of candidates expected, got {columns.length()}")
            self.path = words_of(keys)
            self.columns, self.keys, self.table = columns, keys, table
        candidates.table = <const int64_t*> self.columns.view.buf
        candidates.loads, candidates.n = loads, <size_t> self.columns.view.shape[1]
        return candidates

    def first_token(self, request_id):
        """Count a copy of a prefix as made, if the request was sent for one."""
        slot = self.slots.get(request_id)
        if slot is not None:
            self.core.get().first_token(slot)

    def end(self, request_id):
        """Count a request out; return the classes that left alarm."""
        cdef vector[uint64_t] ended
        slot = self.slots.pop(request_id, None)
        if slot is None:
            return ()
        self.core.get().end(slot, ended)
        return ended if ended.size() > 0 else ()


cdef object found_or_none(const CClassFound& found):
    return None if found.depth == 0 else (found.depth, found.hash, found.load, found.holders)
