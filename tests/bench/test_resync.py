"""Weight sync is timed on the real vLLM, and is as fast as it should be."""

import json

import pytest

from tests.engine.random_models import COMMON
from warpo.bench import resync
from warpo.bench.train import plots

pytest.importorskip("vllm")

SMALL = dict(vocab_size=128, **COMMON)


def test_a_row_has_what_a_reader_needs_to_repeat_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resync, "SHAPE", SMALL)
    monkeypatch.setattr(resync, "BUDGET_S", 0.05)
    assert resync.main(["--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "resync.jsonl").read_text().splitlines()]
    assert len(rows) == 9
    for row in rows:
        assert row["ms"] > 0 and row["machine"] and row["date"] and row["versions"]["vllm"]
        assert row["command"] == f"python -m warpo.bench.resync --out {tmp_path}"
    assert capsys.readouterr().out.count("goal: at ") == 4
    assert plots.sync(rows, tmp_path / "resync.png")
    assert (tmp_path / "resync.png").stat().st_size > 10_000


@pytest.mark.timing
def test_a_packed_copy_is_near_a_flat_copy_and_far_from_the_loader():
    """Goals of the design, with room for what else the machine does."""
    rows = resync.measure_resync("float32", resync.SHAPE)
    ms = {row["provider"]: row["ms"] for row in rows}
    assert ms["packed copy"] <= 1.5 * resync.FLAT_COPY_TIMES * ms["flat copy"]
    assert ms["load_weights, tensor by tensor"] >= resync.PER_TENSOR_TIMES / 2 * ms["packed copy"]
    assert ms["alias"] < 1
