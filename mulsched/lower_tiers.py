"""What instances hold below the GPU, and what loading it costs.

An engine that finds the first ``a`` blocks of a prompt on its GPU asks the next tier for the blocks from
``a`` on, and loads as many as that holds without a gap (vLLM: ``get_num_new_matched_tokens`` of a connector;
Dynamo's router asks tier after tier, each from where the one before ended, and so do we, the cheapest first).
So a block that lies below the GPU only, in front of one that lies on it, ends the GPU's part, and all that
follows is asked of the lower tiers.

With ratio_t, the cost of loading a token from tier t relative to computing it, and loaded_t tokens to load:

    lower_tier_tokens  = sum of loaded_t
    new_prefill_tokens = L - hit_tokens - lower_tier_tokens + ceil(sum of ratio_t * loaded_t)

The matches themselves stay unweighted: a token is computed, or it is loaded at its price. Since ratios are at
most 1, a block more in any tier, or in a cheaper one, never raises ``new_prefill_tokens``.
"""

import math
from collections.abc import Mapping

import numpy as np

from mulsched.errors import InvalidArgument, InvalidType, UnknownBlock
from mulsched.indicators import Columns, charge_tiers
from mulsched.prefix_index import PrefixIndex
from mulsched.types import EngineHash, Keys

__all__ = ["LowerTiers", "check_cost_ratios"]


def check_cost_ratios(tier_cost_ratio: Mapping[str, float] | None) -> dict[str, float]:
    """Return the ratios by medium, the cheapest first. Raises InvalidType, InvalidArgument."""
    if tier_cost_ratio is None:
        return {}
    if not isinstance(tier_cost_ratio, Mapping):
        raise InvalidType(f"tier_cost_ratio must map media to numbers, got {type(tier_cost_ratio).__name__}")
    for medium, ratio in tier_cost_ratio.items():
        if not isinstance(medium, str):
            raise InvalidType(f"a medium in tier_cost_ratio must be a str, got {type(medium).__name__}")
        if medium == "GPU" or not medium or medium != medium.upper():
            raise InvalidArgument(
                f"a medium in tier_cost_ratio must be another than GPU, in capitals, got {medium!r}"
            )
        if isinstance(ratio, bool) or not isinstance(ratio, int | float | np.integer | np.floating):
            raise InvalidType(f"the cost ratio of {medium} must be a number, got {type(ratio).__name__}")
        if not (math.isfinite(ratio) and 0 <= ratio <= 1):
            raise InvalidArgument(
                f"the cost ratio of {medium} must lie in 0..1, got {ratio}: a tier that is slower than "
                "computing is left out"
            )
    return {
        medium: float(ratio) for medium, ratio in sorted(tier_cost_ratio.items(), key=lambda item: item[1])
    }


class LowerTiers:
    """An index for each tier, from the cheapest to the dearest.

    Its rows are those of the router's own index, since instances are added to and removed from all alike.
    """

    def __init__(self, cost_ratios: Mapping[str, float]) -> None:
        self.cost_ratios = dict(cost_ratios)
        self.indexes = {medium: PrefixIndex() for medium in cost_ratios}
        self._tiers = [(index.backend, cost_ratios[medium]) for medium, index in self.indexes.items()]

    def add_instance(self, instance: str) -> None:
        """Add an instance that holds nothing."""
        for index in self.indexes.values():
            index.add_instance(instance, engine_hashes=True)

    def remove_instance(self, instance: str) -> None:
        """Forget an instance."""
        for index in self.indexes.values():
            index.remove_instance(instance)

    def clear(self, instance: str) -> None:
        """Drop what the instance holds in any tier."""
        for index in self.indexes.values():
            index.clear(instance)

    def store(
        self,
        medium: str,
        instance: str,
        keys: Keys,
        *,
        parent: EngineHash | None,
        engine_hashes: Keys,
        counts_copies: bool,
        gpu: PrefixIndex,
    ) -> None:
        """Hold blocks in a tier, after a block that any tier or ``gpu`` knows as ``parent``.

        Engines name blocks alike on all media, and a lower tier need not hold what comes before a block.
        Raises UnknownBlock.
        """
        index = self.indexes[medium]
        try:
            index.store(
                instance, keys, parent=parent, engine_hashes=engine_hashes, counts_copies=counts_copies
            )
        except UnknownBlock:
            assert parent is not None
            paths = (other.path(instance, parent) for other in (gpu, *self.indexes.values()))
            after = next((path for path in paths if path is not None), None)
            if after is None:
                raise
            index.store(instance, keys, after=after, engine_hashes=engine_hashes, counts_copies=counts_copies)

    def remove(self, medium: str, instance: str, engine_hashes: Keys) -> None:
        """Forget a copy of each block in a tier; copies elsewhere stay."""
        self.indexes[medium].remove(instance, engine_hashes)

    def charge(self, columns: Columns) -> None:
        """Bring columns that know the GPU only up to date: what is loaded is not computed, at a price.

        O(T * (D + W * nodes on the path)), T tiers.
        """
        request = columns.request
        charge_tiers(
            self._tiers, request.keys, request.prompt_tokens, columns.block_size, columns.rows, columns.table
        )
