"""``--record``: what the gateway decides is a trace afterwards."""

import json

import pytest
from fake_engine import answers, dies, streams
from gateway_harness import ASK, CHAT, run
from made_tokenizer import MadeTokenizer

from mulsched.cli import main
from mulsched.prompt_reader import PromptReader
from mulsched.record import Recorder
from mulsched.replay import read_trace

TEXT = {"prompt": "x" * 64 * 3}
WHOLE = b'{"usage":{"prompt_tokens":48,"completion_tokens":7}}'
PIECES = (b'data: {"a":1}\n\n', b'data: {"usage":{"prompt_tokens":48,"completion_tokens":5}}\n\n')


def recorded(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_decisions_first_tokens_and_ends_are_recorded(tmp_path):
    async def scenario(front):
        await front.post("/v1/completions", TEXT)
        front.engines[0].answer = streams(*PIECES)
        async with front.http.post(CHAT, json=ASK | {"stream": True}) as response:
            await response.read()
        await front.idle()

    path = tmp_path / "log"
    with Recorder(path, block_size=64) as recorder:
        run(scenario, answers(WHOLE), recorder=recorder)
    events = [(line["event"], line["id"]) for line in recorded(path)]
    first = [("dispatched", "id-1"), ("finished", "id-1")]
    assert events == [*first, ("dispatched", "id-2"), ("first_token", "id-2"), ("finished", "id-2")]
    assert read_trace(path).output_tokens.tolist() == [7, 5]


def test_a_record_has_the_gateways_ids_and_not_the_clients(tmp_path):
    async def scenario(front):
        for _ in range(2):
            await front.post(X_Request_Id="mine")

    path = tmp_path / "log"
    with Recorder(path, block_size=64) as recorder:
        run(scenario, answers(), recorder=recorder)
    assert "mine" not in path.read_text()


def test_what_failed_is_cancelled_before_its_retry_and_where_there_is_none(tmp_path):
    async def scenario(front):
        await front.post()
        front.engines[1].answer = dies
        await front.post()

    path = tmp_path / "log"
    with Recorder(path, block_size=64) as recorder:
        run(scenario, dies, answers(), recorder=recorder)
    events = [(line["event"], line["id"]) for line in recorded(path)]
    failed = ["dispatched", "cancelled"]
    expected = [("id-1", [*failed, "dispatched", "finished"]), ("id-2", failed * 3)]
    assert events == [(event, id_) for id_, told in expected for event in told]
    assert len(read_trace(path)) == 1


def test_a_record_that_cannot_be_written_ends_and_the_gateway_goes_on(tmp_path):
    class FullDisk(Recorder):
        def dispatched(self, decision, **fields):
            raise OSError("no space left on device")

    async def scenario(front):
        for _ in range(2):
            assert (await front.post())[0] == 200
        assert [line for line in front.logged if line["event"] == "record_failed"] == [
            {"event": "record_failed", "error": "OSError"}
        ]

    with FullDisk(tmp_path / "log", block_size=64) as recorder:
        run(scenario, answers(), recorder=recorder)


def fours(text, *, whole):
    """Four characters a token."""
    return [int.from_bytes(text[i : i + 4].encode(), "little") for i in range(0, len(text), 4)]


def text(first):
    return "".join(f"{chr(40 + first)}{i:03}" for i in range(1000))


@pytest.mark.parametrize(
    ("encode", "notes"), [(None, ("prompts are text, 4 characters taken for a token",)), (fours, ())]
)
def test_a_record_is_checked_in_tokens_whatever_the_gateway_counts(tmp_path, capsys, encode, notes):
    async def scenario(front):
        for i in range(80):  # every other prompt is its own
            await front.post("/v1/completions", {"prompt": text(i % 2 * i)})
        await front.idle()

    prompts = PromptReader(16, encode and MadeTokenizer(encode))
    path = tmp_path / "log"
    units = {"block_size": prompts.router_block_size, "units_per_token": prompts.units_per_token}
    with Recorder(path, **units) as recorder:
        run(scenario, answers(WHOLE), prompts=prompts, recorder=recorder)
    trace = read_trace(path)
    assert (trace.block_size, set(trace.prompt_tokens.tolist()), trace.notes) == (16, {1000}, notes)
    assert main(["check", str(path), "--instances", "4", "--processes", "1", "--json", "-"]) in (0, 1)
    (hot, *_) = json.loads(capsys.readouterr().out)["windows"][0]["classes"]
    assert (hot["requests"], hot["prefix_tokens"]) == (40, 992)
