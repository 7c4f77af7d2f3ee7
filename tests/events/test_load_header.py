"""Load in the header of an answer."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulsched import InvalidEvents
from mulsched.events import HeaderLoad, read_load_header


@pytest.mark.parametrize(
    ("value", "load"),
    [
        # as vLLM 0.32 writes it
        (
            "TEXT named_metrics.kv_cache_usage_perc=0.4, named_metrics.num_requests_waiting=3.0",
            HeaderLoad(None, 3),
        ),
        (
            'JSON {"named_metrics": {"kv_cache_usage_perc": 0.4, "num_requests_waiting": 3.0}}',
            HeaderLoad(None, 3),
        ),
        (
            "TEXT named_metrics.num_requests_running=2,named_metrics.num_requests_waiting=0",
            HeaderLoad(2, 0),
        ),
        ('json {"cpu_utilization": 0.3, "named_metrics": {"num_requests_running": 2}}', HeaderLoad(2, None)),
        ("TEXT cpu_utilization=0.3, rps_fractional=10.0", HeaderLoad()),
        ("JSON {}", HeaderLoad()),
        ("TEXT ", HeaderLoad()),
    ],
)
def test_requests_are_read_from_text_and_json(value, load):
    assert read_load_header(value) == load


@pytest.mark.parametrize(
    "value",
    [
        "",
        "BIN AAAA",
        "named_metrics.num_requests_waiting=3",
        "TEXT named_metrics.num_requests_waiting=many",
        "TEXT named_metrics.num_requests_waiting=-1",
        "TEXT named_metrics.num_requests_waiting=nan",
        "TEXT named_metrics.num_requests_waiting=1e30",
        'JSON {"named_metrics": {"num_requests_waiting": "3"}}',
        'JSON {"named_metrics": [3]}',
        "JSON [",
        "JSON " + "[" * 5_000,
        'JSON {"named_metrics": {"\udcff": 1}}',
    ],
)
def test_what_cannot_be_read_is_refused(value):
    with pytest.raises(InvalidEvents):
        read_load_header(value)


@given(st.sampled_from(["TEXT ", "JSON ", ""]), st.text())
def test_any_value_is_read_or_refused(form, text):
    with contextlib.suppress(InvalidEvents):
        read_load_header(form + text)
