"""KV blocks that a GPU leaves beside a model."""

import math

import pytest

from mulsched.errors import InvalidArgument
from mulsched.replay.capacity import GPUS, MODELS, ModelShape, kv_blocks

# from config.json: vocabulary, hidden size, intermediate size, query and key norms, biases of q, k and v
CONFIGS = {
    "Qwen2-7B": (152_064, 3584, 18_944, False, True),
    "Qwen3-8B": (151_936, 4096, 12_288, True, False),
    "Qwen3-32B": (151_936, 5120, 25_600, True, False),
    "Llama-3.1-8B": (128_256, 4096, 14_336, False, False),
    "Llama-3.1-70B": (128_256, 8192, 28_672, False, False),
    "Qwen3-30B-A3B": (151_936, 2048, 768, True, False),
}
TINY = ModelShape("tiny", layers=2, heads=4, kv_heads=2, head_size=8, parameters=1000)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_published_configuration(name):
    shape = MODELS[name]
    vocabulary, hidden, intermediate, norms, biases = CONFIGS[name]
    width = shape.heads + 2 * shape.kv_heads
    attention = hidden * shape.head_size * (width + shape.heads)
    attention += norms * 2 * shape.head_size + biases * width * shape.head_size
    experts = max(1, shape.experts)
    mlp = experts * 3 * hidden * intermediate
    router = shape.experts * hidden
    total = 2 * vocabulary * hidden + hidden + shape.layers * (attention + mlp + router + 2 * hidden)
    assert shape.parameters == total
    assert shape.expert_parameters == (shape.layers * mlp if shape.experts else 0)


def test_blocks_are_what_memory_leaves_over_bytes_a_block():
    # two layers, two heads of 8, keys and values in two bytes: 128 bytes a token, 2,048 a block
    assert TINY.kv_bytes() == 128
    assert kv_blocks(TINY, 50_000, reserved_bytes=3000) == (45_000 - 2000 - 3000) // 2048


def test_an_8b_model_on_80_gb_leaves_what_the_default_profile_says():
    assert kv_blocks(MODELS["Llama-3.1-8B"], 80e9) == pytest.approx(26_000, rel=0.01)


def test_tensor_parallel_shares_weights_and_heads():
    alone, two = (
        kv_blocks(TINY, 1e6, reserved_bytes=0),
        kv_blocks(TINY, 1e6, reserved_bytes=0, tensor_parallel=2),
    )
    assert alone == (900_000 - 2000) // 2048
    assert two == (900_000 - 1000) // 1024


def test_heads_fewer_than_gpus_are_copied():
    assert TINY.kv_bytes(tensor_parallel=8) == TINY.kv_bytes(tensor_parallel=2)


def test_smaller_types_hold_more():
    blocks = kv_blocks(TINY, 1e6, reserved_bytes=0, weight_dtype_bytes=1, kv_dtype_bytes=1)
    assert blocks == (900_000 - 1000) // 1024


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(
        InvalidArgument, match=r"Llama-3.1-70B does not fit: 0.9 of 85.5 GB is to hold 141.1 GB of weights"
    ):
        kv_blocks(MODELS["Llama-3.1-70B"], GPUS["H100-80GB"].memory_bytes)


@pytest.mark.parametrize("memory", [math.nan, -1, 0])
def test_no_memory_holds_no_model(memory):
    with pytest.raises(InvalidArgument, match="tiny does not fit"):
        kv_blocks(TINY, memory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"utilisation_ratio": 0}, r"utilisation_ratio must lie in \(0, 1\], got 0"),
        ({"utilisation_ratio": 1.1}, r"utilisation_ratio must lie in \(0, 1\], got 1.1"),
        ({"tensor_parallel": 0}, "tensor_parallel and block_size must be at least 1, got 0 and 16"),
        ({"tensor_parallel": 3}, "tensor_parallel must divide the 2 KV heads of tiny or be a multiple"),
        ({"block_size": 0}, "tensor_parallel and block_size must be at least 1, got 1 and 0"),
        ({"kv_dtype_bytes": 0}, "kv_dtype_bytes at least 1"),
        ({"weight_dtype_bytes": 0}, "weight_dtype_bytes must be above 0"),
        ({"reserved_bytes": -1}, "reserved_bytes at least 0"),
    ],
)
def test_arguments_are_in_range(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        kv_blocks(TINY, 1e9, **arguments)
