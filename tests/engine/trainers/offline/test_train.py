"""Whole runs from given data, on the small arithmetic model: every example learns."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers

from tests.engine.trainers.offline.runs import make_task, rows, train
from warpo.engine.config.offline import LOSS_KEYS
from warpo.engine.data.examples import load_examples
from warpo.engine.errors import CheckpointError, ConfigError, DataError, TrainingError
from warpo.engine.learner.losses import sequence_scores
from warpo.engine.models.batch import pack
from warpo.engine.models.files import load_tokenizer
from warpo.engine.models.scalar import load_scalar_model
from warpo.engine.types import TokenSequence

SHORT = ["--steps", "15", "--evaluation.every_steps", "15", "--evaluation.max_examples", "100"]
POLICY = ["--update.lr", "2e-4", "--update.warmup_steps", "2"]
# Held-out accuracy, and growth of the held-out margin, that 15 steps reach on the small task.
REACHED = {
    "dpo": (0.65, 0.5),
    "ipo": (0.7, 0.15),
    "conservative_dpo": (0.65, 0.45),
    "robust_dpo": (0.65, 0.5),
    "hinge": (0.65, 0.5),
    "slic": (0.8, 1.5),
    "simpo": (0.75, 1.5),
    "orpo": (0.75, 0.02),
    "dpo_nll": (0.75, 0.15),
    "kto": (None, 0.6),
    "bradley_terry": (0.6, 0.2),
    "k_wise": (0.6, 0.1),
    # 0.003 to 0.011 with six seeds
    "process_reward": (0.75, 0.002),
}
# One of each kind of data, with a reference and without. The others differ by their loss alone,
# whose value and gradient test_losses compares with the paper's.
FAST = ("dpo", "simpo", "kto", "bradley_terry", "k_wise", "process_reward")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """The task, and in `start` a model that has begun to imitate the careless pupil."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    train("sft", folder, folder / "sft", "--steps", "60", "--batch_size", "32")
    (folder / "start").symlink_to(folder / "sft/checkpoints/step-000060")
    return folder


def test_every_row_is_trained():
    assert set(REACHED) | {"sft"} == set(LOSS_KEYS)


def test_sft_learns_and_leaves_a_model_that_transformers_loads(task):
    found = rows(task / "sft")
    assert found[0]["eval/loss"] > 3 and found[-1]["eval/loss"] < 1.3, found[-1]
    assert found[-1]["lr"] == pytest.approx(1e-3 / 60)
    assert (task / "sft/learning.png").stat().st_size > 0
    model = transformers.AutoModelForCausalLM.from_pretrained(task / "start")
    tokenizer = load_tokenizer(str(task / "start"))
    assert tokenizer.chat_template and model.generation_config.eos_token_id is not None
    ids = tokenizer("12+34=", return_tensors="pt").input_ids
    written = tokenizer.decode(model.generate(ids, max_new_tokens=5)[0, ids.shape[1] :])
    assert written.endswith("<eos>")


@pytest.mark.parametrize(
    "algorithm",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in REACHED],
)
def test_every_row_reaches_its_accuracy_and_margin(task, tmp_path, algorithm):
    policy = algorithm not in ("bradley_terry", "k_wise", "process_reward")
    found = train(algorithm, task, tmp_path / "out", *SHORT, *(POLICY if policy else []))
    first, last = found[0], found[-1]
    accuracy, margin = REACHED[algorithm]
    assert last["eval/loss"] < first["eval/loss"]
    assert accuracy is None or last["eval/accuracy"] >= accuracy, last
    assert last["eval/margin"] - first["eval/margin"] >= margin, last


@pytest.mark.parametrize("algorithm", ["kto", "bradley_terry"])
def test_a_resumed_run_has_the_numbers_of_the_whole_one(task, tmp_path, algorithm):
    settings = ["--steps", "6", "--checkpoint.every_steps", "3", "--evaluation.every_steps", "2"]
    settings += ["--update.warmup_steps", "2", "--evaluation.max_examples", "20"]
    whole = train(algorithm, task, tmp_path / "out", *settings)
    saved = tmp_path / "out/checkpoints/step-000006"
    weights = (saved / "model.safetensors").read_bytes()
    settings_of_model = (saved / "config.json").read_bytes()
    shutil.rmtree(saved)
    assert train(algorithm, task, tmp_path / "out", *settings, "--resume") == whole
    assert (saved / "model.safetensors").read_bytes() == weights
    assert (saved / "config.json").read_bytes() == settings_of_model


