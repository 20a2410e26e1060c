"""`warpo check`: on real vLLM, and that it catches what it is there to catch."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from tests.engine.random_models import COMMON
from warpo.engine import cli
from warpo.engine.config.policy import load_config
from warpo.engine.learner import step
from warpo.engine.learner.optimizer import AdamW
from warpo.engine.models import model as models
from warpo.engine.plan.memory import PHASES, plan_memory
from warpo.engine.preflight import invariance
from warpo.engine.preflight.invariance import (
    LAYOUTS,
    REPEATED_BOUND,
    divergences,
    load_cut_model,
    repeated_divergence,
)
from warpo.engine.types import TokenSequence
from warpo.kernels.objectives import OBJECTIVES

CONFIG = """
model: {folder}/model
output_dir: {folder}/out
dtype: float32
steps: 4
data: {{train: {folder}/train.jsonl}}
reward: {{sources: "some_rewards:length", deadline_s: 60}}
rollout:
  {{prompts_per_step: 8, group_size: 4, max_new_tokens: 64, max_model_len: 128,
  kv_cache_gib: {kv}}}
algorithm: grpo
loss: {{kl_coef: 0.01}}
update: {{lr: 1e-3, token_budget: 1024}}
probe: {{tolerance: 1e-3}}
"""


def make_run(folder: Path, vocab_size: int, kv_cache_gib: float, **sizes: int) -> Path:
    """A random Qwen2 with its tokenizer, data and a reward function, as a user has them."""
    vocabulary = {f"t{i}": i for i in range(2, vocab_size)} | {"<pad>": 0, "<eos>": 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t3"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder / "model")
    hf_config = transformers.Qwen2Config(
        vocab_size=vocab_size, tie_word_embeddings=True, **(COMMON | sizes)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    rng = random.Random(0)
    prompts = [
        " ".join(f"t{rng.randrange(2, vocab_size)}" for _ in range(rng.randrange(8, 64)))
        for _ in range(16)
    ]
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    (folder / "some_rewards.py").write_text(
        "def length(completions):\n    return [float(len(text)) for text in completions]\n"
    )
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder, kv=kv_cache_gib))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path, vocab_size=64, kv_cache_gib=0.03)


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "warpo.engine.cli", "check", "config.yaml", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module", params=["qwen2", "qwen2-untied"])
def cut(request, model_path):
    return load_cut_model(model_path(request.param), some_sequences(), torch.device("cpu"))


@pytest.fixture
def model(cut):
    return cut[0]


@pytest.fixture
def sequences(cut):
    return cut[1]


def some_sequences() -> list[TokenSequence]:
    rng = random.Random(0)
    return [
        TokenSequence.of(
            [rng.randrange(64) for _ in range(prompt)],
            [rng.randrange(64) for _ in range(completion)],
        )
        for prompt, completion in [(3, 9), (12, 4), (5, 17), (2, 1), (7, 12)]
    ]


OPTIONS = dict(temperature=0.7, max_new_tokens=17)


def test_gradients_agree_between_layouts_for_every_objective(model, sequences):
    found = divergences(model, sequences, OBJECTIVES, **OPTIONS)
    assert len(found) == len(OBJECTIVES) * len(LAYOUTS)
    assert all(d.relative <= LAYOUTS[d.layout] for d in found), found


def per_micro_batch(model, batches, objective, **options):
    """The denominator counted in each micro-batch, https://github.com/huggingface/trl/issues/6024"""
    for batch in batches:
        ORIGINAL(model, [batch], objective, **options)


def mean_of_means(model, batches, objective, **options):
    per_micro_batch(model, batches, objective, **options)
    for parameter in model.parameters():
        parameter.grad /= len(batches)


ORIGINAL = step.accumulate_gradients


@pytest.mark.parametrize("fault", [per_micro_batch, mean_of_means])
@pytest.mark.parametrize("objective", ["dapo", "grpo", "dr_grpo"])
def test_a_denominator_that_depends_on_the_split_is_caught(
    model, sequences, monkeypatch, fault, objective
):
    monkeypatch.setattr(invariance, "accumulate_gradients", fault)
    found = divergences(model, sequences, {objective: OBJECTIVES[objective]}, **OPTIONS)
    split = [d.relative for d in found if d.layout in ("accumulation n", "packed")]
    # the mean of means of one sequence each is their mean
    harmless = fault is mean_of_means and objective != "dapo"
    assert min(split) > 1e-2 or (harmless and split[0] <= LAYOUTS["packed"] < split[1]), found


@pytest.mark.parametrize("only_segments", [False, True])
def test_attention_across_rollouts_is_caught(model, sequences, monkeypatch, only_segments):
    forward = models.forward

    def leaking(model, batch, **options):
        whole = torch.arange(batch.input_ids.numel())
        across = replace(batch, segments=((0, len(whole), len(whole)),))
        if not only_segments:
            end = torch.full_like(whole, len(whole))
            across = replace(across, gather_index=whole[None], scatter_index=whole, subtree_end=end)
        return forward(model, across, **options)

    monkeypatch.setattr(models, "forward", leaking)
    found = divergences(model, sequences, {"dapo": OBJECTIVES["dapo"]}, **OPTIONS)
    # where everything leaks, one micro-batch does so in the same way by segments
    caught = [d.relative for d in found if (d.layout == "segments") == only_segments]
    assert min(caught) > 1e-2, found


