"""Reports: the terminal's table, the page, the plots."""

import base64
import dataclasses
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from made_results import MadeResults

from mulsched.errors import MissingExtra, ResultsError
from mulsched.policies import parse_spec
from mulsched.replay import builtin_profile, synthetic_trace
from mulsched.replay.experiment import Experiment, run_experiment
from mulsched.replay.grid import parse_grid, parse_tune
from mulsched.replay.html_report import write_page, write_pngs
from mulsched.replay.plots import plots_of
from mulsched.replay.report import cells, columns_of, print_report, tuned_text
from mulsched.replay.results import RequestReader, RequestWriter, Results
from mulsched.replay.shown import load_shown
from mulsched.replay.slo import Slo

SETTINGS = {"mulsched": "0.1.0", "backend": "native", "command": "mulsched replay", "notes": ["a <note>"]}


def replayed(directory, trace, *specs, **options):
    """Run an experiment and leave its results in a directory."""
    plan = Experiment(
        [parse_spec(s) for s in specs], {"profile": builtin_profile(), "instances": 2}, **options
    )
    writer = RequestWriter(directory)
    results = run_experiment(plan, trace.scale_rate, settings=SETTINGS, keep=writer.write)
    writer.close()
    results.save(directory)
    return results


@pytest.fixture(scope="module")
def trace():
    trace = synthetic_trace("chat", duration_s=6, seed=4, rate_per_s=6)
    return dataclasses.replace(trace, name="<script>alert(1)</script>")


@pytest.fixture(scope="module")
def directory(tmp_path_factory, trace):
    place = tmp_path_factory.mktemp("results")
    replayed(
        place,
        trace,
        "lmetric",
        "vllm",
        rates=(0.5, 1),
        tunes=[parse_tune("linear:weight=0,1")],
        slo=Slo(0.05),
        repeat=2,
    )
    return place


@pytest.fixture(scope="module")
def page(directory):
    write_page(directory, directory / "report.html")
    return (directory / "report.html").read_text()


@pytest.fixture(scope="module")
def small(tmp_path_factory, trace):
    """Results of one policy and one request."""
    place = tmp_path_factory.mktemp("small")
    replayed(place, trace.take(np.arange(len(trace)) < 1), "lmetric", noise=False)
    return place


@pytest.fixture(scope="module")
def small_page(small):
    write_page(small, small / "report.html")
    return (small / "report.html").read_text()


def plots(directory):
    """The plots of a directory's results, not drawn yet."""
    results, reader = Results.load(directory), RequestReader(directory)
    shown = load_shown(results, reader)
    reader.close()
    return plots_of(results, shown)