def test_ctrl_c_leaves_a_checkpoint_that_resumes(task, tmp_path):
    settings = ["--steps", "30", "--evaluation.every_steps", "0", "--update.schedule", "constant"]

    def interrupt() -> None:
        metrics = tmp_path / "out/metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        train("sft", task, tmp_path / "out", *settings)
    watcher.join()
    stopped = rows(tmp_path / "out")
    last = stopped[-1]["step"]
    assert 2 <= last < 30
    assert (tmp_path / f"out/checkpoints/step-{last:06d}/model.safetensors").exists()
    settings[1] = str(last + 1)
    resumed = train("sft", task, tmp_path / "out", *settings, "--resume")
    assert resumed[:-1] == stopped and resumed[-1]["step"] == last + 1


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(task, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(task / "model", broken)
    model = transformers.AutoModelForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data.fill_(1e38)
    model.save_pretrained(broken)
    with pytest.raises(TrainingError, match="gradient norm is nan"):
        steps = ["--steps", "2", "--evaluation.every_steps", "0"]
        train("sft", task, tmp_path / "out", "--model", str(broken), *steps)
    assert (tmp_path / "out/checkpoints/step-000000").is_dir()
    model.model.norm.weight.data.fill_(torch.inf)
    model.save_pretrained(broken)
    with pytest.raises(ConfigError, match="model: its weight model.norm.weight is not finite"):
        train("sft", task, tmp_path / "out2", "--model", str(broken), "--steps", "2")


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_a_diverged_state_is_not_saved_and_the_last_good_one_stays(task, tmp_path, algorithm):
    settings = ["--evaluation.every_steps", "0", "--update.warmup_steps", "0", "--batch_size", "4"]
    settings += ["--checkpoint.every_steps", "1", "--checkpoint.keep", "1"]
    train(algorithm, task, tmp_path / "out", *settings, "--steps", "1")
    refusal = (
        "step . is not saved, since the run has diverged.*"
        "--resume from the last good one, step-000001"
    )
    settings += ["--steps", "9", "--resume"]
    for lr in ("1e20", "1e8"):
        with pytest.raises(TrainingError, match=refusal):
            train(algorithm, task, tmp_path / "out", *settings, "--update.lr", lr)
        assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-000001"]


def test_resuming_with_other_data_is_refused_and_with_fewer_rows_told(task, tmp_path, capsys):
    settings = ["--steps", "1", "--evaluation.every_steps", "0"]
    train("sft", task, tmp_path / "out", *settings)
    other = str(task / "warm_start_eval.jsonl")
    settings[1] = "2"
    with pytest.raises(CheckpointError, match="data.train has none of the 512 prompts"):
        train("sft", task, tmp_path / "out", *settings, "--resume", "--data.train", other)
    lines = (task / "warm_start.jsonl").read_text().splitlines(keepends=True)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(lines[3:]))
    train("sft", task, tmp_path / "out", *settings, "--resume", "--data.train", str(fewer))
    assert (
        "data.train is not what the checkpoint was trained on: 3 rows are"
        in capsys.readouterr().out
    )


def test_bad_data_is_refused_before_a_model_is_loaded(task, tmp_path):
    wrong = ["--data.train", str(task / "kto.jsonl"), "--steps", "1"]
    with pytest.raises(DataError, match="kto.jsonl:1: the field 'chosen' is missing"):
        train("dpo", task, tmp_path / "out", *wrong)


@pytest.mark.parametrize("algorithm", ["bradley_terry", "k_wise"])
def test_the_mean_reward_of_the_training_completions_is_zero(task, tmp_path, algorithm):
    settings = ["--steps", "4", "--evaluation.every_steps", "0", "--update.warmup_steps", "1"]
    train(algorithm, task, tmp_path / "out", *settings)
    saved = str(tmp_path / "out/checkpoints/step-000004")
    model, tokenizer = (
        load_scalar_model(saved, "float32", torch.device("cpu")),
        load_tokenizer(saved),
    )
    data = {"bradley_terry": "preference", "k_wise": "rankings"}[algorithm]
    examples = load_examples(
        task / f"{data}.jsonl", tokenizer, algorithm, token_budget=1000, max_length=64
    )
    sequences = [(e.prompt_ids, ids) for e in examples for ids in e.completions]
    batch = pack([TokenSequence.of(prompt, ids) for prompt, ids in sequences])
    with torch.no_grad():
        scores = sequence_scores(model, batch)
    assert model.config.reward_bias != 0
    assert scores.mean().abs() < 1e-5
    # transformers, with padding: the score without the bias of the config
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
    padded = tokenizer.pad(
        {"input_ids": [[*prompt, *ids] for prompt, ids in sequences[:7]]},
        padding_side="right",
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = plain(**padded).logits[:, 0] + plain.config.reward_bias
    torch.testing.assert_close(logits, scores[:7], rtol=1e-4, atol=1e-5)


def test_a_process_reward_model_knows_its_separator(task, tmp_path):
    settings = ["--steps", "1", "--evaluation.every_steps", "0", "--update.warmup_steps", "0"]
    train("process_reward", task, tmp_path / "out", *settings)
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "out/checkpoints/step-000001")
    assert (saved.step_separator, saved.reward_bias, saved.num_labels) == ("", 0.0, 1)
