"""How much KV an engine holds: shapes of models, figures of GPUs, and the blocks they leave."""

from collections.abc import Mapping
from dataclasses import dataclass

from mulsched.errors import InvalidArgument

__all__ = ["GPUS", "MODELS", "Gpu", "ModelShape", "kv_blocks"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a decoder decides its memory and its work.

    ``parameters`` are all, embeddings included; of them ``expert_parameters`` lie in ``experts`` routed
    experts per layer, of which a token uses ``experts_per_token`` (all three 0: a dense model).
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    parameters: int
    experts: int = 0
    experts_per_token: int = 0
    expert_parameters: int = 0

    @property
    def attention_flops(self) -> int:
        """Floating-point operations for a token and one before it: two products of queries and KV."""
        return 4 * self.layers * self.heads * self.head_size

    def kv_bytes(self, *, dtype_bytes: int = 2, tensor_parallel: int = 1) -> int:
        """Return the bytes of a token's keys and values on one GPU.

        ``2 * layers * heads on the GPU * head_size * dtype_bytes``; heads that are fewer than the GPUs are
        copied. Raises InvalidArgument if neither of kv_heads and tensor_parallel divides the other.
        """
        large, small = max(self.kv_heads, tensor_parallel), min(self.kv_heads, tensor_parallel)
        if small < 1 or large % small:
            raise InvalidArgument(
                f"tensor_parallel must divide the {self.kv_heads} KV heads of {self.name} or be a multiple "
                f"of them, got {tensor_parallel}"
            )
        return 2 * self.layers * max(1, self.kv_heads // tensor_parallel) * self.head_size * dtype_bytes


def _moe(layers: int, hidden: int, intermediate: int, experts: int) -> int:
    """Parameters of all routed experts: three matrices each."""
    return layers * experts * 3 * hidden * intermediate


_SHAPES = (
    # from config.json of the model's page on Hugging Face; parameters are computed from it, norms included
    ModelShape("Qwen2-7B", 28, 28, 4, 128, 7_615_616_512),  # Qwen/Qwen2-7B
    ModelShape("Qwen3-8B", 36, 32, 8, 128, 8_190_735_360),  # Qwen/Qwen3-8B
    ModelShape("Qwen3-32B", 64, 64, 8, 128, 32_762_123_264),  # Qwen/Qwen3-32B
    ModelShape("Llama-3.1-8B", 32, 32, 8, 128, 8_030_261_248),  # meta-llama/Llama-3.1-8B
    ModelShape("Llama-3.1-70B", 80, 64, 8, 128, 70_553_706_496),  # meta-llama/Llama-3.1-70B
    ModelShape(  # Qwen/Qwen3-30B-A3B: 128 experts of 2,048 x 768 in each layer, 8 of them a token
        "Qwen3-30B-A3B", 48, 32, 4, 128, 30_532_122_624, 128, 8, _moe(48, 2048, 768, 128)
    ),
)
MODELS: Mapping[str, ModelShape] = {shape.name: shape for shape in _SHAPES}
"""Models by name."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: dense bf16 operations and bytes per second by its data sheet, bytes as its driver reports."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    memory_bytes: int


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("H20-96GB", 148e12, 4.0e12, 97_871 * 2**20),
        Gpu("H100-80GB", 989e12, 3.35e12, 81_559 * 2**20),  # SXM
        Gpu("RTX-4090-24GB", 165.2e12, 1.008e12, 24_564 * 2**20),
        Gpu("RTX-PRO-6000-96GB", 503.8e12, 1.792e12, 97_887 * 2**20),  # Blackwell
    )
}
"""GPUs by name; memory as ``nvidia-smi`` lists it."""


def kv_blocks(
    model: ModelShape,
    gpu_memory_bytes: float,
    *,
    utilisation_ratio: float = 0.9,
    tensor_parallel: int = 1,
    block_size: int = 16,
    weight_dtype_bytes: float = 2,
    kv_dtype_bytes: int = 2,
    reserved_bytes: float = 1.5e9,
) -> int:
    """Return the blocks of ``block_size`` tokens that fit beside a model, as vLLM counts them.

    ``(utilisation * memory - parameters * weight_dtype_bytes / tensor_parallel - reserved) / (block_size *
    bytes of a token on one GPU)``, rounded down. ``utilisation_ratio`` 0.9: vLLM's gpu_memory_utilization.
    ``reserved_bytes`` are activations and CUDA graphs, which vLLM measures when it starts: 1.5 GB fits
    Llama-3.1-8B on a 24 GB RTX 4090, whose recorded run held 2,620 blocks (docs/validation.md), within 2 %.
    ``tensor_parallel`` GPUs share the weights evenly; what each copies (norms) is left out.

    Raises InvalidArgument for an argument out of range and for a model that leaves no room for a block.
    """
    if not 0 < utilisation_ratio <= 1:
        raise InvalidArgument(f"utilisation_ratio must lie in (0, 1], got {utilisation_ratio}")
    if tensor_parallel < 1 or block_size < 1:
        raise InvalidArgument(
            f"tensor_parallel and block_size must be at least 1, got {tensor_parallel} and {block_size}"
        )
    if weight_dtype_bytes <= 0 or kv_dtype_bytes < 1 or reserved_bytes < 0:
        raise InvalidArgument(
            "weight_dtype_bytes must be above 0, kv_dtype_bytes at least 1, reserved_bytes at least 0, "
            f"got {weight_dtype_bytes}, {kv_dtype_bytes}, {reserved_bytes}"
        )
    weights = model.parameters * weight_dtype_bytes / tensor_parallel
    left = utilisation_ratio * gpu_memory_bytes - weights - reserved_bytes
    blocks = left // (
        block_size * model.kv_bytes(dtype_bytes=kv_dtype_bytes, tensor_parallel=tensor_parallel)
    )
    if not blocks >= 1:  # NaN memory too
        raise InvalidArgument(
            f"{model.name} does not fit: {utilisation_ratio:g} of {gpu_memory_bytes / 1e9:.1f} GB is to hold "
            f"{weights / 1e9:.1f} GB of weights and {reserved_bytes / 1e9:.1f} GB of activations on each of "
            f"{tensor_parallel} GPUs, which leaves no block"
        )
    return int(blocks)
