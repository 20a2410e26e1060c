import math

import pytest

from tests.tolerance import TRAINER_LOSS

pytest.importorskip("trl", reason="TRL is not installed: make peers; then make test-integrations")

from warpo.bench.dropin.grpo_side import counting_losses, train  # noqa: E402
from warpo.bench.train.job import Clock, Job, make  # noqa: E402
from warpo.kernels.integrations import trl  # noqa: E402


def job_of(folder, steps, warm_up):
    return Job(
        folder=str(folder),
        model="tiny",
        steps=steps,
        warm_up=warm_up,
        prompts_per_step=2,
        group_size=4,
        prompt_tokens=8,
        new_tokens=12,
        lr=1e-3,
        kv_cache_gib=0.0,
        sampler="transformers",
    )


def test_autocast_as_by_default_is_served(tmp_path, monkeypatch):
    """TRL trains float32 weights under bfloat16: no call is passed on."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    job = job_of(tmp_path, steps=3, warm_up=1)
    make(job)
    theirs, ours = (
        train(job, str(tmp_path / str(patched)), patched, Clock(), bf16=True)
        for patched in (False, True)
    )
    calls = {name: found.calls for name, found in trl.library.replacements.items()}
    assert not any(found.passed_on for found in calls.values())
    # of the policy with a gradient, and of the reference and the policy of the samples without one
    assert calls["ChunkedLogProbFunction.backward"].served == 4
    assert calls["ChunkedLogProbFunction.forward"].served > 4
    assert calls["GRPOTrainer._compute_loss"].served == 4
    for a, b in zip(theirs, ours, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-2 and abs(a["entropy"] - b["entropy"]) <= 1e-2


def test_twenty_steps_log_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    job = job_of(tmp_path, steps=18, warm_up=2)
    make(job)
    theirs = train(job, str(tmp_path / "theirs"), False, Clock())
    calls = []
    with counting_losses(calls):
        ours = train(job, str(tmp_path / "ours"), True, Clock())
    assert not trl.patched()
    assert len(theirs) == len(ours) == len(calls) == 20
    assert all(row["completions/mean_length"] == job.new_tokens for row in ours[::2])
    for step, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert a.keys() == b.keys()
        for name in a.keys() - {"step_time"}:
            apart = abs(a[name] - b[name])
            allowed = TRAINER_LOSS * max(1.0, abs(a[name]))
            assert apart <= allowed or math.isnan(a[name]), (step, name, a[name], b[name])
    assert max(abs(row["loss"]) for row in ours) > 100 * TRAINER_LOSS
    assert max(row["kl"] for row in ours) > 100 * TRAINER_LOSS
    assert max(row["clip_ratio/region_mean"] for row in ours) > 0
