"""How well blocks of characters stand in for blocks of tokens: hit ratios of the same conversations.

The conversations are cut from the standard library's sources and docstrings, and so is the vocabulary.
Run: python benchmarks/block_ids.py
"""

import ast
import json
import random
import sysconfig
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mulsched.replay import read_openai_log

STDLIB = Path(sysconfig.get_paths()["stdlib"])
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def texts() -> tuple[str, str]:
    """Code and prose."""
    sources = [path.read_text(errors="replace") for path in sorted(STDLIB.glob("*.py"))]
    nodes = [
        node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)
    ]
    return "\n".join(sources), "\n".join(ast.get_docstring(node) or "" for node in nodes)


def byte_pairs(*corpus: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_000, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text[:2_000_000] for text in corpus], trainer)
    return tokenizer


def log(code: str, prose: str, code_ratio: float, tokenizer: Tokenizer, rng: random.Random) -> str:
    def cut(least: int, most: int) -> str:
        source, length = code if rng.random() < code_ratio else prose, rng.randint(least, most)
        start = rng.randrange(len(source) - length)
        return source[start : start + length]

    systems = [cut(2000, 9000) for _ in range(6)]
    lines = []
    for _ in range(250):
        messages, at = [{"role": "system", "content": rng.choice(systems)}], rng.uniform(0, 600)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            messages.append({"role": "user", "content": cut(50, 4000)})
            rendered = "".join(f"<{m['role']}>\n{m['content']}\n" for m in messages)
            usage = {"prompt_tokens": len(tokenizer.encode(rendered).ids) + 8, "completion_tokens": 100}
            lines.append({"timestamp": at, "messages": list(messages), "response": {"usage": usage}})
            messages.append({"role": "assistant", "content": cut(100, 2500)})
            at += rng.uniform(5, 60)
    return "".join(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    code, prose = texts()
    tokenizer = byte_pairs(code, prose)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "log.jsonl"
        for code_ratio in (0.0, 0.5, 1.0):
            file.write_text(log(code, prose, code_ratio, tokenizer, random.Random(1)))
            by_chars = read_openai_log(file, salt=bytes(32)).stats().hit_ratio
            by_tokens = read_openai_log(file, salt=bytes(32), tokenizer=tokenizer).stats().hit_ratio
            print(f"{code_ratio:.0%} code: hit ratio {by_chars:.3f} by characters, {by_tokens:.3f} by tokens")


if __name__ == "__main__":
    main()
