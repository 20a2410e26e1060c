"""Every algorithm that learns from sampled completions, on the real vLLM: from the sums that a
careless pupil gets right to those that are stated here. Slow: a quarter of a minute each.
"""

import pytest

from tests.examples.runs import evaluations, train_here
from warpo.engine.config.algorithms import ALGORITHMS

STEPS = 12
# Share of held-out sums that are right after so many steps: 0.95 and more was seen of each.
ACCURACY = 0.85
BRADLEY_TERRY = "runs/arithmetic/bradley_terry/checkpoints"
# Where the reward is no 1 or 0 for the sum, the metric that is.
RIGHT = {
    "ppo_ptx": "eval/examples.arithmetic:reward",
    "iterative_grpo": "eval/examples.arithmetic:reward",
    "gdpo": "eval/examples.arithmetic:reward",
    "dapo": "eval/examples.arithmetic:reward",
}
# grpo is the main job, of tests/engine/trainers/policy/test_main_job.py
POLICY = [name for name, row in ALGORITHMS.items() if row.family == "policy" and name != "grpo"]


@pytest.fixture(scope="module")
def folder(prepared):
    return prepared("policy")


@pytest.mark.slow(minutes=0.2)
@pytest.mark.parametrize("name", POLICY)
def test_the_example_raises_held_out_accuracy(folder, name):
    if name in ("ppo_ptx", "iterative_grpo") and not (folder / BRADLEY_TERRY).exists():
        train_here(folder, "bradley_terry")
    rows = train_here(folder, name, "--steps", str(STEPS), "--evaluation.every_steps", str(STEPS))
    right = evaluations(rows, RIGHT.get(name, "eval/accuracy"))
    assert right[0] < (0.6 if name == "grpo_process" else 0.4)
    assert right[-1] >= ACCURACY, right
    assert max(row["mismatch/sampling_max"] for row in rows[1:]) < 1e-4
    assert rows[-1]["mismatch/kernels_max"] < 1e-4
    assert {row["publish/bytes"] for row in rows[1:]} == {0}
