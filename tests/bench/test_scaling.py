"""The exponents, and the learner's step that they are fitted to."""

import random

import pytest

from warpo.bench.train import plots, scaling
from warpo.bench.train.scaling import AXES, Point, fit, measure_axis, table_of

SMALL = [
    Point(vocabulary=v, prompts=1, group_size=2, prompt_tokens=4, new_tokens=4)
    for v in (16, 64, 256)
]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found_exactly(exponent):
    sizes = [10, 30, 1000, 4000]
    found = fit(sizes, [3.0 * size**exponent for size in sizes])
    assert found == pytest.approx((exponent, 0.0, 3.0), abs=1e-9)


def test_the_error_is_the_standard_error_of_the_slope():
    # log y = log x with residuals of 1, -2, 1 times d: they leave slope and mean as they are
    d, e = 0.1, 2.718281828459045
    found = fit([1.0, e, e**2], [e**d, e ** (1 - 2 * d), e ** (2 + d)])
    assert found.exponent == pytest.approx(1.0)
    assert found.error == pytest.approx((6 * d**2 / 1 / 2) ** 0.5)


def test_the_error_covers_the_exponent_as_often_as_it_says():
    rng, sizes, inside = random.Random(0), [2**i for i in range(8)], 0
    for _ in range(300):
        found = fit(sizes, [size**0.7 * 2.718281828 ** rng.gauss(0, 0.1) for size in sizes])
        inside += abs(found.exponent - 0.7) <= 2 * found.error
    assert 0.87 < inside / 300 < 0.96  # two standard errors at 6 degrees of freedom: 0.908


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 0, 2]), ([2, 2, 2], [1, 2, 3]), ([1, 2, 3], [1])]
)
def test_no_exponent_of_too_little(x, y):
    with pytest.raises(ValueError, match="3 or more positive points"):
        fit(x, y)


def test_each_axis_changes_what_it_says_and_has_three_sizes_even_in_a_quick_run():
    for axis, points in AXES.items():
        assert len({getattr(point, axis) for point in points[: scaling.QUICK_POINTS]}) >= 3
        others = {(p.prompts, p.prompt_tokens) for p in points}
        assert len(others) == 1
    assert len({point.tokens for point in AXES["vocabulary"]}) == 1


def test_the_learners_step_is_timed_and_drawn(monkeypatch, tmp_path):
    monkeypatch.setitem(AXES, "vocabulary", SMALL)
    rows = measure_axis("vocabulary", quick=True)
    assert [row["size"] for row in rows] == [16, 64, 256]
    for row in rows:
        assert row["ms"] > 0 and row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert row["peak_bytes"] > 4 * 16 * row["tokens"] and row["runs"] >= 5
    assert rows[-1]["peak_bytes"] > rows[0]["peak_bytes"]
    assert f"{rows[0]['time_fit']['exponent']:.2f} +- " in table_of(rows)
    assert plots.scaling(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_a_step_changes_the_weights():
    point = SMALL[0]
    model = scaling.learner(point.vocabulary)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaling.step_of(point, model)()
    after = list(model.parameters())
    assert all((a != b).any() for a, b in zip(before, after, strict=True))
