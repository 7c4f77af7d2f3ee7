"""Profiles: how long an engine's step takes, and how much the engine holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mulsched.errors import InvalidArgument
from mulsched.replay.capacity import GPUS, MODELS, Gpu, ModelShape, kv_blocks
from mulsched.replay.step_table import StepTable, read_step_table
from mulsched.replay.step_time import MoeRoofline, Roofline, StepTime, expert_shares

__all__ = [
    "BUILTIN_PROFILES",
    "Profile",
    "Roofline",
    "StepTable",
    "StepTime",
    "builtin_profile",
    "load_profile",
    "roofline",
]


@dataclass(frozen=True, slots=True)
class Profile:
    """An engine: its step time and its limits.

    ``max_batched_tokens``: tokens per step, 4,096 as in the LMetric paper's set-up. ``max_num_seqs``:
    requests running at a time, 256, vLLM's default. ``kv_blocks``: blocks of ``block_size`` tokens in the KV
    cache; 26,000 is what 0.9 of 80 GB leaves beside an 8B model in bf16 at 131,072 bytes a token.
    ``watermark_ratio`` of the blocks stays free when a request is admitted beside others, 0 as in vLLM.
    ``schedules_ahead``: a step is planned while the one before runs (vLLM's asynchronous scheduling), so a
    request joins the second step after its arrival; False, as figures of replays are of.
    Raises InvalidArgument for a limit below 1, a watermark not in [0, 1), and a token budget that does not
    cover a token for each of ``max_num_seqs`` requests, which vLLM refuses too.
    """

    name: str
    step_time: StepTime
    block_size: int = 16
    max_batched_tokens: int = 4096
    max_num_seqs: int = 256
    kv_blocks: int = 26_000
    watermark_ratio: float = 0.0
    schedules_ahead: bool = False

    def __post_init__(self) -> None:
        for limit in ("block_size", "max_batched_tokens", "max_num_seqs", "kv_blocks"):
            if getattr(self, limit) < 1:
                raise InvalidArgument(f"{limit} must be at least 1, got {getattr(self, limit)}")
        if self.max_batched_tokens < self.max_num_seqs:
            raise InvalidArgument(
                f"max_batched_tokens must be at least max_num_seqs, got {self.max_batched_tokens} and "
                f"{self.max_num_seqs}"
            )
        if not 0 <= self.watermark_ratio < 1:
            raise InvalidArgument(f"watermark_ratio must lie in [0, 1), got {self.watermark_ratio}")

    def limits(self, kv_blocks: int) -> tuple[int, int, int, int, int, bool]:
        """Return block size, ``kv_blocks``, tokens a step, sequences, watermark, ``schedules_ahead``."""
        return (
            self.block_size,
            kv_blocks,
            self.max_batched_tokens,
            self.max_num_seqs,
            int(self.watermark_ratio * kv_blocks),
            self.schedules_ahead,
        )


def roofline(model: ModelShape, gpu: Gpu) -> Roofline | MoeRoofline:
    """Return the step time of a model on one GPU, with the shares of its data sheet that Roofline assumes."""
    compute, bandwidth = 0.70 * gpu.flops_per_s, 0.75 * gpu.bytes_per_s
    if model.experts == 0:
        return Roofline(model.parameters, model.kv_bytes(), model.attention_flops, compute, bandwidth)
    shared = model.parameters - model.expert_parameters
    return MoeRoofline(
        active_parameters=shared + model.expert_parameters * model.experts_per_token / model.experts,
        shared_parameters=shared,
        expert_parameters=model.expert_parameters,
        expert_share=expert_shares(model.experts, model.experts_per_token),
        kv_bytes=model.kv_bytes(),
        attention_flops=model.attention_flops,
        compute=compute,
        bandwidth=bandwidth,
    )


def _on_h20(name: str, model: str) -> Profile:
    shape, gpu = MODELS[model], GPUS["H20-96GB"]
    return Profile(name, roofline(shape, gpu), kv_blocks=kv_blocks(shape, gpu.memory_bytes))


_BUILTIN: Mapping[str, Callable[[str], Profile]] = {
    "builtin-8b": lambda name: Profile(name, Roofline()),
    "qwen2-7b-h20": lambda name: _on_h20(name, "Qwen2-7B"),
    "qwen3-30b-a3b-h20": lambda name: _on_h20(name, "Qwen3-30B-A3B"),
}
BUILTIN_PROFILES = tuple(_BUILTIN)
"""Names of the built-in profiles."""


def builtin_profile(name: str = "builtin-8b") -> Profile:
    """Return a profile that needs no file.

    ``builtin-8b``: :class:`Roofline` with its defaults, what replay uses when it is given nothing else.
    ``qwen2-7b-h20`` and ``qwen3-30b-a3b-h20``: the models of the LMetric paper on its GPU, by
    :func:`roofline` and :func:`~mulsched.replay.capacity.kv_blocks`; not measured.
    Raises InvalidArgument for another name.
    """
    if name not in _BUILTIN:
        raise InvalidArgument(f"built-in profiles are {', '.join(BUILTIN_PROFILES)}, got {name!r}")
    return _BUILTIN[name](name)


def load_profile(path: str | Path, *, kv_blocks: int = 26_000) -> Profile:
    """Return a profile with the step table of a CSV file, see :func:`read_step_table` in step_table.

    Raises ProfileError (file and line), FileNotFoundError.
    """
    return Profile(Path(path).stem, read_step_table(path), kv_blocks=kv_blocks)
