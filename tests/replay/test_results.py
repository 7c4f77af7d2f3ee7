"""Results in memory and on disk."""

import csv
import io
import json
import math

import numpy as np
import pytest
from made_results import FIGURES, MadeResults

from mulsched.errors import MissingExtra, ResultsError
from mulsched.replay import builtin_profile, replay, synthetic_trace
from mulsched.replay.results import (
    REQUEST_COLUMNS,
    RequestReader,
    RequestWriter,
    Results,
    check_new,
)


@pytest.fixture(scope="module")
def result():
    trace = synthetic_trace("chat", duration_s=5, seed=1, rate_per_s=4)
    return replay(trace, "lmetric", profile=builtin_profile(), instances=2)


def made():
    made = MadeResults(repeat=2).add("lmetric", ttft_mean_s=[0.1, 0.2]).add("vllm", tpot_mean_s=math.nan)
    return made.add("linear(weight=0.5, tuned)", tuned=True, parameters={"weight": 0.5}).results()


def test_what_is_written_is_read_again():
    results = made()
    again = Results.from_json(results.to_json())
    assert again.to_json() == results.to_json()
    assert again.rows[0] == results.rows[0]
    assert math.isnan(again.rows[1].figures["tpot_mean_s"])


def test_a_figure_that_does_not_exist_is_null_and_everything_is_json():
    document = json.loads(made().to_json(), parse_constant=pytest.fail)
    assert document["results"][1]["figures"]["tpot_mean_s"] is None
    assert document["settings"]["trace"] == "made"


def test_csv_has_a_line_per_row_with_interval_and_setting():
    lines = list(csv.DictReader(io.StringIO(made().to_csv())))
    assert [line["policy"] for line in lines] == ["lmetric", "vllm", "linear(weight=0.5, tuned)"]
    assert float(lines[0]["ttft_mean_s"]) == pytest.approx(0.15)
    assert float(lines[0]["ttft_mean_s_half_width"]) > 0
    assert lines[1]["ttft_mean_s_half_width"] == ""
    assert (lines[0]["trace"], lines[0]["instances"], lines[0]["runs"]) == ("made", "2", "2")


def test_csv_without_repeats_has_no_intervals():
    (line,) = csv.DictReader(io.StringIO(MadeResults().add("lmetric").results().to_csv()))
    assert not any(name.endswith("half_width") for name in line)
    assert set(FIGURES) <= set(line)


def test_rows_are_found_by_rate_and_role():
    made = MadeResults().add("lmetric").add("lmetric", rate=4.0).add("lmetric", rate=2.0)
    results = made.add("linear(weight=0)", role="trial").add("lmetric", role="noise").results()
    assert results.rates == [1, 2, 4]
    assert results.reference_rate == 2
    assert len(results.at(1.0)) == 1
    assert [row.role for row in results.at(1.0, "trial", "noise")] == ["trial", "noise"]


def test_a_directory_is_saved_and_loaded(tmp_path):
    made().save(check_new(tmp_path / "new" / "place"))
    assert Results.load(tmp_path / "new" / "place").to_json() == made().to_json()


def test_results_are_not_written_over(tmp_path):
    made().save(tmp_path)
    with pytest.raises(ResultsError, match=r"holds results.json already: choose another directory"):
        check_new(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not written by mulsched replay --out"),
        ("[]", "not written by mulsched replay --out"),
        ("{}", "not written by mulsched replay --out"),
        ('{"format": "mulsched-results", "version": 2}', "version 1, got mulsched-results 2"),
        (made().to_json().replace('"ties"', '"tie"'), "not written by"),
        (made().to_json().replace('"number": 0', '"number": 7'), "rows and runs do not fit together"),
        (made().to_json().replace('"trace"', '"track"'), "settings lack trace"),
        (made().to_json().replace('"role": "result"', '"role": "king"'), "do not fit together"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ResultsError, match=message):
        Results.load(tmp_path)


def test_a_directory_without_results_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="holds no results of mulsched replay --out"):
        Results.load(tmp_path)
    with pytest.raises(ResultsError, match="requests.parquet"):
        RequestReader(tmp_path)


def write(directory, *results):
    writer = RequestWriter(directory)
    for run, result in enumerate(results):
        writer.write(run, result)
    writer.close()


def run_of(result, number):
    made = MadeResults().add("a").add("b").add("c").results().runs[number]
    return type(made)(
        **{name: getattr(made, name) for name in made.__slots__} | {"requests": len(result.arrival_s)}
    )


def test_requests_are_kept_run_by_run(tmp_path, result):
    write(tmp_path, result, result)
    reader = RequestReader(tmp_path)
    columns = reader.read(run_of(result, 1))
    reader.close()
    assert set(columns) == set(REQUEST_COLUMNS)
    for name, values in columns.items():
        assert values.tolist() == getattr(result, name).tolist()


def test_other_programs_find_run_and_request(tmp_path, result):
    import pyarrow.parquet

    write(tmp_path, result, result)
    table = pyarrow.parquet.read_table(tmp_path / "requests.parquet")
    n = len(result.arrival_s)
    assert table["run"].to_pylist() == [0] * n + [1] * n
    assert table["request"].to_pylist() == [*range(n), *range(n)]


def test_requests_that_do_not_fit_the_runs_are_refused(tmp_path, result):
    write(tmp_path, result)
    reader = RequestReader(tmp_path)
    with pytest.raises(ResultsError, match="has 1 runs, expected one of number 2"):
        reader.read(run_of(result, 2))
    other = run_of(result, 0)
    with pytest.raises(ResultsError, match=f"has {other.requests} requests, expected 20"):
        reader.read(MadeResults().add("a").results().runs[0])
    reader.close()


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "requests.parquet").write_text("run,request\n")
    with pytest.raises(ResultsError, match="requests.parquet"):
        RequestReader(tmp_path)


def test_the_extra_is_named_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"needs pyarrow: pip install 'mulsched\[report\]'"):
        RequestWriter(tmp_path)


def test_instances_and_tokens_fit_their_columns(result):
    for name, dtype in REQUEST_COLUMNS.items():
        values = getattr(result, name)
        assert np.array_equal(values.astype(dtype), values)
