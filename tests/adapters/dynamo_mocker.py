"""Workers of ``dynamo.mocker``, each in a process of its own, found through files and spoken to over TCP and ZMQ."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

BLOCK_SIZE = 16
ENDPOINT = "dynamo.backend.generate"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "eos_token_id": 1,
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}


def write_model(directory):
    """Write as much of a model as the workers read."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MODEL))
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )


class Workers:
    """Processes with one worker each; ``environment`` is for them and for whoever would find them."""

    def __init__(self, directory, *flags):
        self.directory, self.processes = directory, []
        self.environment = {
            "DYN_FILE_KV": str(directory / "discovery"),
            "HF_HUB_OFFLINE": "1",
            "DYN_LOG": "warn",
        }
        self._command = [
            *(sys.executable, "-m", "dynamo.mocker", "--endpoint", f"dyn://{ENDPOINT}"),
            *("--model-path", str(directory / "model"), "--model-name", "m", "--kv-bytes-per-token", "1024"),
            *("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"),
            *("--block-size", str(BLOCK_SIZE), *flags),
        ]

    @contextlib.contextmanager
    def run(self, count):
        write_model(self.directory / "model")
        try:
            for number in range(count):
                with (self.directory / f"worker-{number}.log").open("w") as log:
                    process = subprocess.Popen(
                        self._command, env=os.environ | self.environment, stdout=log, stderr=log
                    )
                self.processes.append(process)
            yield self
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def channels(self):
        """Return the address of each worker's events, by the id of the worker that holds it."""
        records = [
            json.loads(path.read_text()) for path in (self.directory / "discovery").rglob("*kv%2Devents*")
        ]
        addresses = {
            record["instance_id"]: record["transport"]["config"]["endpoint"]
            for record in records
            if record["type"] == "EventChannel"
        }
        return {
            record["metadata"]["worker"]["worker_id"]: addresses[record["publisher_id"]]
            for record in records
            if record["type"] == "EventSource" and record["publisher_id"] in addresses
        }

    def kill(self, number):
        self.processes[number].send_signal(signal.SIGKILL)
        self.processes[number].wait()

    def logs(self):
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.directory.glob("worker-*.log")))


async def until(condition, seconds, what):
    """Wait until ``condition()``, awaited, is true; return it."""
    end = time.monotonic() + seconds
    while not (found := await condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what()}"
        await asyncio.sleep(0.02)
    return found
