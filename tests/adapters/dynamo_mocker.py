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
ANOTHER = f"""
import asyncio, sys
from dynamo.llm import KvRouter, KvRouterConfig
from dynamo.runtime import DistributedRuntime

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    endpoint = runtime.endpoint("{ENDPOINT}")
    client = await endpoint.client()
    await client.wait_for_instances()
    router = KvRouter(endpoint, {BLOCK_SIZE}, KvRouterConfig(router_replica_sync=True))
    over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

    async def keep_busy(delay_s):
        await asyncio.sleep(delay_s)
        stop = {{"max_tokens": 500, "ignore_eos": True}}
        while not over.done():  # a request that started before another router listened is not known there
            async for _ in await router.generate([3] * 40, "m", worker_id=int(sys.argv[1]), stop_conditions=stop):
                if over.done():
                    break

    await asyncio.gather(keep_busy(0), keep_busy(1))
    await asyncio.sleep(0.5)  # it tells the others of the end

asyncio.run(main())
"""


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


@contextlib.contextmanager
def another_frontend(worker_id):
    """Run a process whose own router has a request or two on a worker, always."""
    process = subprocess.Popen([sys.executable, "-c", ANOTHER, str(worker_id)], stdin=subprocess.PIPE)
    try:
        yield
        process.communicate(
            timeout=60
        )  # what a router has sent counts with the others until it says otherwise
    finally:
        process.kill()
        process.wait()


async def until(condition, seconds, what):
    """Wait until ``condition()``, awaited, is true; return it."""
    end = time.monotonic() + seconds
    while not (found := await condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what()}"
        await asyncio.sleep(0.02)
    return found
