"""A file of engines that is read again: what comes, what goes, and what it leaves alone."""

import asyncio

import pytest
from fake_engine import FakeEngine, answers, streams
from gateway_harness import ASK, CHAT
from kv_publisher import Publisher, until
from made_tokenizer import MadeTokenizer
from membership_harness import add, encode, front, gone, guarded, names, ready, remove

from mulsched.gateway import PromptReader


def test_the_engines_of_a_file_come_and_go_with_its_lines(tmp_path):
    async def scenario():
        path = tmp_path / "engines"
        async with FakeEngine(answers()) as first, FakeEngine(answers()) as second:
            path.write_text(f"# ours\n{first.url}  # the first\n\n")
            async with front(engines_file=str(path)) as it:
                assert it.gateway.fleet.eligible() == (first.name,)
                path.write_text(f"{second.url}\n")
                it.gateway.reread_engines()
                await ready(it, second.name)
                await gone(it, first.name)
                assert (await it.post())[0] == 200
                assert len(second.asked) == 1

    guarded(scenario)


def test_a_file_leaves_other_engines_alone(tmp_path):
    async def scenario():
        path = tmp_path / "engines"
        path.write_text("")
        async with FakeEngine(answers()) as added, front(answers(), engines_file=str(path)) as it:
            await add(it, added.url)
            path.write_text(f"{added.url}\n")
            it.gateway.reread_engines()
            path.write_text("")
            it.gateway.reread_engines()
            assert names(it) == sorted([added.name, it.engines[0].name])
            assert not any(engine.leaving for engine in it.gateway.fleet.engines.values())

    guarded(scenario)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"http://a:1\ngpu-0\n", "line 2: an engine must be a URL"),
        (b"http://a:1 tcp://a:2 tcp://a:3 tcp://a:4\n", "line 1: a URL and up to two endpoints"),
        (b"http://a:1\nhttps://a:1\n", "line 2: each engine may be given once"),
        (b"http://a:1 tcp://a:2\n", "kv_events needs a tokenizer"),
        (b"\xff\n", "must be text in UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_changes_nothing_and_is_logged(tmp_path, text, reason):
    async def scenario():
        path = tmp_path / "engines"
        async with FakeEngine(answers()) as engine:
            path.write_text(engine.url)
            async with front(engines_file=str(path)) as it:
                path.unlink()
                if text is not None:
                    path.write_bytes(text)
                it.gateway.reread_engines()
                assert names(it) == [engine.name]
                assert not it.gateway.fleet.engines[engine.name].leaving
                [line] = [line for line in it.logged if line["event"] == "engines_file_failed"]
                assert reason in line["error"]

    guarded(scenario)


def test_an_engine_whose_line_has_other_endpoints_is_added_anew(tmp_path):
    async def scenario():
        path = tmp_path / "engines"
        async with FakeEngine(answers()) as engine, Publisher() as publisher:
            path.write_text(engine.url)
            prompts = PromptReader(16, MadeTokenizer(encode))
            async with front(engines_file=str(path), prompts=prompts) as it:
                path.write_text(f"{engine.url} {publisher.endpoint} {publisher.replay_endpoint}")
                it.gateway.reread_engines()
                await publisher.subscribed()
                assert it.gateway.fleet.engines[engine.name].config.kv_events == publisher.endpoint

    guarded(scenario)


def test_a_line_that_is_back_before_its_engine_is_idle_adds_it_anew(tmp_path):
    async def scenario():
        path = tmp_path / "engines"
        held = asyncio.Event()
        async with FakeEngine(streams(b"data: a\n\n", held)) as engine:
            path.write_text(engine.url)
            async with front(engines_file=str(path)) as it:
                streaming = await it.http.post(CHAT, json=ASK)
                before = it.gateway.fleet.engines[engine.name]
                for text in ("", engine.url):
                    path.write_text(text)
                    it.gateway.reread_engines()
                assert before.leaving
                held.set()
                await streaming.read()
                await until(lambda: it.gateway.fleet.engines.get(engine.name) not in (None, before))
                await ready(it, engine.name)

    guarded(scenario)


def test_a_gateway_that_stops_takes_no_engine_in(tmp_path):
    async def scenario():
        path = tmp_path / "engines"
        path.write_text("")
        async with front(engines_file=str(path)) as it:
            await it.gateway.stop()
            path.write_text("http://127.0.0.1:9")
            it.gateway.reread_engines()
            assert names(it) == []

    guarded(scenario)


def test_an_engine_of_the_file_that_was_removed_by_hand_is_back_when_the_file_is_read(tmp_path):
    async def scenario():
        path = tmp_path / "engines"
        async with FakeEngine(answers()) as engine:
            path.write_text(engine.url)
            async with front(engines_file=str(path)) as it:
                await remove(it, engine.name)
                await gone(it, engine.name)
                assert names(it) == []
                it.gateway.reread_engines()
                assert names(it) == [engine.name]

    guarded(scenario)
