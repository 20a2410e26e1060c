"""Loss and gradient of every row, against float64 formulas written from the papers on plain
transformers, sequence by sequence; for micro-batches of any size.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn.functional import logsigmoid

from warpo.engine.config.offline import LOSS_KEYS, OfflineConfig, OfflineData, OfflineLoss
from warpo.engine.data.examples import Example
from warpo.engine.learner import losses
from warpo.engine.models.batch import pack
from warpo.engine.models.model import load_model
from warpo.engine.models.scalar import load_scalar_model
from warpo.engine.ranks import ONE_RANK
from warpo.engine.trainers.offline.objectives import make_objective, micro_batches
from warpo.engine.types import TokenSequence
from warpo.kernels.preferences import PREFERENCES

CPU = torch.device("cpu")
NUM_COMPLETIONS = {"sft": 1, "kto": 2, "k_wise": 4, "process_reward": 1}
SCALAR = ("bradley_terry", "k_wise", "process_reward")
# Options that differ from the published values, so that each is seen to arrive.
OPTIONS = {
    "dpo": {"beta": 0.3},
    "robust_dpo": {"label_smoothing": 0.2},
    "slic": {"margin": 2.0},
    "kto": {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7},
    "bradley_terry": {"centering_coef": 0.05},
    "dpo_nll": {"nll_coef": 0.6},
}


def make_examples(algorithm: str) -> list[Example]:
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(2, 64, (length,), generator=generator).tolist()

    made = []
    for number in range(5):
        completions = [ids(2 + (number + i) % 4) for i in range(NUM_COMPLETIONS.get(algorithm, 2))]
        values = {"kto": [float(number % 2)], "bradley_terry": [0.5 * number]}.get(algorithm, [])
        ends = []
        if algorithm == "process_reward":
            ends = [0, len(completions[0]) - 1]
            values = [0.25 * number, 1.0]
        made.append(
            Example(
                prompt_ids=ids(3),
                completions=completions,
                values=values,
                ends=ends,
                ref_logprobs=tuple(
                    -3 * torch.rand(len(tokens), generator=generator) for tokens in completions
                ),
            )
        )
    return made


def make_config(algorithm: str, folder: str, **loss: float) -> OfflineConfig:
    return OfflineConfig(
        algorithm=algorithm,
        model=folder,
        output_dir="out",
        steps=1,
        data=OfflineData(train="train.jsonl"),
        loss=OfflineLoss(**loss),
    )


def pair_loss(name, chosen, rejected, ref_chosen, ref_rejected, options):
    """The loss of a pair from logprobs of its tokens."""
    sums = [x.sum() for x in (chosen, rejected, ref_chosen, ref_rejected)]
    beta = options.get("beta", 0.1)
    z = beta * ((sums[0] - sums[2]) - (sums[1] - sums[3]))
    if name == "dpo":
        return -logsigmoid(z)
    if name == "conservative_dpo":
        return -0.9 * logsigmoid(z) - 0.1 * logsigmoid(-z)
    if name == "robust_dpo":
        e = options["label_smoothing"]
        return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)
    if name == "ipo":
        return (z / beta - 1 / (2 * beta)) ** 2
    if name == "hinge":
        return torch.relu(1 - z)
    if name == "slic":
        return torch.relu(options["margin"] - sums[0] + sums[1])
    if name == "simpo":
        return -logsigmoid(2.0 * (chosen.mean() - rejected.mean()) - 1.0)
    if name == "dpo_nll":
        return -logsigmoid(z) - options["nll_coef"] * chosen.mean()
    assert name == "orpo"
    odds = [torch.log(p / (1 - p)) for p in (chosen.mean().exp(), rejected.mean().exp())]
    return -chosen.mean() - 0.1 * logsigmoid(odds[0] - odds[1])


def oracle(name, model, examples, options):
    """The loss of a step."""

    def outputs(example, i):
        ids = [*example.prompt_ids, *example.completions[i]]
        start = len(example.prompt_ids)
        if name in SCALAR:
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
            return model.score(hidden)[start:, 0]
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        taken = torch.tensor(example.completions[i])[:, None]
        return logits.log_softmax(-1).gather(1, taken)[:, 0]

    found = [[outputs(e, i) for i in range(len(e.completions))] for e in examples]
    if name == "sft":
        return -torch.cat([row[0] for row in found]).mean()
    if name == "process_reward":
        scores = torch.cat([row[0][e.ends] for row, e in zip(found, examples, strict=True)])
        labels = torch.tensor([v for e in examples for v in e.values], dtype=torch.float64)
        return -(labels * logsigmoid(scores) + (1 - labels) * logsigmoid(-scores)).mean()
    if name == "bradley_terry":
        terms = []
        for (chosen, rejected), example in zip(found, examples, strict=True):
            c, r = chosen[-1], rejected[-1]
            terms.append(-logsigmoid(c - r - example.values[0]) + 0.05 * (c + r) ** 2)
        return torch.stack(terms).mean()
    if name == "k_wise":
        terms = []
        for row in found:
            s = [scores[-1] for scores in row]
            pairs = [(b, w) for b in range(len(s)) for w in range(b + 1, len(s))]
            terms.append(sum(-logsigmoid(s[b] - s[w]) for b, w in pairs) / math.comb(len(s), 2))
        return torch.stack(terms).mean()
    refs = [[ref.double() for ref in e.ref_logprobs] for e in examples]
    if name == "kto":
        ratios = [
            [(x - ref).sum() for x, ref in zip(*both, strict=True)]
            for both in zip(found, refs, strict=True)
        ]
        kl = torch.stack([ratio[1] for ratio in ratios]).mean().clamp(min=0).detach()
        terms = []
        for (ratio, _), example in zip(ratios, examples, strict=True):
            good = bool(example.values[0])
            value = torch.sigmoid(0.4 * ((ratio - kl) if good else (kl - ratio)))
            terms.append((1.5 if good else 0.7) * (1 - value))
        return torch.stack(terms).mean()
    terms = [pair_loss(name, *f, *r, options) for f, r in zip(found, refs, strict=True)]
    return torch.stack(terms).mean()


@pytest.fixture
def scalar_path(tmp_path, model_path) -> str:
    """A classifier whose head is not 0."""
    model = load_scalar_model(model_path("qwen2"), "float32", CPU)
    generator = torch.Generator().manual_seed(5)
    torch.nn.init.normal_(model.score.weight, std=0.2, generator=generator)
    model.save_pretrained(tmp_path)
    return str(tmp_path)


def exact_model(algorithm: str, path: str) -> transformers.PreTrainedModel:
    if algorithm in SCALAR:
        kind = transformers.AutoModelForSequenceClassification
        return kind.from_pretrained(path, dtype=torch.float64, num_labels=1)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """Gradients of all parameters as one vector."""
    ordered = sorted(model.named_parameters())
    return torch.cat([parameter.grad.double().flatten() for _, parameter in ordered])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("algorithm", LOSS_KEYS)
def test_loss_and_gradient_are_those_of_the_paper(algorithm, split, model_path, scalar_path):
    path = scalar_path if algorithm in SCALAR else model_path("qwen2")
    options = OPTIONS.get(algorithm, {})
    load = load_scalar_model if algorithm in SCALAR else load_model
    model = load(path, "float32", CPU)
    examples = make_examples(algorithm)
    if algorithm in SCALAR or algorithm == "sft":
        examples = [replace(example, ref_logprobs=()) for example in examples]
    sizes = [example.num_tokens for example in examples]
    micro = micro_batches(examples, algorithm, max(sizes) if split else sum(sizes))
    assert (len(micro) > 2) == split
    loss = make_objective(make_config(algorithm, path, **options))
    metrics = loss.read(loss.gradients(model, micro, ONE_RANK))

    exact = exact_model(algorithm, path)
    wanted = oracle(algorithm, exact, examples, options)
    wanted.backward()
    assert metrics["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    found, true = gradient(model), gradient(exact)
    assert (found - true).norm() < 1e-5 * true.norm()


@pytest.mark.parametrize("algorithm", LOSS_KEYS)
def test_without_gradients_the_metrics_are_the_same(algorithm, model_path, scalar_path):
    path = scalar_path if algorithm in SCALAR else model_path("qwen2")
    model = (load_scalar_model if algorithm in SCALAR else load_model)(path, "float32", CPU)
    examples = make_examples(algorithm)
    if algorithm in SCALAR or algorithm == "sft":
        examples = [replace(example, ref_logprobs=()) for example in examples]
    loss = make_objective(make_config(algorithm, path))
    micro = micro_batches(examples, algorithm, 1000)
    with torch.no_grad():
        measured = loss.gradients(model, micro, ONE_RANK)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(measured, loss.gradients(model, micro, ONE_RANK))


def test_dpo_of_a_pair_of_equals_is_log_2(model_path):
    model = load_model(model_path("qwen2"), "float32", CPU)
    batch = pack([TokenSequence.of([3, 4], [5, 6])] * 2)
    batch = replace(batch, ref_logprobs=torch.zeros(4))
    metrics = losses.preference_gradients(model, [batch], PREFERENCES["dpo"])
    assert metrics[0].item() == pytest.approx(math.log(2), abs=1e-7)
    for parameter in model.parameters():
        assert parameter.grad.abs().max() < 1e-6


def test_the_coefficient_scales_the_supervised_gradient(model_path):
    batch = pack([TokenSequence.of([3, 4], [5, 6])])
    norms = []
    for coef in (1.0, 0.25):
        model = load_model(model_path("qwen2"), "float32", CPU)
        losses.supervised_gradients(model, [batch], coef=coef)
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    assert norms[1] / norms[0] == pytest.approx(0.25, rel=1e-5)
