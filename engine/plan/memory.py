"""Memory of a run, phase by phase, predicted before a weight is read.

Exact, from the shapes of the model: weights, gradients, optimizer state, KV cache. Activations come
from one step of the training code itself, run on fake tensors, with every storage counted while it
lives. The sampler's working memory is a formula of its own, sampler/vllm_memory.py.

The step that is planned for is the largest that the config and its data allow: completions of
rollout.max_new_tokens, micro-batches that fill update.token_budget, and of the shortest and the
longest prompts whichever takes more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from warpo.engine.config.offline import OfflineConfig
from warpo.engine.config.policy import Config
from warpo.engine.config.resolve import resolve
from warpo.engine.config.reward_model import reward_sources, reward_training
from warpo.engine.config.reward_sources import parse_sources
from warpo.engine.learner.adapters import TILE
from warpo.engine.learner.optimizer import float32_gradients
from warpo.engine.learner.step import accumulate_gradients
from warpo.engine.models.architectures import shape_model, shapes_only
from warpo.engine.models.batch import Batch
from warpo.engine.models.checkpointing import checkpoint_layers
from warpo.engine.models.files import read_config
from warpo.engine.models.lora import LoraLinear, adapter_tensors, attach
from warpo.engine.models.model import is_packed, set_lm_head_dtype
from warpo.engine.models.score import device_of, score
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.rollout.sampler.base import plan_sampler_memory
from warpo.engine.types import TokenSequence
from warpo.kernels.objectives import OBJECTIVES, Objective

PHASES = ("load", "sample", "score", "update", "publish")
MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The micro-batch that is planned for: `sequences` rollouts of that many tokens each, of which
    `group_size` share a prompt.
    """

    sequences: int
    prompt_tokens: int
    completion_tokens: int
    group_size: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes on the learner's device.

    Attributes:
        held: what stays from step to step, by name: learner, sampler, reference, KV cache,
            optimizer state.
        phases: peak of each phase, what is held in it included.
        shape: micro-batch of the update.
    """

    held: dict[str, int]
    phases: dict[str, int]
    shape: Shape

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def plan_memory(
    config: Config,
    prompt_lengths: Sequence[int],
    device: torch.device,
    resync: Literal["alias", "copy"],
) -> MemoryPlan:
    """Predict the memory of each phase; nothing but the model's config file is read.

    Args:
        prompt_lengths: tokens of each prompt of the data.
        device: where the learner runs.
        resync: "alias": the learner's parameters are the sampler's; "copy": each has its own.
    """
    hf_config = read_config(config.model)
    fake = FakeTensorMode()
    model = _fake_model(config, hf_config, device, fake)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(p.nbytes for p in model.parameters())
    algorithm = resolve(config)
    sampler = plan_sampler_memory(config, hf_config, device)
    # Besides its trunk it has one weight per hidden unit.
    has_critic = algorithm.has_critic and config.critic.model != "shared"
    critic = _trunk_parameters(model) if has_critic else 0
    adapters = _adapter_bytes(config, model, device)
    held = {
        "sampler weights": parameters * dtype_of(config.sampler_dtype).itemsize,
        "learner weights": 0 if resync == "alias" else weights,
        "reference weights": weights if algorithm.has_reference and not config.lora.rank else 0,
        "adapters": adapters,
        "reward models": _reward_parameters(config, device, fake) * dtype_of(config.dtype).itemsize,
        "critic weights": critic * dtype_of(config.dtype).itemsize,
        "KV cache": config.rollout.kv_cache_bytes if sampler else 0,
        "optimizer state": optimizer_bytes(
            critic + _trained_reward_parameters(config, device, fake), config, device
        )
        + _policy_state_bytes(config, model, device),
    }
    kept = sum(held.values())
    learning = kept - held["KV cache"]
    before_training = kept - held["optimizer state"]
    if resync == "alias" and device.type == "cpu":
        # What is read from the checkpoint goes when the sampler's storage takes its place; the
        # reference and the adapters are made after that.
        before_training += max(0, weights - held["reference weights"] - adapters)
    work = {
        shape: _update_bytes(config, shape, model, fake)
        for shape in _shapes(config, prompt_lengths, shared=is_packed(model))
    }
    shape = max(work, key=lambda s: work[s])
    longest = max(prompt_lengths) + config.rollout.max_new_tokens
    probe = Shape(
        sequences=config.probe.num_sequences, prompt_tokens=1, completion_tokens=longest - 1
    )
    return MemoryPlan(
        held={name: size for name, size in held.items() if size},
        phases={
            "load": before_training,
            "sample": kept + (sampler.sampling_bytes(max(prompt_lengths)) if sampler else 0),
            "score": learning + _score_bytes(shape, model, fake),
            "update": learning + max(work[shape], _merge_bytes(model)),
            "publish": (kept if device.type == "cuda" else learning)
            + (sampler.probe_cache_bytes(longest) if sampler else 0)
            + max(_score_bytes(probe, model, fake), sampler.probe_bytes(longest) if sampler else 0),
        },
        shape=shape,
    )


def _adapter_bytes(config: Config, model: PreTrainedModel, device: torch.device) -> int:
    """A and B, and W0 where it is kept on the device."""
    on_host = config.lora.base == "host" and device.type == "cuda"
    return sum(x.nbytes for x in adapter_tensors(model) if x.requires_grad or not on_host)


def _policy_state_bytes(config: Config, model: PreTrainedModel, device: torch.device) -> int:
    """State of the optimizer for the policy: of its parameters, or of its float32 adapters."""
    if not config.lora.rank:
        return optimizer_bytes(sum(p.numel() for p in model.parameters()), config, device)
    learned = sum(x.numel() for x in adapter_tensors(model) if x.requires_grad)
    on_host = config.update.optimizer_state == "host" and device.type == "cuda"
    return 0 if on_host else 8 * learned


def optimizer_bytes(parameters: int, config: Config | OfflineConfig, device: torch.device) -> int:
    """Two float32 moments, and float32 master weights where the learner's are narrower."""
    if config.update.optimizer_state == "host" and device.type == "cuda":
        return 0
    return parameters * (8 if config.dtype == "float32" else 12)


