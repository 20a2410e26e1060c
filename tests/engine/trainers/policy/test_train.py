"""Whole runs, on the real samplers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

from tests.engine.runs import PROBED, rows, train
from warpo.engine.config.policy import load_config
from warpo.engine.errors import RewardError, TrainingError
from warpo.engine.rollout.collect import Rollouts
from warpo.engine.rollout.sampler.hf_sampler import TransformersSampler
from warpo.engine.trainers.policy.train import run


def test_a_run_leaves_rows_curves_and_a_model_that_transformers_loads(folder, kind):
    train(folder, "--sampler", kind)
    table = rows(folder, probed=True)
    assert [row["step"] for row in table] == [0, 1, 2, 3, 4]
    assert ["eval/accuracy" in row for row in table] == [True, False, True, False, True]
    last = table[-1]
    assert last["publish/version"] == 4
    assert last["publish/bytes"] == 0 and last["publish/extra_weight_bytes"] == 0
    assert last["mismatch/kernels_max"] < 1e-4
    assert last["kl/mean"] > 0, "the policy did not move from the reference"
    assert last["update/changed_frac"] > 0.5
    assert last["update/rounding_lost_frac"] == pytest.approx(0, abs=1e-5)
    assert (folder / "out/learning.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "out/tensorboard").iterdir())
    checkpoint = folder / "out/checkpoints/step-000004"
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    transformers.AutoTokenizer.from_pretrained(checkpoint)


MISMATCH = {
    *("mismatch/sampling_max", "mismatch/truncation_mean"),
    *("mismatch/staleness_mean", "mismatch/staleness_max"),
}


def test_every_step_tells_sampler_from_learner_by_cause(folder, kind):
    """Two optimizer steps a step, so that the samples of the second are stale."""
    overrides = ("--update.epochs", "1", "--evaluation.every_steps", "0")
    train(folder, "--sampler", kind, "--steps", "2", *overrides)
    table = rows(folder, probed=True)
    for row, probed in zip(table, (set(), PROBED), strict=True):
        assert {name for name in row if name.startswith("mismatch/")} == MISMATCH | probed
        assert row["mismatch/sampling_max"] < 1e-4
        assert 1e-3 < row["mismatch/staleness_mean"] < row["mismatch/staleness_max"]
        assert row["mismatch/truncation_mean"] == 0
        assert row["old_logprobs/recomputed"] == 0 < row["old_logprobs/tokens_saved"]
    assert 0 < row["mismatch/kernels_mean"] <= row["mismatch/kernels_max"] < 1e-4
    assert row["mismatch/kernels_outside"] == 0 <= row["mismatch/composition_max"] < 1e-4


def test_one_optimizer_step_leaves_no_staleness_and_truncation_is_measured(folder, kind):
    overrides = [
        *("--steps", "1", "--update.epochs", "1", "--update.minibatches", "1"),
        *("--rollout.top_k", "5", "--rollout.top_p", "0.9", "--evaluation.every_steps", "0"),
        *("--loss.correction", "truncate_token"),
    ]
    (row,) = train(folder, "--sampler", kind, *overrides)
    assert row["mismatch/staleness_mean"] == row["mismatch/staleness_max"] == 0
    # -log of the mass that was kept
    assert row["mismatch/truncation_mean"] > 0.1
    assert row["old_logprobs/recomputed"] == 0 < row["old_logprobs/tokens_saved"]
    # old_logprobs are the learner's, of the whole distribution: the ratio is 1
    assert row["kl/approx"] == 0
    assert row["mismatch/sampling_max"] > 0.1
    assert 0 < row["correction/mean"] < 1


def test_a_correction_takes_the_learners_logprobs_and_none_is_said_once(folder, capsys):
    overrides = ("--sampler", "transformers", "--steps", "2", "--evaluation.every_steps", "0")
    said = "does not correct for the sampler, since loss.correction is none"
    table = train(folder, *overrides, "--loss.correction", "mask_token", "--output_dir", "out")
    assert [row["old_logprobs/recomputed"] for row in table] == [1, 1]
    assert said not in capsys.readouterr().out
    run(
        load_config(
            folder / "config.yaml", [*overrides, "--rollout.top_k", "5", "--output_dir", "cut"]
        )
    )
    assert capsys.readouterr().out.count(said) == 1


def test_one_rollout_that_differs_decides_for_all(folder, monkeypatch):
    """A completion that the probe does not look at, of the last group."""
    generate = TransformersSampler.generate

    def with_a_wrong_logprob(self, prompts, options, *args):
        groups = generate(self, prompts, options, *args)
        for i, completion in enumerate(groups[-1]):
            if options.group_size > 1 and i == 2:
                completion.logprobs[0] -= 0.01
        return groups

    overrides = ("--sampler", "transformers", "--steps", "1", "--evaluation.every_steps", "0")
    monkeypatch.setattr(TransformersSampler, "generate", with_a_wrong_logprob)
    (row,) = train(folder, *overrides, "--probe.num_sequences", "3")
    assert row["old_logprobs/recomputed"] == 1
    assert row["mismatch/sampling_max"] == pytest.approx(0.01, abs=1e-4)


def test_the_saving_is_the_tokens_that_the_extra_forward_pass_would_read(folder):
    """Without a probe nothing shows that the sampler's logprobs could serve."""
    overrides = ("--sampler", "transformers", "--steps", "1", "--evaluation.every_steps", "0")
    run(load_config(folder / "config.yaml", [*overrides, "--output_dir", "probed"]))
    run(
        load_config(
            folder / "config.yaml",
            [*overrides, "--output_dir", "unprobed", "--probe.num_sequences", "0"],
        )
    )
    saved, spent = (
        json.loads((folder / out / "metrics.jsonl").read_text()) for out in ("probed", "unprobed")
    )
    # a prompt is read once for the completions of a micro-batch, in the update too
    assert 0 < saved["pack/shared_frac"] == spent["pack/shared_frac"] < 1
    assert 0 < saved["old_logprobs/tokens_saved"] < saved["perf/tokens"] == spent["perf/tokens"]
    assert (spent["old_logprobs/recomputed"], spent["old_logprobs/tokens_saved"]) == (1, 0)
    assert not [name for name in spent if name.startswith("mismatch/")]


