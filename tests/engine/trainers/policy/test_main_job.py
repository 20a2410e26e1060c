"""The main job of `make train`, for three seeds. Slow: a minute and a half each."""

import pytest

from tests.examples.runs import evaluations, prepare, train


@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grpo_on_vllm_raises_held_out_accuracy_by_40_points_to_above_85_percent(tmp_path, seed):
    rows = train(prepare(tmp_path, seed), "grpo", "--seed", str(seed))
    accuracy = evaluations(rows, "eval/accuracy")
    assert accuracy[-1] - accuracy[0] >= 0.40 and accuracy[-1] > 0.85, accuracy
    assert max(row["mismatch/sampling_max"] for row in rows[1:]) < 1e-4
    assert rows[-1]["mismatch/kernels_max"] < 1e-4
    assert {row["publish/bytes"] for row in rows[1:]} == {0}
    assert (tmp_path / "runs/arithmetic/grpo/learning.png").stat().st_size > 0
