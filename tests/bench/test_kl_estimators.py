"""`warpo kl`."""

import pytest

from warpo.bench import kl_estimators
from warpo.engine.cli import main


@pytest.mark.parametrize("mean", [0.1, 1.0])
def test_samples_and_integral_agree(mean):
    for name, estimator in kl_estimators.ESTIMATORS.items():
        exact = kl_estimators.integrated(estimator, mean)
        values = kl_estimators.sampled(estimator, mean, 200_000, seed=0)
        found = kl_estimators.moments_of(values, mean)
        # five standard deviations of the samples' mean
        assert found.bias == pytest.approx(exact.bias, abs=5 * exact.std / 200_000**0.5), name
        assert found.std == pytest.approx(exact.std, rel=0.1), name
        unbiased = name != "k2"
        assert (abs(exact.bias) < 1e-4) == unbiased, name


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    picture = tmp_path / "kl.png"
    assert main(["kl", "--means", "1", "--samples", "10000", "--out", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("policy N(0, 1), reference N(1, 1): KL 0.5 nats, 10,000 samples")
    rows = [line.split() for line in lines if line.split() and line.split()[-1:] == ["%"]]
    assert [row[0] for row in rows] == ["k1", "k2", "k3", "r", "reverse_k3"]
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    "words, message",
    [
        (["--means", "0"], "|MU| must be above 0"),
        (["--samples", "10"], "at least 100"),
        (["--out", "nowhere/kl.png"], "there is no directory nowhere"),
    ],
)
def test_what_cannot_be_estimated_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        kl_estimators.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
