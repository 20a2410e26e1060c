"""What is left to the machine: decided by the kind of device and its free bytes, never here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.preflight.test_check import make_run
from tests.engine.trainers.offline.runs import make_task, read_example, train
from warpo.engine.config.policy import Config, load_config
from warpo.engine.preflight.memory import plan_memory
from warpo.engine.preflight.settle import checkpointing_for, settle, step_peak

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = make_run(tmp_path_factory.mktemp("run"), vocab_size=64, kv_cache_gib=0.03)
    return load_config(folder / "config.yaml", ["--sampler", "transformers"])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_task(tmp_path_factory.mktemp("task"))
    (folder / "start").symlink_to(folder / "model")
    return folder


def test_layers_are_checkpointed_on_cuda_where_a_step_without_it_does_not_fit() -> None:
    assert checkpointing_for("cuda", peak=100, free=100) == "none"
    assert checkpointing_for("cuda", peak=101, free=100) == "block"
    assert checkpointing_for("cpu", peak=101, free=100) == "none"


def test_a_config_is_settled_once(config: Config) -> None:
    settled, said = settle(replace(config, device="cpu"))
    assert (settled.update.activation_checkpointing, said) == ("none", [])
    assert settle(settled) == (settled, [])


def test_the_plan_knows_that_layers_keep_their_input_only(config: Config) -> None:
    block = replace(config, update=replace(config.update, activation_checkpointing="block"))
    plain, twice = (plan_memory(c, [8, 40], CPU, "alias").phases for c in (config, block))
    assert twice.pop("update") < plain.pop("update")
    assert twice == plain
    assert step_peak(block, CPU) < step_peak(config, CPU)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "kto", "bradley_terry", "process_reward"])
def test_a_step_of_given_data_is_planned(task: Path, algorithm: str) -> None:
    none, block = (
        step_peak(
            read_example(
                algorithm, task, task / "out", "--update.activation_checkpointing", setting
            ),
            CPU,
        )
        for setting in ("none", "block")
    )
    assert block < 0.7 * none


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "bradley_terry"])
def test_given_data_are_learned_with_the_same_numbers(
    task: Path, tmp_path: Path, algorithm: str
) -> None:
    found = [
        train(
            *(algorithm, task, tmp_path / name, "--steps", "2", "--update.warmup_steps", "0"),
            *("--evaluation.every_steps", "0", "--update.activation_checkpointing", name),
        )
        for name in ("none", "block")
    ]
    assert found[0] == found[1]
