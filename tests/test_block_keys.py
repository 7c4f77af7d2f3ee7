"""Block keys: the hash, the conversions, namespaces. Both twins, and the xxhash package as the judge."""

import array
import ctypes
import random
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from backends import BACKENDS
from hypothesis import given
from hypothesis import strategies as st

from mulsched import Namespace, _block_keys_py, block_keys, text_block_keys
from mulsched.block_keys import DEFAULT_SEED, engine_hash, namespace_seed
from mulsched.errors import InvalidArgument, InvalidTokens, InvalidType


def twin(name):
    if name == "python":
        return _block_keys_py
    from mulsched import _native

    return _native


@pytest.fixture(params=BACKENDS)
def hashing(request):
    return twin(request.param)


def judge(tokens, block_size, seed):
    return [
        xxhash.xxh3_64_intdigest(np.array(tokens[i : i + block_size], dtype="<u4").tobytes(), seed=seed)
        for i in range(0, len(tokens) // block_size * block_size, block_size)
    ]


# -- the hash -------------------------------------------------------------------------------------------------

if "native" in BACKENDS:

    def test_the_native_hash_is_xxh3_for_every_length_and_random_seeds():
        from mulsched._native import xxh3_64

        rng = random.Random(20)
        for length in range(1101):
            data = rng.randbytes(length)
            for seed in (0, DEFAULT_SEED, rng.getrandbits(64), 2**64 - 1):
                assert xxhash.xxh3_64_intdigest(data, seed=seed) == xxh3_64(data, seed), (length, seed)


def test_known_vectors_of_the_convention():
    # XXH3-64, seed 1337, of little-endian uint32: what Dynamo and smg call the local block hash
    assert block_keys([1, 2, 3, 4], 4).tolist() == [
        xxhash.xxh3_64_intdigest(bytes.fromhex("01000000020000000300000004000000"), seed=1337)
    ]
    assert block_keys(list(range(16)), 16)[0] == 15310707395893867146


# -- conversions ----------------------------------------------------------------------------------------------


class OwnInteger:
    """A token that is an integer by __index__ alone, as a scalar of another array library may be."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


TOKENS = [0, 1, 7, 2**31 - 1, 5, 6, 100_000, 3, 9, 8]

FORMS = {
    "list": list,
    "tuple": tuple,
    "int32": lambda t: np.array(t, dtype=np.int32),
    "uint32": lambda t: np.array(t, dtype=np.uint32),
    "int64": lambda t: np.array(t, dtype=np.int64),
    "uint64": lambda t: np.array(t, dtype=np.uint64),
    "array_i": lambda t: array.array("i", t),
    "array_I": lambda t: array.array("I", t),
    "array_l": lambda t: array.array("l", t),
    "array_q": lambda t: array.array("q", t),
    "array_Q": lambda t: array.array("Q", t),
    "memoryview": lambda t: memoryview(array.array("I", t)),
    "strided": lambda t: np.repeat(np.array(t, dtype=np.int64), 3)[::3],
    "reversed": lambda t: np.array(t[::-1], dtype=np.int32)[::-1],
    "numpy_scalars": lambda t: [np.int64(x) for x in t],
    "own_integers": lambda t: [OwnInteger(x) for x in t],
    "little_endian": lambda t: np.array(t, dtype="<i4"),
    "read_only": lambda t: np.frombuffer(np.array(t, dtype=np.uint32).tobytes(), dtype=np.uint32),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_tokens_gives_the_same_keys(hashing, form):
    keys = hashing.hash_blocks(FORMS[form](TOKENS), 4, 99)
    assert keys.tolist() == judge(TOKENS, 4, 99)
    assert keys.dtype == np.uint64


@pytest.mark.parametrize("block_size", [1, 15, 16, 17, 32, 64])
def test_a_key_is_the_hash_of_its_block_at_every_size(hashing, block_size):
    tokens = list(range(200, 400))
    assert hashing.hash_blocks(tokens, block_size, 7).tolist() == judge(tokens, block_size, 7)


@pytest.mark.parametrize("form", ["list", "uint32", "int64", "uint64"])
def test_tokens_reach_up_to_32_bits(hashing, form):
    tokens = [2**32 - 1, 2**31, 0, 1]
    assert hashing.hash_blocks(FORMS[form](tokens), 2, 0).tolist() == judge(tokens, 2, 0)


def test_a_partial_block_at_the_end_has_no_key(hashing):
    assert len(hashing.hash_blocks(TOKENS, 4, 0)) == 2
    assert len(hashing.hash_blocks(TOKENS, 11, 0)) == 0
    assert len(hashing.hash_blocks(TOKENS, 10, 0)) == 1
    assert hashing.hash_blocks([], 4, 0).tolist() == []
    assert hashing.hash_blocks(np.empty(0, dtype=np.int32), 4, 0).tolist() == []


REFUSED = [
    ([1, 2, 3, -1], InvalidTokens, "tokens must lie in 0..2**32-1, got -1 at position 3"),
    ((5, 2**32), InvalidTokens, "tokens must lie in 0..2**32-1, got 4294967296 at position 1"),
    ([10**30], InvalidTokens, f"tokens must lie in 0..2**32-1, got {10**30} at position 0"),
    ([7, OwnInteger(-2)], InvalidTokens, "tokens must lie in 0..2**32-1, got -2 at position 1"),
    ([1, 2, "x"], InvalidType, "tokens must be integers, got str at position 2"),
    ([1, 2.0], InvalidType, "tokens must be integers, got float at position 1"),
    ([True], InvalidType, "tokens must be integers, got bool at position 0"),
    ([None], InvalidType, "tokens must be integers, got NoneType at position 0"),
    (np.array([1, -7], dtype=np.int32), InvalidTokens, "got -7 at position 1"),
    (np.array([1, 2**32], dtype=np.int64), InvalidTokens, "got 4294967296 at position 1"),
    (np.array([2**64 - 1], dtype=np.uint64), InvalidTokens, "got 18446744073709551615 at position 0"),
    (np.array([1.0]), InvalidType, "32-bit or 64-bit native integers, got buffer format 'd'"),
    (np.array([1], dtype=np.int16), InvalidType, "got buffer format 'h'"),
    (np.array([1], dtype=">i4"), InvalidType, "got buffer format '>i'"),
    (b"abcd", InvalidType, "got buffer format 'B'"),
    (np.array([True]), InvalidType, "got buffer format '?'"),
    (np.array(5), InvalidArgument, "tokens must have one dimension, got 0"),
    (np.zeros((2, 2), dtype=np.int32), InvalidArgument, "tokens must have one dimension, got 2"),
    ("text", InvalidType, "tokens must be a list, tuple, array or buffer of integers, got str"),
    (None, InvalidType, "tokens must be a list, tuple, array or buffer of integers, got NoneType"),
    (iter([1]), InvalidType, "got list_iterator"),
]


@pytest.mark.parametrize(("tokens", "error", "message"), REFUSED)
def test_what_is_no_token_is_named_with_its_place(hashing, tokens, error, message):
    with pytest.raises(error) as caught:
        hashing.hash_blocks(tokens, 1, 0)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_size": 0}, InvalidArgument, "block_size must be at least 1, got 0"),
        ({"block_size": -3}, InvalidArgument, "block_size must be at least 1, got -3"),
        ({"block_size": True}, InvalidType, "block_size must be an int, got bool"),
        ({"block_size": 1.5}, InvalidType, "block_size must be an int, got float"),
        ({"block_size": "16"}, InvalidType, "block_size must be an int, got str"),
        ({"seed": -1}, InvalidArgument, r"seed must lie in 0..2\*\*64-1, got -1"),
        ({"seed": 2**64}, InvalidArgument, "seed must lie in"),
        ({"seed": 1.0}, InvalidType, "seed must be an int, got float"),
        ({"namespace": "lora"}, InvalidType, "namespace must be a Namespace or None, got str"),
        ({"namespace": Namespace(lora=5)}, InvalidType, "lora of a namespace must be a str or None, got int"),
        ({"extra_keys": [None]}, InvalidArgument, "2 blocks need as many extra_keys, got 1"),
        ({"extra_keys": 2}, InvalidType, "sequence of bytes or None, got int"),
        ({"namespace": Namespace(lora="a\ud800")}, InvalidArgument, "lora .* lone surrogate at 1"),
        ({"namespace": Namespace(cache_salt="\ud800")}, InvalidArgument, "cache_salt .* lone surrogate at 0"),
        ({"extra_keys": [None, "img"]}, InvalidType, "bytes or None, got str at position 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        block_keys(TOKENS[:8], **({"block_size": 4} | arguments))


# -- namespaces -----------------------------------------------------------------------------------------------


def test_an_adapters_seed_is_the_convention_of_dynamo_and_smg():
    expected = (1337 + xxhash.xxh3_64_intdigest(b"my-lora")) % 2**64
    assert namespace_seed(Namespace(lora="my-lora")) == expected
    assert block_keys(TOKENS, 4, namespace=Namespace(lora="my-lora")).tolist() == judge(TOKENS, 4, expected)


def test_an_empty_namespace_is_none():
    assert namespace_seed(Namespace()) == namespace_seed(None) == DEFAULT_SEED


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Namespace(lora="ab", model="c"), Namespace(lora="a", model="bc")),
        (Namespace(model="a"), Namespace(cache_salt="a")),
        (Namespace(model=""), Namespace()),
        (Namespace(lora="a", model=""), Namespace(lora="a")),
    ],
)
def test_namespaces_that_read_alike_have_different_seeds(one, other):
    assert namespace_seed(one) != namespace_seed(other)


NAMES = st.none() | st.sampled_from(["", "a", "b", "ab", "aba", "b\x00a"])
SPACES = st.builds(Namespace, lora=NAMES, model=NAMES, cache_salt=NAMES)


@given(SPACES, SPACES)
def test_different_namespaces_never_match(one, other):
    same = (block_keys(TOKENS, 2, namespace=one) == block_keys(TOKENS, 2, namespace=other)).tolist()
    unsalted = replace(one, cache_salt=None) == replace(other, cache_salt=None)
    assert same == [one == other] + [unsalted] * 4


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda tokens: array.array("i", tokens), memoryview])
def test_a_salt_is_in_the_first_key_alone_whatever_holds_the_tokens(kind):
    tokens = kind(np.array(TOKENS, dtype=np.uint32) if kind is memoryview else TOKENS)
    salted = block_keys(tokens, 2, namespace=Namespace(cache_salt="s")).tolist()
    expected = (
        judge(TOKENS[:2], 2, namespace_seed(Namespace(cache_salt="s"))) + judge(TOKENS, 2, DEFAULT_SEED)[1:]
    )
    assert salted == expected


def test_a_salt_is_in_the_first_key_of_a_text_alone():
    plain, salted = (
        text_block_keys("abcdef", 2, namespace=ns).tolist() for ns in (None, Namespace(cache_salt="s"))
    )
    assert salted[0] != plain[0]
    assert salted[1:] == plain[1:]


def test_multimodal_content_tells_equal_tokens_apart():
    plain, image, other = (
        block_keys([7] * 8, 4, extra_keys=extra).tolist()
        for extra in ([None, None], [None, b"x"], [None, b"y"])
    )
    assert plain[0] == image[0] == other[0]
    assert len({plain[1], image[1], other[1]}) == 3
    assert image[1] == xxhash.xxh3_64_intdigest(b"x", seed=plain[1])


# -- text -----------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(TEXT, st.integers(1, 9), st.integers(0, 2**64 - 1))
def test_text_is_cut_by_characters_and_hashed_as_utf_8(text, size, seed):
    expected = [
        xxhash.xxh3_64_intdigest(text[i : i + size].encode(), seed=seed)
        for i in range(0, len(text) // size * size, size)
    ]
    for name in BACKENDS:
        assert twin(name).hash_text_blocks(text, size, seed).tolist() == expected


@pytest.mark.parametrize("text", ["plain ascii!", "ééééàààà", "漢字漢字漢字漢字", "😀😁😂😃a漢é."])
def test_characters_of_one_to_four_bytes_are_one_character(hashing, text):
    assert len(hashing.hash_text_blocks(text, 4, 0)) == len(text) // 4
    assert hashing.hash_text_blocks(text, 4, 0)[0] == xxhash.xxh3_64_intdigest(text[:4].encode())


@pytest.mark.parametrize(
    ("text", "size", "error", "message"),
    [
        (b"bytes", 4, InvalidType, "text must be a str, got bytes"),
        (None, 4, InvalidType, "text must be a str, got NoneType"),
        ("text", 0, InvalidArgument, "block_chars must be at least 1, got 0"),
        ("text", None, InvalidType, "block_chars must be an int, got NoneType"),
        ("ab\ud800cd", 1, InvalidArgument, "valid Unicode, got a lone surrogate at 2"),
    ],
)
def test_bad_text_is_refused(text, size, error, message):
    with pytest.raises(error, match=message):
        text_block_keys(text, size)


# -- engine hashes --------------------------------------------------------------------------------------------


def test_engine_hashes_keep_their_bits_or_are_hashed():
    assert engine_hash(5) == 5
    assert engine_hash(-1) == 2**64 - 1
    assert engine_hash(2**64 - 1) == 2**64 - 1
    assert engine_hash(np.uint64(7)) == 7
    assert engine_hash(b"sha") == xxhash.xxh3_64_intdigest(b"sha")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (2**64, InvalidArgument),
        (-(2**63) - 1, InvalidArgument),
        ("a", InvalidType),
        (1.0, InvalidType),
        (True, InvalidType),
    ],
)
def test_what_is_no_engine_hash_is_refused(value, error):
    with pytest.raises(error):
        engine_hash(value)


# -- parity ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(-2, 2**32 + 1) | st.integers(0, 50_000), max_size=60),
    st.integers(1, 20),
    st.integers(0, 2**64 - 1),
)
def test_the_twins_agree_on_keys_and_on_what_they_refuse(tokens, size, seed):
    said = []
    for name in BACKENDS:
        for form in (list, lambda t: np.array(t, dtype=np.int64)):
            try:
                said.append(twin(name).hash_blocks(form(tokens), size, seed).tolist())
            except InvalidTokens as error:
                said.append(str(error))
    assert all(answer == said[0] for answer in said)


@pytest.mark.parametrize("tokens", [tokens for tokens, _, _ in REFUSED])
def test_the_twins_refuse_in_the_same_words(tokens):
    said = set()
    for name in BACKENDS:
        with pytest.raises((InvalidArgument, InvalidType)) as caught:
            twin(name).hash_blocks(tokens, 1, 0)
        said.add((caught.type, str(caught.value)))
    assert len(said) == 1


# -- odd callers ----------------------------------------------------------------------------------------------


def test_buffers_without_strides_and_unaligned_ones_are_read(hashing):
    words = (ctypes.c_uint32 * 10)(*TOKENS)
    assert hashing.hash_blocks(words, 4, 99).tolist() == judge(TOKENS, 4, 99)
    for dtype in (np.int32, np.int64):
        shifted = bytearray(1) + np.array(TOKENS, dtype=dtype).tobytes()
        view = np.frombuffer(shifted, dtype=dtype, offset=1)
        assert hashing.hash_blocks(view, 4, 99).tolist() == judge(TOKENS, 4, 99)


def test_a_list_that_lies_about_its_length_is_read_as_long_as_it_is(hashing):
    class Liar(list):
        def __len__(self):
            return 3

    assert hashing.hash_blocks(Liar(TOKENS), 5, 1).tolist() == judge(TOKENS, 5, 1)


def test_tokens_that_shrink_their_list_while_read_do_no_harm(hashing):
    class Shrinking:
        def __init__(self, owner):
            self.owner = owner

        def __index__(self):
            self.owner.clear()
            return 7

    tokens = [1, 2, 3]
    tokens.append(Shrinking(tokens))
    assert hashing.hash_blocks(tokens, 4, 0).tolist() == judge([1, 2, 3, 7], 4, 0)


def test_subclasses_of_str_are_text():
    assert text_block_keys(np.str_("abcd"), 2).tolist() == text_block_keys("abcd", 2).tolist()


@pytest.mark.parametrize("size", [2**63, 2**64, 10**30])
def test_sizes_beyond_63_bits_are_refused(size):
    with pytest.raises(InvalidArgument, match=r"block_size must be below 2\*\*63"):
        block_keys([1, 2], size)
    with pytest.raises(InvalidArgument, match=r"block_chars must be below 2\*\*63"):
        text_block_keys("ab", size)