def resync_of(config: Config) -> Literal["alias", "copy"]:
    """Predict resync = auto: models whose weights cannot be shared are rare."""
    if config.resync != "auto":
        return config.resync
    return "alias" if config.sampler_dtype == config.dtype else "copy"


def dtype_of(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _shapes(config: Config, prompt_lengths: Sequence[int], *, shared: bool) -> list[Shape]:
    """A full micro-batch of the shortest prompts, which has the most logits, and of the longest."""
    rollout, update = config.rollout, config.update
    rollouts = -(-rollout.prompts_per_step * rollout.group_size // update.minibatches)
    together = 2 if resolve(config).estimator.makes_pairs else 1
    size, new_tokens = rollout.group_size if shared else 1, rollout.max_new_tokens
    shapes = []
    for length in {min(prompt_lengths), max(prompt_lengths)}:
        groups, rest = divmod(update.token_budget, length + size * new_tokens)
        fitting = min(rollouts, groups * size + max(0, rest - length) // new_tokens)
        shapes.append(
            Shape(
                sequences=max(together, fitting - fitting % together),
                prompt_tokens=length,
                completion_tokens=new_tokens,
                group_size=size,
            )
        )
    return shapes


def rollouts_of(shape: Shape, vocab_size: int) -> StepRollouts:
    """Rollouts of that shape, of many tokens: a padding token's embedding is 0, and a sequence of
    nothing else has an infinite gradient. They share their prompts and nothing else.
    """

    def distinct(numbers: np.ndarray, length: int) -> np.ndarray:
        """Rows that begin differently, as far as the vocabulary allows."""
        again, first = np.divmod(numbers[:, None], vocab_size - 1)
        return 1 + (first + np.arange(length) * (1 + again)) % (vocab_size - 1)

    number = np.arange(shape.sequences)
    prompts = distinct(number // shape.group_size, shape.prompt_tokens)
    completions = distinct(number, shape.completion_tokens)
    ones = torch.ones(shape.sequences * shape.completion_tokens)
    return StepRollouts(
        sequences=[*map(TokenSequence.of, prompts, completions)],
        group_ids=np.arange(shape.sequences),
        rewards=torch.zeros(shape.sequences, dtype=torch.float64),
        sampler_logprobs=torch.zeros_like(ones),
        advantages=ones,
        returns=ones,
    )


def _reward_parameters(config: Config, device: torch.device, fake: FakeTensorMode) -> int:
    """Count the parameters of the reward models among the sources."""
    sources = parse_sources(reward_sources(config))
    paths = [source.checkpoint for source in sources if source.checkpoint]
    return sum(_scalar_parameters(path, device, fake) for path in paths)


def _trained_reward_parameters(config: Config, device: torch.device, fake: FakeTensorMode) -> int:
    """Count those of the reward model that learns."""
    training = reward_training(config, resolve(config))
    if training is None:
        return 0
    sources = parse_sources(reward_sources(config))
    (path,) = (source.target for source in sources if source.name == training.model)
    return _scalar_parameters(path, device, fake)


def _scalar_parameters(path: str, device: torch.device, fake: FakeTensorMode) -> int:
    with fake:
        model = shape_model(read_config(path), device, scalar=True)
    return sum(parameter.numel() for parameter in model.parameters())


def _trunk_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.base_model.parameters())


def _fake_model(
    config: Config, hf_config: PretrainedConfig, device: torch.device, fake: FakeTensorMode
) -> PreTrainedModel:
    with fake:
        model = shape_model(hf_config, device, dtype_of(config.dtype))
        if config.lora.rank:
            attach(model, config.lora, seed=0, computes_base=lambda: False)
    set_lm_head_dtype(model, config.lm_head_dtype)
    float32_gradients(model.parameters())
    checkpoint_layers(model, config.update.activation_checkpointing)
    return model


def _fake_batch(
    shape: Shape, model: PreTrainedModel, fake: FakeTensorMode, with_ref: bool = False
) -> Batch:
    vocab_size = model.config.get_text_config().vocab_size
    batch = rollouts_of(shape, vocab_size).batch(range(shape.sequences))
    if with_ref:
        batch = replace(batch, ref_logprobs=batch.old_logprobs)
    tensors: dict[str, Any] = {
        field.name: fake.from_tensor(value)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    with fake:
        return replace(batch, **tensors).to(device_of(model))


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, while they live.

    torch.distributed._tools.MemTracker does more and refuses a second micro-batch.
    """

    def __init__(self, existing: Sequence[Tensor]) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in existing)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self._live + _workspace_bytes(func, args))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        self._live += storage.nbytes()
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self._live -= size


_FUSED_HEADS = ("linear_logprobs", "policy_loss_from_hidden")


def _workspace_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """What a fused head takes while it runs: its workspace, and where it makes the gradient of a
    narrower weight its float32 sums.
    """
    name = func.name()
    if not any(head in name for head in _FUSED_HEADS):
        return 0
    given = {argument.name: x for argument, x in zip(func._schema.arguments, args, strict=False)}
    size = sum(x for name, x in given.items() if name.endswith("workspace_bytes"))
    if "backward" in name or any(given.get("wanted", ())):
        weights = (x for name, x in given.items() if name.endswith("weight"))
        size += sum(4 * x.numel() for x in weights if x.dtype != torch.float32)
    return int(size)


def peak_bytes(work: Callable[[], object], model: PreTrainedModel, fake: FakeTensorMode) -> int:
    existing = [*model.parameters(), *model.buffers(), *adapter_tensors(model)]
    with fake, _LiveBytes(existing) as live, shapes_only():
        work()
    for tensor in existing:
        tensor.grad = None
    return live.peak


def _update_bytes(
    config: Config, shape: Shape, model: PreTrainedModel, fake: FakeTensorMode
) -> int:
    """Gradients and activations of an optimizer step."""
    objective = resolve(config).objective
    if not isinstance(objective, Objective):
        # Pairs of completions take as much as completions.
        objective = OBJECTIVES["grpo"]
    batch = _fake_batch(shape, model, fake, with_ref=bool(objective.kl_coef))
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    several = rollouts > config.update.minibatches * shape.sequences
    return peak_bytes(
        lambda: accumulate_gradients(
            model,
            # From the second on, the gradients of those before are there.
            [batch] * (2 if several else 1),
            objective,
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
        ),
        model,
        fake,
    )


def _merge_bytes(model: PreTrainedModel) -> int:
    """What `Adapters.merge` takes for the largest layer: its new weight, a mask, and tiles."""
    weights = [m.weight for m in model.modules() if isinstance(m, LoraLinear)]
    sizes = [w.nbytes + w.numel() + 3 * 4 * min(w.numel(), TILE) for w in weights]
    return max(sizes, default=0)


def _score_bytes(shape: Shape, model: PreTrainedModel, fake: FakeTensorMode) -> int:
    if not shape.sequences:
        return 0
    batch = _fake_batch(shape, model, fake)
    return peak_bytes(lambda: score(model, batch, 1.0), model, fake)
