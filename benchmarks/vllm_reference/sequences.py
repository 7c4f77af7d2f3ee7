"""The request sequences that a real vLLM and the engine model are both given.

A sequence is a list of waves. The requests of a wave are all in the waiting queue, in order, before the
engine starts a step; the next wave is sent when all have ended. That determines what vLLM does to blocks and
tokens. A prompt is a list of pieces ``[text, tokens]``: the first tokens of the random text of that name
or, with ``@request``, of what this earlier request answered.
"""

import random
from collections.abc import Callable, Iterator

VOCABULARY = 2048
BLOCK_SIZE = 32  # the CPU backend wants a multiple of 32

# vLLM's arguments; it keeps one of the blocks to itself
SERVERS = {
    # a prompt fits into one step
    "wide": {
        "num_gpu_blocks_override": 17,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 8,
        "max_model_len": 512,
    },
    # prompts are cut into chunks that end inside blocks, and requests wait for a seat
    "narrow": {
        "num_gpu_blocks_override": 17,
        "max_num_batched_tokens": 80,
        "max_num_seqs": 4,
        "max_model_len": 512,
    },
    # ten blocks for many requests, and chunks smaller than a block
    "tight": {
        "num_gpu_blocks_override": 11,
        "max_num_batched_tokens": 24,
        "max_num_seqs": 6,
        "max_model_len": 256,
    },
}

Piece = list  # [text, tokens]
Wave = list[dict]  # requests: {"id", "prompt", "output_tokens"}


def text(name: str, n_tokens: int) -> list[int]:
    """Return the first tokens of the random text of that name."""
    rng = random.Random(name)
    return [rng.randrange(VOCABULARY) for _ in range(n_tokens)]


def prompt_tokens(prompt: list[Piece], outputs: dict[str, list[int]]) -> list[int]:
    """Return a prompt's token ids, given what earlier requests answered."""
    tokens: list[int] = []
    for name, n_tokens in prompt:
        tokens += outputs[name[1:]][:n_tokens] if name.startswith("@") else text(name, n_tokens)
    return tokens


class _Sequence:
    """Numbers the requests of a sequence."""

    def __init__(self) -> None:
        self.waves: list[Wave] = []

    def wave(self, *requests: tuple[list[Piece], int]) -> Wave:
        known = sum(len(wave) for wave in self.waves)
        wave = [
            {"id": f"r{known + i}", "prompt": prompt, "output_tokens": output_tokens}
            for i, (prompt, output_tokens) in enumerate(requests)
        ]
        self.waves.append(wave)
        return wave


def shared_prefixes(sequence: _Sequence) -> None:
    """One after another: four documents, questions about them, room for some of the documents only."""
    rng = random.Random("shared_prefixes")
    lengths = {"doc a": 70, "doc b": 128, "doc c": 160, "doc d": 210}
    for i in range(28):
        document = rng.choice(list(lengths))
        question = [f"question {i}", rng.randrange(1, 70)]
        sequence.wave(([[document, lengths[document]], question], rng.randrange(1, 70)))


def full_repeats(sequence: _Sequence) -> None:
    """Prompts sent again as they were, of whole blocks and one token more or less, with evictions between."""
    for round_ in range(3):
        for n_tokens in (127, 128, 129):
            for output_tokens in (1, 33, 8):
                sequence.wave(([["repeated", n_tokens]], output_tokens))
        sequence.wave(([[f"other {round_}", 300]], 4))


def follow_ups(sequence: _Sequence) -> None:
    """Three conversations in turn; each prompt is the one before, its answer and a new question."""
    prompts: dict[int, list[Piece]] = {c: [] for c in range(3)}
    # answers that end one token before a block does, with it, and one after
    for turn, output_tokens in enumerate((31, 32, 33, 17)):
        for conversation, prompt in prompts.items():
            prompt.append([f"turn {turn} of {conversation}", (32, 20, 1)[conversation]])
            (request,) = sequence.wave(([*prompt], output_tokens))
            prompt.append([f"@{request['id']}", output_tokens])


