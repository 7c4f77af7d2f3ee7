"""Real vLLM engines of a tiny model with random weights, made on the spot, and ``mulsched serve`` over them."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request

import zmq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from vllm_reference.tiny_llama import START_S, tiny_llama

BLOCK_SIZE = 32  # vLLM on a CPU takes multiples of it
BLOCKS = 30  # few, so that requests push others out of the cache
ADAPTER = "tiny-adapter"
WAIT_S = 120
TEXT = "route each prompt where most of its blocks are cached and the batch is small"
WORDS = TEXT.split()
MODEL = tiny_llama(512)
TEMPLATE = (
    "{% for message in messages %}{{ bos_token }}{{ message.role }}: {{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}"
)


def write_model(directory):
    """Write the configuration, the tokenizer and the chat template of the tiny model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described | {"chat_template": TEMPLATE}))
    (directory / "config.json").write_text(json.dumps(MODEL))


def write_adapter(directory):
    """Write a LoRA adapter of the tiny model: zeros in the format of safetensors."""
    directory.mkdir()
    described = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(described))
    head, size, width = {}, 0, MODEL["hidden_size"]
    for layer in range(MODEL["num_hidden_layers"]):
        for side, shape in (("A", [8, width]), ("B", [width, 8])):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
            end = size + 4 * 8 * width
            head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [size, end]}
            size = end
    text = json.dumps(head).encode()
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait(condition, seconds, log):
    until = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"waited {seconds} s:\n{log.read_text()[-4000:]}")
        time.sleep(0.02)
    return found


def get(url):
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()
    return None


def post(url, body, **headers):
    """Return the headers of an answer, once all of it is read."""
    headers |= {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        response.read()
        return response.headers


@contextlib.contextmanager
def process(command, log, **environment):
    """Run a command in a process group of its own, which is gone afterwards."""
    with log.open("w") as file:
        started = subprocess.Popen(
            command, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield started
    finally:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(30)
        with contextlib.suppress(ProcessLookupError):  # its children too
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


class Engine:
    """A vLLM server that publishes KV events."""

    def __init__(self, python, directory, number, *flags):
        port, events, self._replay = free_ports(3)
        self.url = f"http://127.0.0.1:{port}"
        self.name = f"127.0.0.1:{port}"
        self.kv_events, self.kv_replay = (f"tcp://127.0.0.1:{each}" for each in (events, self._replay))
        self.log = directory / f"engine-{number}.log"
        publisher = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{events}",
            "replay_endpoint": f"tcp://*:{self._replay}",
        }
        self._command = [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)),
            *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
            *("--load-format", "dummy", "--enforce-eager", "--enable-prefix-caching"),
            *("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(BLOCKS)),
            *("--enable-prompt-tokens-details", "--kv-events-config", json.dumps(publisher), *flags),
        ]

    def run(self):
        environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        # one thread each, and not bound to a core that both would take
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        return process(self._command, self.log, **environment)

    def answers(self):
        return get(f"{self.url}/health") is not None

    def metric(self, name):
        """Return the sum of a metric's samples."""
        lines = (get(f"{self.url}/metrics") or "").splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} "))
        )

    def next_sequence(self):
        """Return the number that the publisher's next message will have, once it has none in its queue.

        It publishes one message between two answers on its replay socket, so two equal ones say so.
        """
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.RCVTIMEO, WAIT_S * 1000)
            dealer.connect(self.kv_replay)
            before, now = None, self._asked(dealer)
            while before != now:
                before, now = now, self._asked(dealer, now)
            return now

    @staticmethod
    def _asked(dealer, start=0):
        dealer.send_multipart((b"", start.to_bytes(8, "big")))
        while (number := int.from_bytes(dealer.recv_multipart()[-2], "big", signed=True)) >= 0:
            start = number + 1
        return start


class Gateway:
    """``mulsched serve`` over engines, as a user starts it."""

    def __init__(self, directory, engines, *flags):
        self.directory = directory
        self.engines = {engine.name: engine for engine in engines}
        port = free_ports(1)[0]
        self.log = directory / f"gateway-{port}.log"
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "mulsched", "serve", "--port", str(port)),
            *("--block-size", str(BLOCK_SIZE), "--tokenizer", str(directory), *flags),
        ]
        for engine in engines:
            self._command += ["--engine", engine.url, "--kv-events", engine.kv_events]
            self._command += ["--kv-replay", engine.kv_replay]

    def run(self):
        return process(self._command, self.log)

    @contextlib.contextmanager
    def started(self):
        """Run it; yield it once all its engines are healthy."""
        with self.run():
            wait(self._is_ready, WAIT_S, self.log)
            yield self

    def _is_ready(self):
        return get(f"{self.url}/healthz") and all(each["eligible"] for each in self.instances())

    def metric(self, name, **labels):
        """Return the sum over instances of a metric's samples that have the labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rpartition(" ")[2])
            for line in get(f"{self.url}/metrics").splitlines()
            if line.startswith(f"{name}{{") and all(label in line for label in wanted)
        )

    def overview(self):
        return json.loads(get(f"{self.url}/instances"))

    def instances(self):
        return self.overview()["instances"]

    def catch_up(self):
        """Wait until all that engines have published is applied."""
        for name, engine in self.engines.items():
            sequence = engine.next_sequence()
            wait(lambda n=name, s=sequence: self._applied(n) == s, WAIT_S, self.log)

    def _applied(self, name):
        told = next(each for each in self.instances() if each["instance"] == name)["kv_events"]
        return told["next_sequence"] or 0

    def logged(self, request_id):
        """Wait for a request's line in the log; it is written after the answer's last byte."""
        return wait(lambda: self._lines().get(request_id), WAIT_S, self.log)

    def _lines(self):
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return {line["request_id"]: line for line in lines if line["event"] == "request"}


@contextlib.contextmanager
def fleet(python, directory):
    """Start two engines, the second with an adapter, and a gateway; yield it once both are healthy."""
    write_model(directory)
    write_adapter(directory / "adapter")
    adapter = (
        "--enable-lora",
        "--max-lora-rank",
        "8",
        "--lora-modules",
        f"{ADAPTER}={directory / 'adapter'}",
    )
    engines = [Engine(python, directory, 0), Engine(python, directory, 1, *adapter)]
    with contextlib.ExitStack() as stack:
        for engine, started in [(engine, stack.enter_context(engine.run())) for engine in engines]:
            wait(lambda e=engine, s=started: s.poll() is not None or e.answers(), START_S, engine.log)
            assert started.poll() is None, engine.log.read_text()[-4000:]
        gateway = Gateway(directory, engines, "--record", str(directory / "record.jsonl"))
        yield stack.enter_context(gateway.started())
