"""Interpolation from tables of measured steps."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulsched.errors import ProfileError
from mulsched.replay.step_table import StepTable, read_step_table

HEADER = "kind,new_tokens,prefix_tokens,decode_batch,decode_ctx,latency_ms\n"
# bilinear by construction, and a decoded token costs what a prefilled one does
PREFILL = [(n, p) for n in (100, 200, 400) for p in (0, 1000)]
DECODE = [(b, c) for b in (1, 4, 8) for c in (100, 1000, 2000)]


def prefill_ms(n, p):
    return 5 + n / 100 + p / 1000


def decode_ms(b, c):
    return 5 + b / 100 + b * c / 1000


def rule_ms(n, p, b, c):
    """All tokens prefilled, and the context read."""
    return prefill_ms(n + b, p) + b * c / 1000


def table(rows=()):
    return StepTable(
        {(n, p): prefill_ms(n, p) / 1000 for n, p in PREFILL},
        {(b, c): decode_ms(b, c) / 1000 for b, c in DECODE},
        {row: ms / 1000 for row, ms in dict(rows).items()},
    )


def file_of(tmp_path, *, drop=(), extra=""):
    rows = [f"prefill,{n},{p},0,0,{prefill_ms(n, p)}" for n, p in PREFILL]
    rows += [f"decode,0,0,{b},{c},{decode_ms(b, c)}" for b, c in DECODE if (b, c) not in drop]
    rows += ["mixed,100,0,4,1000,10.4"]
    file = tmp_path / "gpu.csv"
    file.write_text(HEADER + "\n".join(rows) + "\n" + extra)
    return file


def test_table_points_come_back_as_they_are(tmp_path):
    step = read_step_table(file_of(tmp_path))
    for n, p in PREFILL:
        assert step(n, p, 0, 0) == pytest.approx(prefill_ms(n, p) / 1000)
    for b, c in DECODE:
        assert step(0, 0, b, c) == pytest.approx(decode_ms(b, c) / 1000)


def test_between_and_beyond_the_points_it_is_bilinear():
    step = table()
    assert step(150, 500, 0, 0) == pytest.approx((5 + 1.5 + 0.5) / 1000)
    assert step(800, 4000, 0, 0) == pytest.approx((5 + 8 + 4) / 1000)
    assert step(0, 0, 16, 3000) == pytest.approx((5 + 0.16 + 48) / 1000)
    assert step(1, 0, 0, 0) == step(100, 0, 0, 0)  # below the table a step costs what its first row says


def test_a_mixed_step_prefills_all_tokens_and_reads_the_context():
    assert table()(150, 500, 6, 1500) == pytest.approx(rule_ms(150, 500, 6, 1500) / 1000)


def mixed(ratio, points):
    """Rows at a ratio to the rule, with half the context before the mean new token, so both readings agree."""
    return {(n, (c - n) / 2, b, c): ratio(n, b, c) * rule_ms(n, (c - n) / 2, b, c) for n, b, c in points}


def test_mixed_rows_come_back_as_they_are():
    rows = mixed(lambda n, b, c: n / 100, [(110, 4, 1000), (130, 4, 1000)])
    step = table(rows)
    assert step.mixed_prompts == "rows"
    for row, ms in rows.items():
        assert step(*row) == pytest.approx(ms / 1000)
    # between them their ratios to the rule are on a line, beyond them constant
    assert step(120, 0, 4, 1000) == pytest.approx(1.2 * rule_ms(120, 0, 4, 1000) / 1000)
    assert step(300, 0, 8, 9) == pytest.approx(1.3 * rule_ms(300, 0, 8, 100) / 1000)


def test_a_ratio_is_trilinear_between_mixed_rows():
    def ratio(n, b, c):
        return 1 + n / 1000 + b / 100 + c / 50_000 + n * b * c / 1e9

    step = table(mixed(ratio, product((100, 200), (1, 8), (200, 2000))))
    for n, b, c in [(130, 2, 300), (180, 5, 1500), (100, 8, 2000)]:
        assert step(n, 0, b, c) == pytest.approx(ratio(n, b, c) * rule_ms(n, 0, b, c) / 1000)


def test_mixed_rows_made_with_prompts_of_the_decode_context_are_recognised():
    # 100 tokens of a prompt of 1,000 attend to 500 on average; 200 tokens are two prompts of 100, to 50
    points = product((100, 200), (100, 1000))
    step = table({(n, 0, 4, c): rule_ms(n, (c - n) / 2, 4, c) for n, c in points})
    assert step.mixed_prompts == "decode_ctx"
    assert step.mixed_ratio == pytest.approx([1.0] * 4)


def test_the_error_on_mixed_rows_is_that_of_rows_left_out():
    ratios = {100: 1.0, 200: 1.3, 300: 1.2}
    step = table(mixed(lambda n, b, c: ratios[n], [(n, 4, 1000) for n in ratios]))
    assert step.mixed_errors == pytest.approx([1.3 / 1.0 - 1, 1 - 1.1 / 1.3, 1.3 / 1.2 - 1])
    assert step.mixed_error == pytest.approx(1 - 1.1 / 1.3)


def test_a_mixed_row_that_is_missing_takes_the_usual_ratio():
    step = table(mixed(lambda n, b, c: 1.2, [(100, 4, 500), (100, 4, 1000), (200, 4, 500)]))
    assert step(200, 0, 4, 1000) == pytest.approx(1.2 * rule_ms(200, 0, 4, 1000) / 1000)


def test_a_mixed_step_takes_no_less_than_either_kind_alone():
    step = table({(100, 0, 4, 1000): 0.1 * rule_ms(100, 0, 4, 1000)})
    assert step(100, 0, 4, 1000) == max(step(100, 0, 0, 0), step(0, 0, 4, 1000))


def test_cells_that_no_memory_holds_are_extended_in_a_line(tmp_path):
    step = read_step_table(file_of(tmp_path, drop=[(8, 2000)]))
    assert step(0, 0, 8, 2000) == pytest.approx(decode_ms(8, 2000) / 1000)


def test_beyond_the_edge_a_falling_table_goes_on_level():
    decode = {(1, 100): 0.010, (1, 200): 0.005, (2, 100): 0.010, (2, 200): 0.004}
    prefill = {(1, 0): 0.010, (1, 100): 0.009, (2, 0): 0.008, (2, 100): 0.007}
    step = StepTable(prefill, decode, {})
    assert step(0, 0, 1, 1000) == 0.005
    assert step(0, 0, 9, 1000) == 0.004
    assert step(9, 1000, 0, 0) == 0.007


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("prefill,1,2\n", "gpu.csv:18: numbers expected"),
        ("prefill,1,0,0,0,fast\n", "gpu.csv:18: numbers expected"),
        ("prefill,inf,0,0,0,5\n", "gpu.csv:18: finite numbers expected"),
        ("prefill,1,0,0,0,-1\n", "gpu.csv:18: latency_ms must be finite and above 0, got -1"),
        ("prefill,1,0,0,0,nan\n", "gpu.csv:18: latency_ms must be finite"),
        ("train,1,0,0,0,5\n", "gpu.csv:18: kind must be prefill, decode or mixed, got 'train'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, extra, message):
    with pytest.raises(ProfileError, match=message):
        read_step_table(file_of(tmp_path, extra=extra))


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n"])
def test_a_file_without_the_columns_is_refused(tmp_path, content):
    file = tmp_path / "x.csv"
    file.write_text(content)
    with pytest.raises(ProfileError, match="x.csv:1: columns kind"):
        read_step_table(file)


def test_a_table_without_a_kind_or_with_a_hole_is_refused(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text(HEADER + "prefill,1,0,0,0,5\n")
    with pytest.raises(ProfileError, match="x.csv: prefill rows must span at least 2 x 2 points, got 1 x 1"):
        read_step_table(file)
    with pytest.raises(ProfileError, match="decode row for 4, 100 is missing"):
        read_step_table(file_of(tmp_path, drop=[(4, 100)]))


@given(st.integers(1, 1000), st.integers(0, 5000), st.integers(1, 20), st.integers(1, 5000))
def test_a_rising_table_rises_everywhere(new, prefix, batch, context):
    step = table({(100, 0, 4, 1000): 1.1 * rule_ms(100, 0, 4, 1000)})
    for kind in [(new, prefix, 0, 0), (0, 0, batch, context), (new, prefix, batch, context)]:
        here = step(*kind)
        assert here > 0
        for i in range(4):
            if kind[i]:
                more = (*kind[:i], kind[i] + 1, *kind[i + 1 :])
                assert step(*more) >= here - 1e-12


@given(
    st.lists(st.floats(0.1, 100), min_size=12, max_size=12),
    st.integers(0, 10_000),
    st.integers(0, 100_000),
    st.integers(0, 1000),
    st.integers(0, 100_000),
)
def test_no_table_of_positive_times_gives_a_step_for_nothing(values, new, prefix, batch, context):
    if new + batch == 0:
        new = 1
    cells = [(x, y) for x in (10, 100) for y in (0, 1000)]
    step = StepTable(
        dict(zip(cells, values[:4], strict=True)),
        dict(zip(cells, values[4:8], strict=True)),
        {(x, 0, x, y): v for (x, y), v in zip(cells, values[8:], strict=True)},
    )
    assert step(new, prefix, batch, context) > 0