def common_burst(sequence: _Sequence) -> None:
    """Requests that arrive together and share a prefix that nobody has cached yet, twice."""
    for round_ in range(2):
        sequence.wave(*(([["shared", 112], [f"own {round_} {i}", 10 + 9 * i]], 5 + i) for i in range(6)))


def equal_burst(sequence: _Sequence) -> None:
    """The same prompt of whole blocks from several at once, then again."""
    for n_requests in (3, 5):
        sequence.wave(*(([["equal", 96]], 3 + 20 * i) for i in range(n_requests)))


def pressure(sequence: _Sequence) -> None:
    """Short prompts with long answers that do not fit together: requests are preempted and resumed."""
    sequence.wave(*(([[f"long answer {i}", 40 + 11 * i]], 170 - 20 * i) for i in range(5)))
    sequence.wave(*(([["common", 64], [f"again {i}", 7 * i + 1]], 120) for i in range(5)))


def long_prompts(sequence: _Sequence) -> None:
    """Prompts of many chunks, alone and beside requests that decode."""
    sequence.wave(([["long a", 333]], 3))
    sequence.wave(([["long a", 300], ["tail", 47]], 3))
    sequence.wave(([["short", 30]], 40), ([["long b", 250]], 20), ([["long b", 200], ["end", 60]], 5))
    sequence.wave(*(([[f"middle {i}", 90]], 12) for i in range(6)))


def mixture(sequence: _Sequence, seed: int) -> None:
    """Random waves: shared prefixes, prompts that go on from any recent answer, short and long answers."""
    rng = random.Random(f"mixture {seed}")
    ended: list[dict] = []
    for _ in range(14):
        requests: list[tuple[list[Piece], int]] = []
        for i in range(rng.choice((1, 1, 2, 4, 6))):
            prompt = [[f"prefix {rng.randrange(4)}", rng.choice((16, 32, 64, 100))]]
            if ended and rng.random() < 0.4:
                before = rng.choice(ended[-8:])
                prompt = [*before["prompt"], [f"@{before['id']}", before["output_tokens"]]]
            if sum(n_tokens for _, n_tokens in prompt) > 250:
                prompt = prompt[:1]
            if rng.random() < 0.8:
                prompt.append([f"new {len(ended) + i}", rng.randrange(1, 60)])
            requests.append((prompt, rng.choice((1, rng.randrange(1, 40), rng.randrange(40, 120)))))
        ended += sequence.wave(*requests)


def crowd(sequence: _Sequence, seed: int) -> None:
    """Random waves of many requests with some shared prefixes, whose answers do not fit beside each other."""
    rng = random.Random(f"crowd {seed}")
    for wave in range(6):
        requests: list[tuple[list[Piece], int]] = []
        for i in range(rng.randrange(4, 9)):
            prompt = [[f"prefix {rng.randrange(3)}", rng.choice((20, 32, 64))]]
            if rng.random() < 0.8:
                prompt.append([f"new {wave} {i}", rng.choice((12, rng.randrange(1, 140)))])
            requests.append((prompt, rng.choice((40, rng.randrange(1, 90)))))
        sequence.wave(*requests)


def sequences() -> Iterator[tuple[str, str, list[Wave]]]:
    """Yield name, server and waves of every sequence."""
    for build in (shared_prefixes, full_repeats, follow_ups, common_burst, equal_burst, pressure):
        for server in ("wide", "narrow"):
            yield build.__name__, server, _waves(build)
    yield "long_prompts", "narrow", _waves(long_prompts)
    for seed in range(3):
        for server in ("wide", "narrow"):
            yield f"mixture_{seed}", server, _waves(mixture, seed)
        yield f"crowd_{seed}", "tight", _waves(crowd, seed)


def _waves(build: Callable[..., None], *arguments: int) -> list[Wave]:
    sequence = _Sequence()
    build(sequence, *arguments)
    return sequence.waves
