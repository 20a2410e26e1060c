"""What is left to the machine: decided by the kind of device and its free bytes, never here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.preflight.test_check import make_run
from tests.engine.runs import make_folder
from tests.engine.runs import train as train_policy
from tests.engine.trainers.offline.runs import make_task, read_example, train
from warpo.engine.config.policy import Config, load_config
from warpo.engine.errors import ConfigError
from warpo.engine.models.files import read_config
from warpo.engine.plan.kv_cache import cache_beside, filled_bytes
from warpo.engine.plan.memory import plan_memory
from warpo.engine.plan.settle import checkpointing_for, dtype_for, settle, step_peak
from warpo.engine.preflight import check
from warpo.engine.run.process import expand_segments
from warpo.engine.trainers.offline.memory import offline_peak

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


def test_weights_are_bfloat16_on_cuda() -> None:
    assert [dtype_for(kind) for kind in ("cuda", "cpu")] == ["bfloat16", "float32"]


def test_the_kv_cache_takes_what_a_step_leaves_of_nine_tenths_of_a_gpu() -> None:
    gib = 2**30
    assert cache_beside(20 * gib, 100 * gib, 0) == 70
    assert cache_beside(20 * gib + 1, 100 * gib, 0) == 69.75
    assert cache_beside(20 * gib, 100 * gib, 3 * gib + 1) == 3.25


def test_the_kv_cache_is_no_larger_than_what_the_sequences_fill(config: Config) -> None:
    model = read_config(config.model)
    token = 2 * 4 * 2 * model.num_key_value_heads * model.hidden_size // model.num_attention_heads
    vllm = replace(config, sampler="vllm")
    # 8 prompts x 4 completions of 128 tokens in blocks of 32, and a block of vLLM's own
    assert filled_bytes(vllm, model, CPU) == 8 * 4 * (128 + 32) * token
    assert filled_bytes(config, model, CPU) == 0


def test_a_gpu_without_room_for_a_kv_cache_is_refused() -> None:
    message = r"kv_cache_gib = 'auto': the GPU has 80\.0 GiB free, and sampling takes 71\.9 without"
    with pytest.raises(ConfigError, match=message):
        cache_beside(int(71.9 * 2**30), 80 * 2**30, 0)


def test_a_config_is_settled_once(config: Config) -> None:
    given = replace(
        config, device="cpu", dtype="auto", rollout=replace(config.rollout, kv_cache_gib="auto")
    )
    settled, said = settle(replace(given, sampler="vllm"))
    assert said == (
        "auto on cpu: dtype = float32, update.activation_checkpointing = none, "
        "rollout.kv_cache_gib = 4"
    )
    assert (settled.dtype, settled.rollout.kv_cache_gib) == ("float32", 4)
    assert settled.update.activation_checkpointing == "none"
    assert settle(settled) == (settled, "")
    assert "kv_cache_gib" not in settle(given)[1]


def test_a_shared_copy_of_two_dtypes_is_refused_when_they_are_settled(config: Config) -> None:
    given = replace(
        config,
        device="cpu",
        dtype="auto",
        resync="alias",
        rollout=replace(config.rollout, dtype="bfloat16"),
    )
    with pytest.raises(ConfigError, match="'auto' is float32 here: resync = 'alias' needs one"):
        settle(given)


def test_a_run_writes_down_and_resumes_what_was_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(make_folder(tmp_path))
    words = ["--sampler", "transformers", "--device", "cpu", "--dtype", "auto", "--steps"]
    train_policy(tmp_path, *words, "1")
    assert "auto on cpu: dtype = float32, update.activation_checkpointing = none" in (
        capsys.readouterr().out
    )
    written = (tmp_path / "out/config.yaml").read_text()
    assert "dtype: float32" in written and "activation_checkpointing: none" in written
    train_policy(tmp_path, *words, "2", "--resume")
    with pytest.raises(ConfigError, match="dtype = bfloat16, but the run in .* dtype = float32"):
        train_policy(tmp_path, *words, "3", "--resume", "--dtype", "bfloat16")


def test_check_says_what_was_settled(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    given = replace(config, output_dir=config.output_dir + "-checked", device="cpu", dtype="auto")
    check.run(given, plan_only=True)
    assert capsys.readouterr().out.startswith("auto on cpu: dtype = float32")


def test_segments_are_expandable_unless_the_user_has_configured_the_allocator() -> None:
    plain: dict[str, str] = {}
    expand_segments(plain)
    assert plain == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        own = {name: "max_split_size_mb:512"}
        expand_segments(own)
        assert own == {name: "max_split_size_mb:512"}


def test_train_configures_the_allocator_before_torch_loads(config: Config) -> None:
    code = (
        "import sys; from warpo.engine import cli, commands; "
        "commands.expand_segments = lambda: sys.exit(4 if 'torch' in sys.modules else 3); "
        f"cli.main(['train', '{Path(config.model).parent}/config.yaml'])"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 3


def test_the_plan_knows_that_layers_keep_their_input_only(config: Config) -> None:
    block = replace(config, update=replace(config.update, activation_checkpointing="block"))
    plain, twice = (plan_memory(c, [8, 40], CPU, "alias").phases for c in (config, block))
    assert twice.pop("update") < plain.pop("update")
    assert twice == plain
    assert step_peak(block, CPU) < step_peak(config, CPU)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "kto", "bradley_terry", "process_reward"])
def test_a_step_of_given_data_is_planned(task: Path, algorithm: str) -> None:
    none, block = (
        offline_peak(
            read_example(
                *(algorithm, task, task / "out", "--dtype", "float32"),
                *("--update.activation_checkpointing", setting),
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
