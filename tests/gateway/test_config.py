"""Settings that cannot work are refused at the start, and the command passes on what it is given."""

import re

import pytest

from mulsched.cli import main
from mulsched.commands import serve
from mulsched.errors import InvalidArgument, InvalidType
from mulsched.gateway import EngineConfig, GatewayConfig

ENGINE = EngineConfig("http://gpu-0:8000")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "gpu-0:8000",
        "ftp://gpu-0",
        "http://",
        "http://h:99999",
        "http://u:p@h",
        "http://h/?a=b",
        "http://h/#a",
        "http://h:1\n",
        "http://h:1/a b",
    ],
)
def test_an_engine_is_a_url_and_nothing_else(url):
    with pytest.raises(InvalidArgument, match=re.escape(repr(url))):
        EngineConfig(url)


@pytest.mark.parametrize(
    "endpoint", ["5557", "tcp://h", "http://h:1", "tcp://h:x", "tcp://h:0", "tcp://h:65536", "tcp://h:٥"]
)
def test_events_come_from_an_endpoint(endpoint):
    with pytest.raises(InvalidArgument, match="endpoint"):
        EngineConfig("http://h:1", endpoint)


@pytest.mark.parametrize("endpoint", ["ipc:///run/events", "ipc://a:²"])
def test_ranks_have_ports_to_count_from(endpoint):
    with pytest.raises(InvalidArgument, match="an endpoint with a port expected"):
        EngineConfig("http://h:1", endpoint).ranks(2)


def test_an_instance_has_the_name_of_its_address():
    assert EngineConfig("https://gpu-0:8000/base/").name == "gpu-0:8000/base"


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"engines": ()}, InvalidArgument),
        ({"engines": ("http://gpu-0:8000",)}, InvalidType),
        ({"admin_keys": ("",)}, InvalidArgument),
        ({"admin_keys": ("a",), "api_keys": ("a",)}, InvalidArgument),
        ({"admin_keys": ("a",), "engine_api_key": "a"}, InvalidArgument),
        ({"data_parallel_size": 0}, InvalidArgument),
        ({"tier_cost_ratio": {"CPU": 2.0}}, InvalidArgument),
        ({"engines": (ENGINE, EngineConfig("https://gpu-0:8000"))}, InvalidArgument),
        ({"max_in_flight": 0}, InvalidArgument),
        ({"max_in_flight": 1.5}, InvalidType),
        ({"max_in_flight": True}, InvalidType),
        ({"read_timeout_s": 0}, InvalidArgument),
        ({"read_timeout_s": float("inf")}, InvalidArgument),
        ({"read_timeout_s": float("nan")}, InvalidArgument),
        ({"kv_tokens": 0}, InvalidArgument),
        ({"prefill_tokens_per_s": -1}, InvalidArgument),
        ({"api_keys": ("",)}, InvalidArgument),
        ({"api_keys": ("a\r\nb",)}, InvalidArgument),
        ({"engine_api_key": "a\nb"}, InvalidArgument),
        ({"forward_headers": ("Transfer-Encoding",)}, InvalidArgument),
        ({"forward_headers": ("a b",)}, InvalidArgument),
        ({"health_path": "health"}, InvalidArgument),
        ({"kv_format": "trt"}, InvalidArgument),
    ],
)
def test_a_setting_that_cannot_work_is_refused(setting, error):
    with pytest.raises(error):
        GatewayConfig(**{"engines": (ENGINE,)} | setting)


@pytest.mark.parametrize("setting", [{"admin_keys": ("a",)}, {"engines_file": "engines"}])
def test_engines_may_come_later(setting):
    assert GatewayConfig(**setting).engines == ()


def options(*arguments):
    import argparse

    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", *arguments])


def test_the_command_passes_on_what_it_is_given(tmp_path):
    key = tmp_path / "key"
    key.write_text("from-a-file\n")
    admin = tmp_path / "admin"
    admin.write_text("of-the-admin\n")
    config = serve._config(
        options(
            *(
                "--engine",
                "http://a:1",
                "--engine",
                "http://b:2",
                "--policy",
                "round_robin",
                "--api-key",
                "k",
            ),
            *("--api-key", f"@{key}", "--engine-api-key", "e", "--forward-header", "X-Tenant"),
            *("--kv-format", "sglang", "--load-headers", "--admin-key", f"@{admin}", "--engines-file", "f"),
            *("--tokenizer", "t", "--tier-cost-ratio", "DISK=0.5", "--tier-cost-ratio", "CPU=0.1"),
            *("--read-timeout", "5", "--max-in-flight", "7", "--kv-tokens", "1000"),
        )
    )
    assert config == GatewayConfig(
        (EngineConfig("http://a:1"), EngineConfig("http://b:2")),
        policy="round_robin",
        kv_format="sglang",
        load_headers=True,
        engines_file="f",
        admin_keys=("of-the-admin",),
        tier_cost_ratio={"CPU": 0.1, "DISK": 0.5},
        api_keys=("k", "from-a-file"),
        engine_api_key="e",
        forward_headers=("X-Tenant",),
        read_timeout_s=5.0,
        max_in_flight=7,
        kv_tokens=1000,
    )