def test_a_bfloat16_run_with_a_float32_head_resumes_with_its_reference(folder):
    overrides = [
        *("--sampler", "vllm", "--dtype", "bfloat16", "--lm_head_dtype", "float32"),
        *("--evaluation.every_steps", "0"),
    ]
    train(folder, *overrides, "--steps", "1")
    train(folder, *overrides, "--steps", "2", "--resume")
    table = rows(folder, probed=True)
    assert [row["step"] for row in table] == [1, 2]
    for row in table:
        assert row["kl/mean"] > 0
        # each is the last of its run
        assert 1e-4 < row["mismatch/kernels_max"] < 0.2
    # the kernels differ by more than rounding of float32: the learner scores for itself
    assert [row["old_logprobs/recomputed"] for row in table] == [1, 1]


def test_a_bfloat16_run_shares_its_weights_and_tells_what_rounding_loses(folder):
    """The float32 master weights are the optimizer's; learner and sampler are one memory."""
    overrides = ["--dtype", "bfloat16", "--update.lr", "1e-4"]
    for state in ("device", "host"):
        out = ["--output_dir", state, "--update.optimizer_state", state, "--resync", "alias"]
        run(load_config(folder / "config.yaml", ["--sampler", "vllm", *overrides, *out]))
    table = rows(folder, "device")
    assert table == rows(folder, "host")
    for row in table[1:]:
        assert row["publish/bytes"] == row["publish/extra_weight_bytes"] == 0
        assert 0 < row["update/changed_frac"] < 1
        assert row["update/rounding_lost_frac"] < 1
    # the first step has no earlier loss to make up for
    assert table[1]["update/rounding_lost_frac"] > 1e-3


def test_a_resumed_run_has_the_numbers_of_the_whole_one(folder, kind):
    run(load_config(folder / "config.yaml", ["--sampler", kind, "--output_dir", "whole"]))
    whole = rows(folder, "whole")
    train(folder, "--sampler", kind, "--steps", "2")
    train(folder, "--sampler", kind, "--steps", "4", "--resume", "true")
    parts = rows(folder)
    assert [row["step"] for row in parts] == [0, 1, 2, 3, 4]
    assert whole == parts


