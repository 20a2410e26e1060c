"""The critic: its gradient against the formula in float64, its warm-up, and PPO resumed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.engine.random_models import random_completion, rollouts_of
from tests.engine.runs import rows, train
from warpo.engine.config.policy import Config, load_config
from warpo.engine.errors import TrainingError
from warpo.engine.learner.critic import Critic
from warpo.engine.learner.step import accumulate_gradients
from warpo.engine.models.batch import Batch
from warpo.engine.models.model import load_model, predict
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.trainers.policy.train import run
from warpo.kernels.objectives import OBJECTIVES

CPU = torch.device("cpu")
CLIP_RANGE, COEF = 0.2, 0.3
# of the largest element: two layers in float32 against float64
GRADIENT = 2e-5


def settings(path: str, **critic: Any) -> Config:
    return Config(
        model=path,
        output_dir="o",
        steps=3,
        sampler="transformers",
        algorithm="ppo",
        data={"train": "t.jsonl"},
        reward={"sources": ["a:b"]},
        critic=critic,
    )


def rollouts(number: int = 7) -> StepRollouts:
    """With values and returns near and far from each other, so that some are clipped."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    spreads = {"values": 0.3, "advantages": 1.0, "returns": 1.0}
    columns: dict[str, list[Tensor]] = {name: [] for name in spreads}
    completions = []
    for _ in range(number):
        length = rng.randint(1, 9)
        completions.append(random_completion(rng, length))
        for name, spread in spreads.items():
            columns[name].append(torch.randn(length, generator=generator) * spread)
    # two completions of each prompt
    prompts = [[5, 9 + i // 2, 31] for i in range(number)]
    return rollouts_of(prompts, completions, **columns)


def values_of(network: nn.Module, head: Tensor, made: StepRollouts) -> Tensor:
    """(M,): the head's products with the hidden states before each token, each rollout alone."""
    parts = []
    for sequence in made.sequences:
        ids = torch.from_numpy(sequence.token_ids)[None]
        hidden = network(input_ids=ids).last_hidden_state[0]
        parts.append(hidden[sequence.prompt_length - 1 : -1] @ head[0])
    return torch.cat(parts)


def clipped_loss(values: Tensor, made: StepRollouts) -> Tensor:
    """https://arxiv.org/abs/2005.12729 section 3, times 1/2, a mean over tokens."""
    old, returns = made.values.double(), made.returns.double()
    near = torch.minimum(torch.maximum(values, old - CLIP_RANGE), old + CLIP_RANGE)
    worse = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    assert 0 < (worse > (values - returns) ** 2).sum() < len(values), "none or all are clipped"
    return worse.mean() / 2


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name].double(), gradient, rtol=0, atol=GRADIENT * largest, msg=name
        )


def in_micro_batches(made: StepRollouts) -> list[Batch]:
    return [made.batch(range(3)), made.batch(range(3, len(made)))]


def test_the_losses_of_the_tokens_become_one_as_critic_aggregation_says(
    model_path: Callable[[str], str],
) -> None:
    """Of each token the loss is the square of its own distance / 2, whatever the micro-batches."""
    path, made = model_path("qwen2"), rollouts()
    assert made.returns is not None
    policy = load_model(path, "float32", CPU)
    lengths = torch.from_numpy(made.lengths).double()
    squares = (made.returns.double() ** 2 / 2).split(lengths.int().tolist())
    sums = torch.stack([part.sum() for part in squares])
    expected = {
        "token-mean": sums.sum() / lengths.sum(),
        "sequence-mean-token-mean": (sums / lengths).mean(),
        "sequence-mean-token-sum": sums.mean(),
        "sequence-mean-token-sum-norm": sums.mean() / 256,  # rollout.max_new_tokens
    }
    for aggregation, loss in expected.items():
        critic = Critic(settings(path, aggregation=aggregation, clip_range=1e9), policy)
        batches = in_micro_batches(made)
        total = critic.denominator(batches)
        found = sum(
            critic.loss(torch.zeros_like(batch.returns), batch, total)[0] for batch in batches
        )
        assert float(found) == pytest.approx(float(loss), rel=1e-5), aggregation