class Page(HTMLParser):
    """What a page holds, by kind."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.images, self.headings = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        tag = self.tags[-1][0] if self.tags else ""
        if tag in ("h1", "h2", "h3") and data.strip():
            self.headings.append((tag, data.strip()))
        self.text.append(data)


def printed(results):
    out = io.StringIO()
    print_report(results, out)
    return out.getvalue()


def test_the_terminal_shows_a_line_per_policy_the_noise_and_the_verdict():
    made = MadeResults().add("lmetric").add("vllm", ttft_mean_s=1.5).add("lmetric", role="noise")
    text = printed(made.results())
    assert [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")] == [
        "lmetric",
        "vllm",
    ]
    assert "1,500" in text
    assert "Noise floor: lmetric with other ties and seed moves mean TTFT 0.0%" in text
    assert "lmetric is best or within noise of the best in all 4 figures" in text


def test_repeats_show_intervals_as_precise_as_the_figure():
    made = MadeResults(repeat=2).add("lmetric", ttft_mean_s=[0.0501, 0.0503], ttft_p99_s=[0.5, 0.7])
    (row,) = made.results().rows
    assert cells(row, ["ttft_mean_s", "ttft_p99_s", "ttft_p50_s"]) == ["50.2 ±1.3", "600 ±1,271", "100 ±0"]
    assert "Means of 2 runs with other ties and seeds" in printed(made.results())


def test_goodput_says_what_it_counts():
    made = MadeResults(slo={"ttft_s": 0.2, "tpot_s": None}).add("lmetric", goodput_per_s=1.0)
    assert "Goodput counts requests with TTFT <= 0.2 s." in printed(made.results())


def test_a_figure_that_does_not_exist_is_a_dash():
    (row,) = MadeResults().add("lmetric", tpot_mean_s=float("nan")).results().rows
    assert cells(row, ["tpot_mean_s"]) == ["-"]


def test_columns_are_those_that_there_are():
    assert not {"offered_per_s", "goodput_per_s"} & set(columns_of(MadeResults().add("lmetric").results()))
    made = MadeResults().add("lmetric", goodput_per_s=1.0).add("lmetric", rate=2.0, goodput_per_s=1.0)
    assert {"offered_per_s", "goodput_per_s"} <= set(columns_of(made.results()))


def test_tuning_is_told_with_its_value_at_each_rate():
    grid = {"parameter": "weight", "values": [0, 0.5, 1]}
    made = MadeResults(tune=[{"policy": "linear", "grid": grid}], objective="balanced")
    made.add("linear(weight=0.5, tuned)", tuned=True, parameters={"weight": 0.5})
    assert tuned_text(made.results()) == [
        "Tuned weight of linear: 0.5; the best of 3 values by the objective balanced, chosen with hindsight on "
        "this trace."
    ]
    made.add("linear(weight=1, tuned)", tuned=True, parameters={"weight": 1}, rate=2.0)
    assert (
        "weight of linear: 0.5 at 10 requests/s, 1 at 20 requests/s; the best"
        in tuned_text(made.results())[0]
    )


def test_the_page_needs_nothing_else(page):
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags} & {"script", "iframe", "object", "embed"} == set()
    links = [attrs[name] for _, attrs in parsed.tags for name in ("src", "href") if name in attrs]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"url\(|@import", page)


def test_the_pictures_of_the_page_need_nothing_else(page):
    for image in Page(page).images:
        svg = base64.b64decode(image["src"].partition("base64,")[2]).decode()
        links = re.findall(r'(?:href|src)="([^"#][^"]*)"', svg)
        assert all(link.startswith("data:image/png") for link in links)
        assert "<script" not in svg


def test_the_page_has_a_plot_of_each_kind_with_words_for_who_cannot_see_it(page):
    parsed = Page(page)
    assert [text for tag, text in parsed.headings if tag == "h3"] == [
        "Time to first token (TTFT)",
        "Time per output token (TPOT)",
        "Cache hits",
        "Trade-off",
        "Load of each instance over time",
        "Sweep of the rate",
        "Tuning of weight of linear",
    ]
    assert all(len(image["alt"]) > 40 for image in parsed.images)
    assert len(parsed.images) == 7


def test_the_summary_comes_first(page):
    assert [text for tag, text in Page(page).headings if tag == "h2"] == [
        "Summary",
        "Plots",
        "How it was made",
    ]
    assert page.index("<table") < page.index('id="verdict"') < page.index("<img")


def test_captions_name_trace_seed_engine_and_noise_floor(page):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    assert len(captions) == 7
    for caption in captions:
        for wanted in ("alert(1)", "builtin-8b", "seed 0", "modelled engines", "Noise floor: lmetric"):
            assert wanted in caption


def test_names_from_a_trace_are_text_not_markup(page):
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "a &lt;note&gt;" in page


def test_the_same_results_make_the_same_page(small, small_page, tmp_path):
    write_page(small, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == small_page


def test_png_files_are_written_for_documents(small, tmp_path):
    paths = write_pngs(small, tmp_path / "png")
    assert [path.stem for path in paths] == ["ttft_cdf", "tpot_cdf", "hit_ratio", "trade_off", "load"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_sweep_of_a_parameter_has_its_plot(tmp_path, trace):
    replayed(tmp_path, trace, "lmetric", "linear", sweep=parse_grid("weight=0,1"))
    plot = plots(tmp_path)[-1]
    assert (plot.name, plot.title) == ("weight_sweep_linear", "Sweep of weight of linear")
    assert "the line across is lmetric, with its noise floor" in plot.caption


def test_requests_of_one_token_have_no_plot_of_tpot(tmp_path, trace):
    single = dataclasses.replace(trace, output_tokens=np.ones(len(trace), dtype=np.int64))
    replayed(tmp_path, single, "lmetric", "vllm")
    assert [plot.name for plot in plots(tmp_path)] == ["ttft_cdf", "hit_ratio", "load"]


def test_a_page_of_one_policy_says_that_there_is_nothing_to_compare(small_page):
    assert "there is nothing to compare it with" in small_page


def test_a_directory_without_results_makes_no_page(tmp_path):
    with pytest.raises(ResultsError, match="holds no results"):
        write_page(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("module", ["jinja2", "matplotlib.figure"])
def test_the_extra_is_named_when_it_is_missing(directory, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"pip install 'mulsched\[report\]'"):
        write_page(directory, tmp_path / "report.html")