def test_a_failing_reward_leaves_a_checkpoint_that_resumes_without_a_row(folder, capsys):
    train(folder, "--sampler", "transformers", "--steps", "2")
    (folder / "fail").touch()
    with pytest.raises(RewardError, match="the reward was told to fail"):
        train(folder, "--sampler", "transformers", "--resume", "true")
    (folder / "fail").unlink()
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[1:]))
    table = train(folder, "--sampler", "transformers", "--resume", "true")
    assert [row["step"] for row in table] == [0, 1, 2, 3, 4]
    assert "data.train is not what the checkpoint was trained on: 1 rows" in capsys.readouterr().out


def test_a_run_that_ends_within_an_evaluation_makes_up_for_it(folder, monkeypatch):
    """At step 0, whose checkpoint is saved before it, and at step 2."""
    settings = ["--sampler", "transformers", "--steps", "3"]
    run(load_config(folder / "config.yaml", [*settings, "--output_dir", "whole"]))
    evaluate = Rollouts.evaluate

    def interrupted(self, step):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, step)

    monkeypatch.setattr(Rollouts, "evaluate", interrupted)
    for at in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            train(folder, *settings, "--resume")
        assert not any(row["step"] == at and "eval/accuracy" in row for row in rows(folder))
        assert [path.name for path in (folder / "out/checkpoints").iterdir()][-1:]
    at = -1
    assert train(folder, *settings, "--resume") == rows(folder, "whole")


def test_a_diverged_policy_is_not_saved(folder):
    settings = ["--sampler", "transformers", "--update.epochs", "1", "--update.minibatches", "1"]
    settings += ["--checkpoint.every_steps", "1", "--evaluation.every_steps", "0"]
    with pytest.raises(TrainingError, match="step 1 is not saved.*last good one, step-000000"):
        train(folder, *settings, "--update.lr", "1e8")
    assert [path.name for path in (folder / "out/checkpoints").iterdir()] == ["step-000000"]


def command(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "warpo.engine.cli", "train", "config.yaml", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


@pytest.mark.parametrize(
    ("kind", "number"), [("vllm", signal.SIGINT), ("transformers", signal.SIGTERM)]
)
def test_an_interrupt_leaves_a_checkpoint_and_exits_130(folder, kind, number):
    process = command(folder, "--sampler", kind, "--steps", "100000")
    metrics = folder / "out/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "--resume continues after it" in output
    saved = max(int(p.name[5:]) for p in (folder / "out/checkpoints").iterdir())
    assert rows(folder)[-1]["step"] == saved >= 2
    table = train(folder, "--sampler", kind, "--resume", "true", "--steps", str(saved + 1))
    assert [row["step"] for row in table] == list(range(saved + 2))


def test_bad_input_is_refused_in_one_line_before_a_model_is_loaded(folder):
    (folder / "train.jsonl").write_text('{"prompt": "t9", "word": "1"}\n{"prompt": }\n')
    process = command(folder)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "train.jsonl:2" in output and "Traceback" not in output


def test_an_evaluation_of_several_samples_estimates_pass_at_k(folder, kind):
    evaluation = ("--evaluation.every_steps", "1", "--evaluation.samples", "6", "--data.eval", "4")
    success = ("--reward.success", "0.6")
    table = train(folder, "--sampler", kind, "--steps", "1", *evaluation, *success)
    assert len(table) == 2
    for row in table:
        passed = [row[f"eval/pass@{k}"] for k in (1, 2, 4, 6)]
        assert row["eval/accuracy"] == pytest.approx(passed[0])
        assert passed == sorted(passed) and 0 < passed[0] < passed[-1] <= 1
        # A count of 4 prompts x 6 completions, and one of prompts.
        assert passed[0] * 24 == pytest.approx(round(passed[0] * 24))
        assert passed[-1] * 4 == pytest.approx(round(passed[-1] * 4))