@pytest.mark.parametrize("accumulates", [True, False], ids=["float32", "bfloat16"])
def test_gradients_of_bfloat16_weights_accumulate_in_float32(model_path, monkeypatch, accumulates):
    """In bfloat16 they would be off by 8e-3 at 16 micro-batches, and by 8e-2 at 256."""
    if not accumulates:
        monkeypatch.setattr(invariance, "float32_gradients", lambda parameters: None)
    model, sequences = load_cut_model(
        model_path("qwen2"), some_sequences(), torch.device("cpu"), torch.bfloat16
    )
    found = repeated_divergence(model, sequences, OBJECTIVES["grpo"], **OPTIONS)
    assert (found <= REPEATED_BOUND) is accumulates, found


def test_check_passes_on_a_sound_config(folder):
    result = command(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        "ok    resync alias      0 bytes copied after an update, 0 bytes of weights"
        in result.stdout
    )
    for name in (
        "fits",
        "probe",
        "composition",
        "attention",
        "load",
        "sample",
        "score",
        "update",
        "publish",
        *LAYOUTS,
    ):
        assert f"ok    {name}" in result.stdout
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_what_fails_is_named_with_its_cure_and_exits_1(folder):
    result = command(folder, "--probe.tolerance", "1e-12")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAIL  probe" in result.stdout
    assert "the sampler does not compute what the learner does" in result.stdout
    assert "FAIL  attention" in result.stdout
    assert result.stdout.count("FAIL") == 2


def test_help_teaches_and_wrong_usage_exits_2(capsys):
    assert cli.main(["check", "--help"]) == 0
    assert "warpo check CONFIG.yaml --plan-only" in capsys.readouterr().out
    assert cli.main(["check"]) == 2
    assert "warpo check: the first argument is the YAML file" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_held_is_exact_and_alias_mode_holds_the_weights_once(folder, dtype):
    config = load_config(folder / "config.yaml", ["--dtype", dtype])
    lengths = [8, 40]
    copied = plan_memory(config, lengths, torch.device("cpu"), resync="copy")
    aliased = plan_memory(config, lengths, torch.device("cpu"), resync="alias")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert copied.held["learner weights"] == copied.held["sampler weights"] == weights
    assert copied.held["reference weights"] == weights
    assert copied.held["KV cache"] == int(0.03 * 2**30)
    assert copied.held["optimizer state"] == sum(
        state.nbytes
        for states in stepped(model).state.values()
        for name, state in states.items()
        if name != "step"
    )
    for phase in PHASES:
        assert copied.phases[phase] - aliased.phases[phase] == weights


def test_the_micro_batch_of_pairs_that_is_planned_has_both_of_each(folder):
    odd = ["--rollout.prompts_per_step", "3", "--rollout.group_size", "3"]
    odd += ["--update.minibatches", "1", "--update.token_budget", "5000"]
    for algorithm, sequences in (("dapo", 9), ("iterative_dpo", 8)):
        words = ["--algorithm", algorithm, *odd, "--loss.kl_coef", "0.1"]
        config = load_config(folder / "config.yaml", words)
        plan = plan_memory(config, [8], torch.device("cpu"), resync="alias")
        assert plan.shape.sequences == sequences


def test_critic_and_reward_models_are_held(folder):
    ppo = ["--algorithm", "ppo", "--loss.kl_coef", "0.01"]
    reward_model = ["--reward.sources", f"model:{folder}/model"]
    plans = {
        name: plan_memory(
            load_config(folder / "config.yaml", words), [8], torch.device("cpu"), resync="alias"
        ).held
        for name, words in {
            "grpo": [],
            "own": ppo,
            "shared": [*ppo, "--critic.model", "shared"],
            "model": [*ppo, *reward_model],
        }.items()
    }
    trunk = transformers.AutoModel.from_pretrained(folder / "model")
    weights = sum(parameter.nbytes for parameter in trunk.parameters())
    assert "critic weights" not in plans["grpo"] and "critic weights" not in plans["shared"]
    assert plans["own"]["critic weights"] == weights
    assert plans["own"]["optimizer state"] - plans["shared"]["optimizer state"] == 2 * weights
    hidden = trunk.config.hidden_size
    assert plans["model"]["reward models"] == weights + 4 * hidden


def stepped(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
    optimizer.step()
    return optimizer


def test_the_plan_alone_loads_no_model(folder, capsys):
    assert cli.main(["check", "config.yaml", "--plan-only"]) == 0
    output = capsys.readouterr().out
    assert "peak of update" in output and "ok    fits" in output


def test_a_run_that_does_not_fit_is_refused_before_it_starts(folder, capsys):
    assert cli.main(["check", "config.yaml", "--rollout.kv_cache_gib", "100000"]) == 1
    output = capsys.readouterr().out
    assert "FAIL  fits" in output and "rollout.kv_cache_gib" in output
    assert "measured" not in output


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_the_memory_plan_holds_within_5_percent(tmp_path, checkpointing):
    """123 M parameters: what a process holds beside tensors is small against them."""
    sizes = dict(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=32, num_attention_heads=8
    )
    folder = make_run(tmp_path, vocab_size=32000, kv_cache_gib=0.25, **sizes)
    result = command(folder, "--update.activation_checkpointing", checkpointing)
    assert result.returncode == 0, result.stdout + result.stderr
    differences = re.findall(r"difference .*\(([-+][0-9.]+)%\)", result.stdout)
    assert len(differences) == 5
    assert max(abs(float(percent)) for percent in differences) <= 5, result.stdout
