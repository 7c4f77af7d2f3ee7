"""What the page is fed with, and its headers; the page itself in test_page_browser.py."""

import json

from fake_engine import answers, dies, waits_for_the_end
from gateway_harness import run


async def overview(front):
    return json.loads((await front.get("/instances"))[1])


def test_a_decision_is_shown_with_the_scores_of_all_candidates():
    async def scenario(front):
        await front.post("/v1/completions", {"prompt": "x" * 200})
        shown = await overview(front)
        assert shown["policy"] == "lmetric"
        (decision,) = shown["decisions"]
        assert (decision["request_id"], decision["instance"]) == ("id-1", front.engines[0].name)
        assert (decision["prompt"], decision["hit"]) == (200, 0)
        assert [each["instance"] for each in decision["candidates"]] == [
            engine.name for engine in front.engines
        ]
        assert [each["score"] for each in decision["candidates"]] == [200.0, 200.0]

    run(scenario, answers(), answers())


def test_instances_show_load_and_hit_ratio():
    async def scenario(front):
        for _ in range(2):
            await front.post("/v1/completions", {"prompt": "x" * 200})
        (instance,) = (await overview(front))["instances"]
        assert (instance["requests"], instance["in_flight"], instance["state"]) == (2, 0, "healthy")
        assert instance["hit_ratio"] == 192 / 400
        assert instance["reported_hit_ratio"] is None

    run(scenario, answers())


def test_only_the_latest_decisions_are_kept():
    async def scenario(front):
        for _ in range(60):
            await front.post()
        numbers = [decision["request_id"] for decision in (await overview(front))["decisions"]]
        assert numbers == [f"id-{i}" for i in range(60, 10, -1)]

    run(scenario, answers())


def test_an_ejected_engine_raises_an_alarm_until_it_is_back():
    async def scenario(front):
        kinds = []
        for healthy, times in ((True, 1), (False, 3), (True, 2)):
            front.engines[0].healthy = healthy
            for _ in range(times):
                await front.gateway.fleet.check()
            kinds.append([alarm["kind"] for alarm in (await overview(front))["alarms"]])
        assert kinds == [[], ["ejected", "no_engine"], []]

    run(scenario, dies)


def test_a_prefix_that_overloads_its_holders_raises_an_alarm():
    async def scenario(front):
        sending, shown = [], {"alarms": []}
        while not shown["alarms"]:  # the mitigation ends it soon after
            response = await front.http.post("/v1/completions", json={"prompt": "x" * 40_000})
            await response.content.readany()
            sending.append(response)
            shown = await overview(front)
        assert [alarm["kind"] for alarm in shown["alarms"]] == ["prefix"]
        assert any(decision["alarm"] for decision in shown["decisions"])
        assert "mulsched_alarms_total 1.0" in (await front.get("/metrics"))[1]
        for response in sending:
            response.close()
        await front.idle()
        assert (await overview(front))["alarms"] == []

    run(scenario, *[waits_for_the_end(b"data: a\n\n")] * 4, policy="lmetric_guarded")


def test_the_page_may_talk_to_its_own_origin_only():
    async def scenario(front):
        async with front.http.get("/") as response:
            policy = response.headers["Content-Security-Policy"]
            assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in policy
        assert "connect-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy

    run(scenario, answers())


def test_metrics_count_requests_by_outcome_and_instance():
    async def scenario(front):
        for _ in range(2):
            await front.post()
        page = (await front.get("/metrics"))[1]
        name = front.engines[0].name
        path = "/v1/chat/completions"
        assert f'mulsched_requests_total{{outcome="finished",path="{path}",status="200"}} 2.0' in page
        assert f'mulsched_instance_requests_total{{instance="{name}"}} 2.0' in page
        assert f'mulsched_instance_eligible{{instance="{name}"}} 1.0' in page
        assert "mulsched_request_seconds_count 2.0" in page

    run(scenario, answers())
