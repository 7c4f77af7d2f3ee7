"""``--record``: what the gateway decides is a trace afterwards."""

import json

from fake_engine import answers, dies, streams
from gateway_harness import ASK, CHAT, run

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


def test_a_retry_is_another_decision_and_what_failed_has_no_end(tmp_path):
    async def scenario(front):
        await front.post()
        front.engines[1].answer = dies
        await front.post()

    path = tmp_path / "log"
    with Recorder(path, block_size=64) as recorder:
        run(scenario, dies, answers(), recorder=recorder)
    events = [line["event"] for line in recorded(path)]
    assert events[:2] == ["dispatched"] * 2
    assert events.count("finished") == 1
    assert events[-1] == "dispatched"


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
