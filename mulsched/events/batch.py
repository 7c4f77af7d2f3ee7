"""What a message of an engine says, in the types that a router applies."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mulsched.types import BlockRemoved, BlockStored, CacheCleared, EventRun, Keys, Namespace

if TYPE_CHECKING:
    from mulsched._native import KvMessage

__all__ = [
    "EventBatch",
    "KvEvent",
    "PackedEvents",
    "PlainRun",
    "SplitRuns",
    "adapter",
    "content_key",
    "event_run",
    "medium_name",
]

KvEvent = BlockStored | BlockRemoved | CacheCleared

# As the core reads one: medium, lora_name, lora_id, block_size, table, block_hashes, token_ids.
PlainRun = tuple[str | None, str | None, int | None, int, NDArray[np.uint64], Keys, NDArray[np.uint32]]

# The names that engines give to tiers: vLLM 0.32 CPU and STORAGE, SGLang CPU_PINNED, CPU_TIER1 and DISK,
# Dynamo device and host_pinned.
_MEDIA = {"GPU": "GPU", "CPU": "CPU", "CPU_PINNED": "CPU", "CPU_TIER1": "CPU", "CPU_TIER2": "CPU",
          "DISK": "DISK", "STORAGE": "DISK", "DEVICE": "GPU", "HOST_PINNED": "CPU"}  # fmt: skip


class PackedEvents(Sequence[KvEvent]):
    """Events of which runs lie in arrays: whoever goes by ``parts`` makes no object for each of them."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[KvEvent | EventRun]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(part) if isinstance(part, EventRun) else 1 for part in self.parts)

    def __iter__(self) -> Iterator[KvEvent]:
        for part in self.parts:
            if isinstance(part, EventRun):
                yield from part
            else:
                yield part

    def __getitem__(self, position: Any) -> Any:
        return list(self)[position]


class SplitRuns(Sequence[EventRun]):
    """The runs of a message that the core has split, made when looked at: the core can apply them itself."""

    __slots__ = ("counts_copies", "instance", "message")

    def __init__(self, message: "KvMessage", instance: str, counts_copies: bool) -> None:
        self.message = message
        self.instance = instance
        self.counts_copies = counts_copies

    def __len__(self) -> int:
        return len(self.message)

    def __getitem__(self, position: Any) -> Any:
        places = range(len(self.message))[position]
        return [self._run(place) for place in places] if isinstance(places, range) else self._run(places)

    def __reduce__(self) -> tuple[Any, ...]:
        # pickled and copied as its runs: the message lies in the core
        return list, (list(self),)

    def _run(self, place: int) -> EventRun:
        return event_run(self.message.part(place), self.instance, self.counts_copies)


class EventBatch(NamedTuple):
    """The events of one message, in order, and how many others it held.

    ``timestamp`` is in seconds on the engine's clock. ``unknown`` counts events of types that are not known,
    ``ignored`` those that are understood and do not concern the router (another cache group, blocks without
    tokens), ``malformed`` those that cannot be read. ``removals_lost`` says that one of the malformed may
    have removed blocks: whoever applies the rest then believes in blocks that may be gone. ``event_ids`` are
    the engine's own numbers of the events, in formats that number them rather than messages.
    """

    timestamp: float
    events: Sequence[KvEvent]
    data_parallel_rank: int | None = None
    unknown: int = 0
    ignored: int = 0
    malformed: int = 0
    removals_lost: bool = False
    event_ids: Sequence[int] = ()

    @property
    def parts(self) -> Sequence[KvEvent | EventRun]:
        """The events, with runs of them in arrays where they came so."""
        return self.events.parts if isinstance(self.events, PackedEvents) else self.events

    @property
    def clears(self) -> bool:
        """Whether the engine has cleared its cache."""
        parts = self.parts
        return not isinstance(parts, SplitRuns) and any(isinstance(part, CacheCleared) for part in parts)


def adapter(name: str | None, lora_id: int | None) -> str | None:
    """Return what a request calls the adapter of an event: its name, else its number."""
    return str(lora_id) if name is None and lora_id is not None else name


def event_run(part: PlainRun, instance: str, counts_copies: bool) -> EventRun:
    """Return a run as the core has read it."""
    medium, lora_name, lora_id, block_size, table, hashes, tokens = part
    lora = adapter(lora_name, lora_id)
    namespace = None if lora is None else Namespace(lora=lora)
    return EventRun(
        instance, table, hashes, tokens, block_size, namespace, medium_name(medium), counts_copies
    )


def medium_name(medium: str | None) -> str:
    """Return the router's name for an engine's medium: GPU, CPU or DISK; one unknown stays, in capitals.

    None is the GPU: engines that know no tiers name none.
    """
    if medium is None:
        return "GPU"
    name = medium.upper()
    return _MEDIA.get(name, name)


def content_key(items: Iterable[tuple[str, int]]) -> bytes:
    """Return the extra key of a block that holds multimodal content, for ``block_keys(extra_keys=...)``.

    ``items``: of each image or the like that the block holds a part of, its identifier and its first token's
    place relative to the block's, in order. Both as in vLLM's events.
    """
    parts = []
    for identifier, offset in items:
        name = identifier.encode("utf-8", "surrogatepass")
        parts += [len(name).to_bytes(8, "little"), name, offset.to_bytes(8, "little", signed=True)]
    return b"".join(parts)