@pytest.fixture
def own(model_path: Callable[[str], str]) -> Critic:
    """A network of its own, whose head has moved from 0."""
    path = model_path("qwen2")
    policy = load_model(path, "float32", CPU)
    critic = Critic(settings(path, clip_range=CLIP_RANGE, lr=1e-3), policy)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        nn.init.normal_(critic._network.score.weight, std=0.05)
    return critic


@pytest.fixture
def shared(model_path: Callable[[str], str]) -> tuple[nn.Module, Critic]:
    path = model_path("qwen2")
    policy = load_model(path, "float32", CPU)
    critic = Critic(settings(path, model="shared", clip_range=CLIP_RANGE, coef=COEF), policy)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        nn.init.normal_(critic.value_head.weight, std=0.05)
    return policy, critic


def test_the_gradient_of_an_own_network_is_that_of_the_formula(
    own: Critic, model_path: Callable[[str], str]
) -> None:
    made = rollouts()
    plain = AutoModelForSequenceClassification.from_pretrained(
        model_path("qwen2"), num_labels=1, attn_implementation="eager"
    ).double()
    plain.load_state_dict(own._network.state_dict())
    values = values_of(plain.base_model, plain.score.weight, made)
    loss = clipped_loss(values, made)
    loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}

    scored = torch.cat([own.values(batch)[0] for batch in in_micro_batches(made)])
    torch.testing.assert_close(scored.double(), values, rtol=1e-5, atol=1e-5)
    found: dict[str, Tensor] = {}

    own._optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in own._network.named_parameters()})
    )
    metrics = own.train_step(in_micro_batches(made))
    assert_gradients(found, expected)
    assert metrics is not None and metrics[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_value_without_bounds_is_not_clipped(own: Critic, model_path: Any) -> None:
    made = rollouts()
    batch = made.batch(range(len(made)))
    values = torch.linspace(-3, 3, len(made.values))
    free = Critic(settings(model_path("qwen2"), clip_range="none"), own._policy)
    for critic, expected in (
        (own, clipped_loss(values.double(), made)),
        (free, (values - made.returns).double().square().mean() / 2),
    ):
        loss, _ = critic.loss(values, batch, len(values))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_shared_head_adds_the_value_gradient_to_the_trunk(
    shared: tuple[nn.Module, Critic], model_path: Callable[[str], str]
) -> None:
    policy, critic = shared
    made, objective = rollouts(), OBJECTIVES["ppo"]
    options = dict(temperature=0.8, max_new_tokens=16)

    accumulate_gradients(policy, in_micro_batches(made), objective, **options)
    alone = {name: p.grad.double() for name, p in policy.named_parameters()}
    policy.zero_grad()
    plain = AutoModelForCausalLM.from_pretrained(
        model_path("qwen2"), attn_implementation="eager"
    ).double()
    head = critic.value_head.weight.detach().double().requires_grad_()
    values = values_of(plain.base_model, head, made)
    loss = clipped_loss(values, made)
    loss.backward()
    expected = {
        name: gradient + COEF * p.grad
        for (name, p), gradient in zip(plain.named_parameters(), alone.values(), strict=True)
    }

    metrics = accumulate_gradients(
        policy, in_micro_batches(made), objective, critic=critic, **options
    ).values
    assert_gradients({name: p.grad for name, p in policy.named_parameters()}, expected)
    assert_gradients({"head": critic.value_head.weight.grad}, {"head": COEF * head.grad})
    assert metrics is not None and metrics[0].item() == pytest.approx(loss.item(), rel=1e-5)
    scored = torch.cat([critic.values(batch)[0] for batch in in_micro_batches(made)])
    torch.testing.assert_close(scored.double(), values, rtol=1e-5, atol=1e-5)


def test_values_of_a_shared_critic_need_no_logits(shared: tuple[nn.Module, Critic]) -> None:
    policy, critic = shared
    batch = rollouts().batch(range(7))
    _, wanted = predict(policy, batch, critic.value_head)
    policy.lm_head.register_forward_hook(lambda *_: pytest.fail("logits were made"))
    assert torch.equal(critic.values(batch)[0], wanted)


def test_a_critic_starts_with_the_policy_and_values_of_0(model_path: Callable[[str], str]) -> None:
    path = model_path("qwen2")
    policy = load_model(path, "float32", CPU)
    for model in ("policy", "shared"):
        critic = Critic(settings(path, model=model), policy)
        batch = rollouts().batch(range(7))
        assert torch.equal(critic.values(batch)[0], torch.zeros(batch.targets.numel()))
        names = [name for name, _ in critic.named_parameters()]
        assert names == (["critic_head.weight"] if critic.is_shared else [])
    trunk = Critic(settings(path), policy)._network.base_model.state_dict()
    for name, weight in policy.base_model.state_dict().items():
        assert torch.equal(trunk[name], weight)


def test_values_approach_the_returns(own: Critic) -> None:
    batches = in_micro_batches(rollouts())
    for batch in batches:
        batch.returns, batch.values = torch.ones_like(batch.returns), torch.ones_like(batch.values)
    losses = [own.train_step(batches)[0].item() for _ in range(30)]
    assert losses[-1] < 0.05 * losses[0]
    values = torch.cat([own.values(batch)[0] for batch in batches])
    assert (values - 1).abs().mean() < 0.3


def test_a_gradient_that_is_not_finite_names_the_critics_rate(own: Critic) -> None:
    batch = rollouts().batch(range(7))
    batch.returns[0] = torch.nan
    before = [p.clone() for p in own._network.parameters()]
    with pytest.raises(TrainingError, match="the step was not taken. Lower critic.lr"):
        own.train_step([batch])
    for a, b in zip(before, own._network.parameters(), strict=True):
        assert torch.equal(a, b) and b.grad is None


def saved(folder: Path, out: str = "out") -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Weights of policy and critic at each checkpoint."""
    for path in sorted((folder / out / "checkpoints").iterdir()):
        policy = AutoModelForCausalLM.from_pretrained(path).state_dict()
        state = torch.load(path / "trainer.pt", weights_only=False)
        yield policy, state["parts"]["critic"]["weights"]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


PPO = (
    *("--algorithm", "ppo", "--critic.lr", "1e-3", "--evaluation.every_steps", "0"),
    *("--loss.kl_coef", "0.05", "--update.epochs", "1"),
)


def test_warm_up_leaves_the_policy_bit_for_bit(folder: Path) -> None:
    steps = ("--critic.warmup_steps", "2", "--steps", "3")
    saves = ("--checkpoint.every_steps", "1", "--checkpoint.keep", "0")
    table = train(folder, *PPO, "--sampler", "transformers", *steps, *saves)
    policies, critics = zip(*saved(folder), strict=True)
    assert [equal(policies[0], policy) for policy in policies] == [True, True, True, False]
    assert not any(equal(a, b) for a, b in zip(critics, critics[1:], strict=False))
    for row in table:
        assert row["loss/value"] > 0 and "value/explained_variance" in row
        assert ("loss/policy" in row) == ("grad_norm" in row) == (row["step"] == 3)
    # a policy that stays has no KL to its reference
    assert [abs(row["kl/ref"]) < 1e-4 for row in table] == [True, True, True]


def resume_is_the_whole_run(folder: Path, *overrides: str) -> None:
    words = [*PPO, *overrides]
    run(load_config(folder / "config.yaml", [*words, "--steps", "3", "--output_dir", "whole"]))
    train(folder, *words, "--steps", "2")
    train(folder, *words, "--steps", "3", "--resume")
    assert rows(folder, "whole") == rows(folder)
    *_, whole = saved(folder, "whole")
    *_, parts = saved(folder)
    assert equal(whole[0], parts[0]) and equal(whole[1], parts[1])


@pytest.mark.parametrize("model", ["policy", "shared"])
def test_a_resumed_run_is_the_whole_one_bit_for_bit(folder: Path, model: str) -> None:
    words = ["--critic.model", model] + (["--critic.lr", "1e-5"] if model == "shared" else [])
    words += ["--sampler", "transformers", "--loss.kl_target", "0.001"]
    words += ["--loss.reward_entropy_coef", "0.1", "--loss.reward_entropy_target", "0.5", "0.2"]
    resume_is_the_whole_run(folder, *words)
    learned = [row["entropy/coef"] for row in rows(folder)]
    assert learned[0] == 0.1 and len(set(learned)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("model", ["policy", "shared"])
def test_a_resumed_run_on_vllm_is_the_whole_one_bit_for_bit(folder: Path, model: str) -> None:
    words = ["--critic.model", model] + (["--critic.lr", "1e-5"] if model == "shared" else [])
    resume_is_the_whole_run(folder, *words, "--sampler", "vllm")
