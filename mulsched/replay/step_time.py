"""Step times as formulas: how long an engine's step takes, from first principles or from a fit.

Every step time is a function of four numbers and of constants that are its attributes. Its arithmetic is
float64, in the order in which ``__call__`` writes it down, with ``+ - * /``, comparisons and list look-ups
only, so that another language can repeat it bit for bit. ``new_tokens`` and ``decode_batch`` are exact as
float64.
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

from mulsched.errors import InvalidArgument

__all__ = ["FittedStep", "MoeRoofline", "Roofline", "StepTime", "expert_shares"]


class StepTime(Protocol):
    """The time of one engine step, in seconds."""

    def __call__(
        self, new_tokens: int, prefix_tokens: float, decode_batch: int, decode_context: float
    ) -> float:
        """Return the seconds of a step.

        ``new_tokens`` are prefilled after ``prefix_tokens`` of context (their mean, weighted by tokens), and
        ``decode_batch`` requests make a token each with a mean context of ``decode_context`` tokens.
        A step time with a true attribute ``counts_pairs`` is given another prefix, with which
        ``new_tokens * (prefix_tokens + new_tokens / 2)`` is right for steps of several prompts too:
        ``pair_prefix_tokens`` of :class:`~mulsched.replay.step.StepLoad`.
        """


@dataclass(frozen=True, slots=True)
class Roofline:
    """Step time from first principles, for a dense decoder in bf16.

    ``seconds = overhead + max(weight_bytes / bandwidth, 2 * parameters * tokens / compute)
    + decode_batch * decode_context * kv_bytes / bandwidth
    + attention_flops * new_tokens * (prefix_tokens + new_tokens / 2) / compute``

    ``tokens`` counts prefilled and decoded ones. ``attention_flops`` = 4 * layers * heads * head size.
    Defaults: an 8B model (32 layers, 32 heads and 8 KV heads of 128) on one H100 SXM, 989 TFLOP/s and
    3.35 TB/s by its data sheet, of which 70 % and 75 % are reached and 1 ms a step is overhead (assumed).
    """

    counts_pairs: ClassVar[bool] = True
    parameters: float = 8e9
    kv_bytes: float = 131_072
    attention_flops: float = 4 * 32 * 4096
    compute: float = 0.70 * 989e12
    bandwidth: float = 0.75 * 3.35e12
    overhead_s: float = 0.001

    def __call__(
        self, new_tokens: int, prefix_tokens: float, decode_batch: int, decode_context: float
    ) -> float:
        """Return the seconds of a step."""
        tokens = new_tokens + decode_batch
        dense = max(
            2 * self.parameters / self.bandwidth,  # bf16: two bytes a parameter
            2 * self.parameters * tokens / self.compute,
        )
        decode = decode_batch * decode_context * self.kv_bytes / self.bandwidth
        prefill = self.attention_flops * new_tokens * (prefix_tokens + new_tokens / 2) / self.compute
        return self.overhead_s + dense + decode + prefill


@dataclass(frozen=True, slots=True)
class MoeRoofline:
    """Step time from first principles, for a mixture of experts in bf16.

    As :class:`Roofline`, but a token computes with ``active_parameters`` only, while a step reads
    ``2 * (shared_parameters + expert_share[tokens] * expert_parameters)`` bytes of weights: what every token
    uses, and the experts that its tokens choose. ``expert_share`` is what :func:`expert_shares` returns;
    steps of more tokens than it has entries read every expert.
    """

    counts_pairs: ClassVar[bool] = True
    active_parameters: float
    shared_parameters: float
    expert_parameters: float
    expert_share: tuple[float, ...]
    kv_bytes: float
    attention_flops: float
    compute: float
    bandwidth: float
    overhead_s: float = 0.001

    def __call__(
        self, new_tokens: int, prefix_tokens: float, decode_batch: int, decode_context: float
    ) -> float:
        """Return the seconds of a step."""
        tokens = new_tokens + decode_batch
        share = self.expert_share[tokens] if tokens < len(self.expert_share) else 1.0
        weights = self.shared_parameters + share * self.expert_parameters
        dense = max(2 * weights / self.bandwidth, 2 * self.active_parameters * tokens / self.compute)
        decode = decode_batch * decode_context * self.kv_bytes / self.bandwidth
        prefill = self.attention_flops * new_tokens * (prefix_tokens + new_tokens / 2) / self.compute
        return self.overhead_s + dense + decode + prefill


def expert_shares(experts: int, experts_per_token: int) -> tuple[float, ...]:
    """Return the expected share of a layer's experts that 0, 1, 2, ... tokens choose.

    ``1 - (1 - experts_per_token / experts) ** tokens``: every token chooses experts_per_token of them,
    independently and all alike. It ends where less than a hundredth of one expert is left. Real routers
    prefer some experts, so they touch fewer.
    """
    if not 1 <= experts_per_token <= experts:
        raise InvalidArgument(f"experts_per_token must lie in 1..{experts}, got {experts_per_token}")
    shares, untouched = [], 1.0
    while untouched * experts >= 0.01:
        shares.append(1.0 - untouched)
        untouched *= 1.0 - experts_per_token / experts
    return tuple(shares)


@dataclass(frozen=True, slots=True)
class FittedStep:
    """Step time as a sum of coefficients, for calibration against a real engine.

    ========================  =============================================================================
    coefficient, in seconds   for
    ========================  =============================================================================
    ``step_s``                every step: reading the weights, launching, scheduling
    ``decode_s``              every decoding request
    ``context_s``             every token of context that decoding requests read: batch * context
    ``prefill_s``             a step that prefills: engines run it without whole-step CUDA graphs
    ``new_token_s``           every new token
    ``attention_s``           every pair of a new token and one before it: new * (prefix + new / 2)
    ``mixed_decode_s``        every decoding request in a step that prefills: its attention runs in kernels
                              made for prefill
    ========================  =============================================================================

    Raises InvalidArgument unless all are finite and at least 0 and ``step_s`` is above 0.
    """

    counts_pairs: ClassVar[bool] = True
    step_s: float
    decode_s: float = 0.0
    context_s: float = 0.0
    prefill_s: float = 0.0
    new_token_s: float = 0.0
    attention_s: float = 0.0
    mixed_decode_s: float = 0.0

    def __post_init__(self) -> None:
        for coefficient in fields(self):
            value = getattr(self, coefficient.name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidArgument(f"{coefficient.name} must be finite and at least 0, got {value}")
        if self.step_s == 0:
            raise InvalidArgument("step_s must be above 0: a step takes time")

    def __call__(
        self, new_tokens: int, prefix_tokens: float, decode_batch: int, decode_context: float
    ) -> float:
        """Return the seconds of a step."""
        decode = self.decode_s * decode_batch + self.context_s * (decode_batch * decode_context)
        if new_tokens == 0:
            return self.step_s + decode
        pairs = new_tokens * (prefix_tokens + new_tokens / 2)
        prefill = self.prefill_s + self.new_token_s * new_tokens + self.attention_s * pairs
        return self.step_s + decode + prefill + self.mixed_decode_s * decode_batch