def test_events_are_given_for_each_engine():
    two = ("--engine", "http://a:1", "--engine", "http://b:2", "--tokenizer", "t")
    config = serve._config(options(*two, "--kv-events", "tcp://a:5", "--kv-events", "tcp://b:5"))
    assert [engine.kv_events for engine in config.engines] == ["tcp://a:5", "tcp://b:5"]


def test_each_engine_and_rank_may_be_asked_for_its_events():
    two = ("--engine", "http://a:1", "--engine", "http://b:2", "--tokenizer", "t", "--kv-events", "auto")
    for ranks in (1, 2):
        config = serve._config(options(*two, "--data-parallel-size", str(ranks)))
        assert [engine.kv_events for engine in config.engines] == ["auto"] * 2 * ranks
        assert (config.kv_events_auto, config.data_parallel_size) == (True, ranks)


def test_each_rank_is_an_instance_with_ports_of_its_own():
    engine = ("--engine", "http://a:1", "--kv-events", "tcp://a:50", "--kv-replay", "tcp://a:60")
    config = serve._config(options(*engine, "--tokenizer", "t", "--data-parallel-size", "2"))
    assert config.engines == (
        EngineConfig("http://a:1", "tcp://a:50", "tcp://a:60", 0),
        EngineConfig("http://a:1", "tcp://a:51", "tcp://a:61", 1),
    )
    assert [engine.name for engine in config.engines] == ["a:1/0", "a:1/1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "gpu"], "an engine must be a URL"),
        ([], "a gateway needs an engine, a file of engines, or an admin key"),
        (["--engines-file", "/nowhere"], "No such file"),
        (["--admin-key", "a", "--api-key", "a"], "an admin key must be another"),
        (
            ["--engine", "http://a:1", "--tier-cost-ratio", "CPU=0.1"],
            "--tier-cost-ratio goes with --kv-events",
        ),
        (
            ["--admin-key", "a", "--tier-cost-ratio", "CPU=0.1"],  # without a tokenizer there are no events
            "--tier-cost-ratio goes with --kv-events",
        ),
        (["--admin-key", "a", "--tier-cost-ratio", "CPU"], "must be MEDIUM=RATIO, got 'CPU'"),
        (["--admin-key", "a", "--tier-cost-ratio", "CPU=x"], "must be MEDIUM=RATIO, got 'CPU=x'"),
        (
            ["--admin-key", "a", "--tier-cost-ratio", "CPU=2"],
            "the cost ratio of CPU must lie in 0..1, got 2.0",
        ),
        (["--admin-key", "a", "--tier-cost-ratio", "gpu=0"], "another than GPU, in capitals, got 'gpu'"),
        (
            ["--admin-key", "a", *("--tier-cost-ratio", "CPU=0") * 2],
            "goes once with each medium, got CPU twice",
        ),
        (
            ["--engine", "http://a:1", "--engine", "http://b:1", "--kv-events", "tcp://a:5"],
            "--kv-events goes with",
        ),
        (["--engine", "http://a:1", "--kv-events", "tcp://a:5"], "--kv-events needs --tokenizer"),
        (
            [
                *("--engine", "http://a:1", "--kv-events", "auto", "--kv-replay", "tcp://a:5"),
                *("--tokenizer", "t"),
            ],
            "has no kv_replay",
        ),
        (["--engine", "http://a:1", "--kv-replay", "tcp://a:5"], "--kv-replay goes with --kv-events"),
        (["--engine", "http://a:1", "--data-parallel-size", "0"], "--data-parallel-size must be at least 1"),
        (
            [
                *("--engine", "http://a:1", "--kv-events", "ipc:///a"),
                *("--tokenizer", "t", "--data-parallel-size", "2"),
            ],
            "with a port expected",
        ),
        (["--engine", "http://a:1", "--api-key", "@/nowhere"], "No such file"),
        (["--engine", "http://a:1", "--policy", "nobody"], "nobody"),
        (["--engine", "http://a:1", "--chat-template", "/nowhere"], "--chat-template goes with --tokenizer"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_line(arguments, message, capsys):
    assert main(["serve", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
