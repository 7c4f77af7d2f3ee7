"""The Ray Serve adapter in Ray Serve LLM, before two real vLLM engines on the CPU.

Opt in with ``-m ray_llm``; what it needs is in docs/adapters.md.
"""

import concurrent.futures
import json
import os
import random
import urllib.request

import openai
import pytest
from ray_calls import until
from real_vllm import BLOCK_SIZE, BLOCKS, WORDS, free_ports, write_model

pytestmark = [pytest.mark.ray_llm, pytest.mark.filterwarnings("default")]

REPLICAS = 2
START_S = 900  # of both engines; a minute on idle cores
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def words(seed, count):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def parts(text):
    return [{"type": "text", "text": text}]


class Served:
    """The application from outside: its HTTP address, and what its ingress and its replicas tell."""

    def __init__(self, port, engines, ingress):
        self.url = f"http://127.0.0.1:{port}"
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", timeout=300, max_retries=0)
        self.engines, self._ingress = engines, ingress

    def router(self):
        """Return the class of the ingress' router, its requests under way, its replicas' load and blocks."""
        return self._ingress.router.remote().result(timeout_s=60)

    def settled(self):
        until(lambda: self.router()["open"] == 0)
        return self.router()

    def chat(self, messages, *, stream, **body):
        """Return the answer and how many tokens of the prompt the engine had cached."""
        body = {"model": "tiny", "max_tokens": 8, "temperature": 0, "stream": stream} | body
        if stream:
            body["stream_options"] = {"include_usage": True}
        answer = self.openai.chat.completions.create(messages=messages, **body)
        answers = list(answer) if stream else [answer]
        parts = [choice.delta if stream else choice.message for each in answers for choice in each.choices]
        usage = answers[-1].usage
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        return "".join(part.content or "" for part in parts), cached

    def post(self, path, body):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        import ray
        from ray import serve
        from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress
        from ray.serve.config import RequestRouterConfig
        from ray.serve.llm import LLMConfig, build_openai_app

        class Ingress(OpenAiIngress):
            """Tells what its router knows."""

            async def router(self):
                handle = self._get_configured_serve_handle("tiny")
                router = handle._router._asyncio_router._request_router
                known = router.bodies.lifecycle.router
                return {
                    "class": f"{type(router).__module__}:{type(router).__name__}",
                    "open": len(router.bodies.lifecycle) + len(router._open),
                    "loads": {name: known.load(name) for name in known.instances},
                    "blocks": {name: known.index.blocks(name) for name in known.instances},
                }

        directory = tmp_path_factory.mktemp("model")
        write_model(directory)
        port = free_ports(1)[0]
        ray.init(
            num_cpus=2 * REPLICAS,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": ENVIRONMENT},
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        llm = LLMConfig(
            model_loading_config={"model_id": "tiny", "model_source": str(directory)},
            accelerator_config={"kind": "cpu"},
            log_engine_metrics=False,
            engine_kwargs={
                "load_format": "dummy",
                "enforce_eager": True,
                "max_model_len": 512,
                "block_size": BLOCK_SIZE,
                "num_gpu_blocks_override": BLOCKS,
                "enable_prompt_tokens_details": True,
            },
            deployment_config={
                "num_replicas": REPLICAS,
                "max_ongoing_requests": 100,
                "ray_actor_options": {"num_cpus": 0},
                "request_router_config": RequestRouterConfig(
                    request_router_class="mulsched.adapters.ray_serve:LMetricRequestRouter",
                    request_router_kwargs={"cache_tokens": BLOCKS * BLOCK_SIZE},
                ),
            },
        )
        app = build_openai_app(
            {
                "llm_configs": [llm],
                "ingress_cls_config": {"ingress_cls": Ingress},
                "ingress_deployment_config": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}},
            }
        )
        ingress = serve.run(app, name="llm", route_prefix="/")
        engines = serve.get_deployment_handle("LLMServer:tiny", "llm")
        yield Served(port, engines, ingress)
        serve.shutdown()
        ray.shutdown()


def test_the_ingress_routes_by_this_router(served):
    served.chat([{"role": "user", "content": "hello"}], stream=False)
    router = served.settled()
    assert router["class"] == "mulsched.adapters.ray_serve:LMetricRequestRouter"
    assert len(router["loads"]) == REPLICAS


@pytest.mark.parametrize("stream", [False, True])
def test_every_turn_of_a_conversation_finds_the_turns_before_it(served, stream):
    """Three conversations by turns: with two replicas, chance would find about half of them."""
    talks = [[{"role": "system", "content": parts(words(f"{i} {stream}", 60))}] for i in range(3)]
    found = []
    for turn in range(4):
        for talk in talks:
            said = words(turn, 10)
            talk.append({"role": "user", "content": parts(said) if turn % 2 else said})
            answer, cached = served.chat(talk, stream=stream)
            talk.append({"role": "assistant", "content": answer})
            found.append(cached >= 2 * BLOCK_SIZE)
    assert found == [False] * 3 + [True] * 9


@pytest.mark.parametrize("stream", [False, True])
def test_requests_at_once_are_booked_spread_and_released(served, stream):
    served.settled()
    served.engines.broadcast("pause").results(timeout_s=60)
    with concurrent.futures.ThreadPoolExecutor(4 * REPLICAS) as threads:
        prompts = [
            [{"role": "user", "content": words(f"{i} {stream} at once", 40)}] for i in range(4 * REPLICAS)
        ]
        asked = [threads.submit(served.chat, prompt, stream=stream) for prompt in prompts]
        try:
            until(lambda: sum(load["waiting"] for load in served.router()["loads"].values()) == len(prompts))
            loads = served.router()["loads"].values()
        finally:
            served.engines.broadcast("resume").results(timeout_s=60)
        assert all(answer.result(timeout=300)[0] for answer in asked)
    assert [load["waiting"] for load in loads] == [4] * REPLICAS
    router = served.settled()
    assert all(load["waiting"] == load["running"] == 0 for load in router["loads"].values())


def test_a_stream_that_the_client_leaves_is_released(served):
    served.settled()
    served.engines.broadcast("pause").results(timeout_s=60)
    try:
        with pytest.raises(openai.APITimeoutError):
            served.openai.with_options(timeout=2).chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "left"}], stream=True
            )
        served.settled()
    finally:
        served.engines.broadcast("resume").results(timeout_s=60)


def test_tools_and_calls_of_tools_are_read(served):
    function = {"name": "look_up", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"x": "y"}'}}
    messages = [
        {"role": "user", "content": words("tools", 80)},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": parts("found")},
    ]
    tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "none"}
    cached = [served.chat(messages, stream=False, **tools)[1] for _ in range(3)]
    assert cached[1] == cached[2] >= 2 * BLOCK_SIZE


def test_texts_of_completions_are_routed_by_their_prefix(served):
    body = {"model": "tiny", "prompt": words("completions", 80), "max_tokens": 1}
    for _ in range(2):
        answer = served.post("/v1/completions", body)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 2 * BLOCK_SIZE
