"""Pre-training data in the policy's step: the gamma E[log pi] of InstructGPT's PPO-ptx."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM

from tests.engine.learner.test_critic import rollouts
from tests.engine.runs import train
from warpo.engine.config.policy import load_config
from warpo.engine.data.pretraining import load_pretraining
from warpo.engine.errors import DataError
from warpo.engine.learner.learner import Learner
from warpo.engine.learner.losses import supervised_gradients
from warpo.engine.learner.step import accumulate_gradients
from warpo.engine.models.files import load_tokenizer
from warpo.engine.models.score import score
from warpo.engine.run.log import NoLog
from warpo.engine.run.loop import Run
from warpo.engine.trainers.policy.build import build

COEF = 0.75


@pytest.fixture
def ptx(folder: Path) -> Iterator[Learner]:
    """Learner of a run of ppo_ptx before its first step.

    It has 20 examples of one to five tokens and their end.
    """
    lines = [
        {"prompt": f"t{9 + i} t8", "completion": " ".join(f"t{20 + j}" for j in range(1 + i % 5))}
        for i in range(20)
    ]
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [
        *("--algorithm", "ppo_ptx", "--sampler", "transformers", "--critic.model", "shared"),
        *("--pretraining.data", "examples.jsonl", "--pretraining.coef", str(COEF)),
    ]
    config = load_config(folder / "config.yaml", words)
    with build(config, Run(log=NoLog())) as (_, learner, _):
        yield learner


def test_the_gradient_is_that_of_the_policy_and_coef_times_the_supervised_one(
    ptx: Learner, folder: Path
) -> None:
    made, model = rollouts(), ptx.model
    rows = range(len(made))
    batches = [made.batch(rows[:3]), made.batch(rows[3:])]
    names = [name for name, _ in model.named_parameters()]

    accumulate_gradients(
        model,
        batches,
        ptx.algorithm.objective,
        temperature=1.0,
        max_new_tokens=6,
        critic=ptx.critic,
    )
    policy = {name: p.grad.double() for name, p in model.named_parameters()}
    ptx.optimizer.zero_grad()

    # as many examples as rollouts, each alone, through plain transformers in float64
    drawn = ptx.pretraining.batches(len(made), step=1, update=0)
    assert sum(batch.num_sequences for batch in drawn) == len(made)
    plain = AutoModelForCausalLM.from_pretrained(folder / "model").double()
    losses, count = [], 0
    for batch in drawn:
        starts = batch.cu_seqlens.tolist()
        for i, index in enumerate(batch.gather_index):
            length = starts[i + 1] - starts[i]
            total = int(batch.position_ids[0, index].max()) + 1
            ids = batch.input_ids[0, index][:total][None]
            logp = plain(ids).logits[0, -length - 1 : -1].log_softmax(-1)
            losses.append(-logp.gather(1, ids[0, -length:, None]).sum())
            assert ids[0, -1] == ptx.tokenizer.eos_token_id
            count += length
    loss = torch.stack(losses).sum() / count
    loss.backward()
    supervised = {name: p.grad for name, p in plain.named_parameters()}

    found = {}
    ptx.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    result = ptx.train_step(batches, 1, 0)
    assert result.pretraining.item() == pytest.approx(COEF * loss.item(), rel=1e-5)
    largest = max(gradient.abs().max().item() for gradient in supervised.values())
    assert largest > 0
    for name in names:
        expected = policy[name] + COEF * supervised[name]
        torch.testing.assert_close(
            found[name].double(), expected, rtol=0, atol=2e-5 * max(1, largest), msg=name
        )


def test_a_sum_per_sequence_is_divided_by_the_sequences(ptx: Learner) -> None:
    batches = ptx.pretraining.batches(7, step=1, update=0)
    losses = {}
    for aggregation in ("token-mean", "sequence-mean-token-sum"):
        with torch.no_grad():
            losses[aggregation] = supervised_gradients(
                ptx.model, batches, coef=COEF, aggregation=aggregation
            ).item()
    nll = -torch.cat([score(ptx.model, batch, 1.0) for batch in batches])
    assert losses["token-mean"] == pytest.approx(COEF * nll.mean().item(), rel=1e-5)
    sums = losses["sequence-mean-token-sum"]
    assert sums == pytest.approx(COEF * nll.sum().item() / 7, rel=1e-5)


TEXTS = [{"text": "t20 t21 t22"}, {"text": "t9"}, {"text": "t20 t21 t22"}, {"text": "t30 <eos>"}]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_of_a_text_every_token_is_learned_that_something_comes_before(folder: Path) -> None:
    path = write(folder / "texts.jsonl", TEXTS)
    limits = {"token_budget": 99, "max_length": 99}
    tokenizer = load_tokenizer(str(folder / "model"))
    found = load_pretraining(path, tokenizer, **limits)
    assert [(e.prompt_ids, e.completions) for e in found] == [
        *[([20], [[21, 22, 1]]), ([9], [[1]]), ([20], [[21, 22, 1]]), ([30], [[1]])],
    ]
    # one that begins sequences is not learned, and all of the text is
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="t2 $A", special_tokens=[("t2", 2)]
    )
    assert [e.prompt_ids for e in load_pretraining(path, tokenizer, **limits)] == [[2]] * 4

    for row, message in (
        ({"text": 3}, r"texts.jsonl:5: text must be text, got int"),
        ({"text": "t1 " * 100}, r"texts.jsonl:5: .* of 101 tokens, the model has positions for 99"),
        ({"text": ""}, r"texts.jsonl:5: text is empty"),
        ({"prompt": "t1"}, r"texts.jsonl:5: the field 'text' is missing"),
        ({"text": "<eos>"}, r"texts.jsonl:5: the text is the end-of-sequence token alone"),
    ):
        write(folder / "texts.jsonl", [*TEXTS, row])
        with pytest.raises(DataError, match=message):
            load_pretraining(path, load_tokenizer(str(folder / "model")), **limits)
    write(folder / "texts.jsonl", [{"words": "t1"}])
    with pytest.raises(DataError, match="the field 'prompt' is missing"):
        load_pretraining(path, load_tokenizer(str(folder / "model")), **limits)


def test_a_policy_learns_from_texts_and_goes_on_as_the_whole_run(folder: Path) -> None:
    write(folder / "texts.jsonl", TEXTS)
    words = [
        *("--algorithm", "grpo", "--pretraining.data", "texts.jsonl", "--pretraining.coef", "1"),
        *("--pretraining.aggregation", "sequence-mean-token-sum", "--sampler", "transformers"),
        *("--evaluation.every_steps", "0", "--update.lr", "1e-2"),
    ]
    whole = train(folder, *words, "--steps", "2")
    assert whole[0]["loss/pretraining"] > whole[1]["loss/pretraining"] > 0
    shutil.rmtree(folder / "out")
    train(folder, *words, "--steps", "1")
    assert train(folder, *words, "--steps", "2", "--resume") == whole


def test_examples_are_drawn_by_seed_step_and_update_alone(ptx: Learner) -> None:
    def drawn(step: int, update: int) -> list[int]:
        batches = ptx.pretraining.batches(6, step, update)
        return [token for batch in batches for token in batch.input_ids[0].tolist()]

    first = drawn(1, 0)
    assert first != drawn(1, 1) != drawn(2, 0)
    assert drawn(1, 0) == first
    keys = ptx.pretraining.record.state_dict()["rows"]
    everything = ptx.pretraining.batches(100, 1, 0)
    assert sum(batch.num_sequences for batch in everything) == len(keys) == 20
    # a resumed run tells what became of them
    saved = torch.cat([keys, torch.tensor([[1, 2]])])
    ptx.stateful["pretraining"].load_state_dict({"rows": saved})
    change = ptx.pretraining_changes
    assert change.startswith("pretraining.data is not what the checkpoint was trained on: 1 rows")


def test_a_run_tells_the_supervised_loss(ptx: Learner, folder: Path) -> None:
    del ptx
    words = ["--algorithm", "ppo_ptx", "--pretraining.data", "examples.jsonl", "--steps", "2"]
    words += ["--sampler", "transformers", "--evaluation.every_steps", "0", "--update.lr", "1e-2"]
    table = train(folder, *words)
    assert table[0]["loss/pretraining"] > table[1]["loss/pretraining"] > 0
