"""The parts of a run, built from its config. Whatever can be refused is refused before a model is
loaded.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from warpo.engine import checkpoint, manifest
from warpo.engine.advantages import AdaptiveState
from warpo.engine.algorithms import Algorithm
from warpo.engine.architectures import check_run, check_tokens
from warpo.engine.batch import Batch, Completion, pack, split_by_tokens
from warpo.engine.config import Config
from warpo.engine.critic import Critic
from warpo.engine.data import Prompt, Prompts, load_prompts, split_prompts
from warpo.engine.device import learner_device
from warpo.engine.errors import CheckpointError, ConfigError, DataError
from warpo.engine.limits import check_free_memory, check_limits
from warpo.engine.model import eos_token_ids, load_model
from warpo.engine.model_files import check_files, load_tokenizer
from warpo.engine.offline.data import Examples, load_examples
from warpo.engine.optimizer import AdamW, WeightUpdate, make_optimizer
from warpo.engine.resolve import resolve
from warpo.engine.resync import Resync
from warpo.engine.rewards.base import SourceContext
from warpo.engine.rewards.combine import RewardSources
from warpo.engine.rewards.fields import check_fields
from warpo.engine.sampler.base import ColocatedSampler, SamplerSettings
from warpo.engine.sampler.kinds import SAMPLERS
from warpo.engine.step import as_rollout
from warpo.engine.stream import PromptStream, RowRecord, draw_keys, ranks


@dataclass(kw_only=True)
class Parts:
    """What a run holds.

    Attributes:
        examples: of pretraining.data, and `pretraining` their record; None without.
        probe_sequences: token ids that learner and sampler are compared on before the first step.
        step: steps whose update is complete.
        whole: False while the weights are between two steps.
        boundary: what `position` was when `step` was completed.
        fingerprints: of the weights, as the last optimizer step wrote them; None before it.
    """

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    sampler: ColocatedSampler
    resync: Resync
    rewards: RewardSources
    stream: PromptStream
    optimizer: AdamW
    schedule: torch.optim.lr_scheduler.LambdaLR
    algorithm: Algorithm
    adaptive: AdaptiveState
    eval_prompts: list[Prompt]
    examples: Examples | None
    probe_sequences: list[list[int]]
    pretraining: RowRecord | None = None
    critic: Critic | None = None
    reference: PreTrainedModel | None = None
    step: int = 0
    whole: bool = True
    boundary: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def publish(self) -> int:
        """Make the learner's weights the sampler's, as those after `step`; returns bytes copied."""
        num_bytes = self.resync.publish(self.fingerprints)
        self.sampler.weights_changed(self.step)
        return num_bytes

    def updated(self, update: WeightUpdate) -> None:
        """Keep what an optimizer step says of the weights, for the next publish."""
        others = {name for name, _ in self.critic.named_parameters()} if self.critic else set()
        self.fingerprints = {
            name: value for name, value in update.fingerprints.items() if name not in others
        }

    def pretraining_batches(
        self, config: Config, count: int, step: int, update: int
    ) -> list[Batch]:
        """Micro-batches of `count` supervised examples, drawn by seed, step and update alone."""
        assert self.examples is not None
        drawn = ranks(draw_keys(self.examples.keys), config.seed, step, update)
        chosen = [self.examples[int(i)] for i in np.argsort(drawn, kind="stable")[:count]]
        micro = split_by_tokens(
            [as_rollout(e.token_ids, len(e.prompt_ids)) for e in chosen],
            config.update.token_budget,
        )
        return [pack(rollouts).to(self.device) for rollouts in micro]

    def position(self) -> dict[str, Any]:
        """What sampling and estimating advance, and a step that fails has to take back."""
        return {"stream": self.stream.state_dict(), "adaptive": self.adaptive.state_dict()}

    def rewind(self) -> None:
        """Back to the position that was taken when `step` was completed."""
        self.stream.load_state_dict(self.boundary["stream"])
        self.adaptive.load_state_dict(self.boundary["adaptive"])

    @property
    def stateful(self) -> dict[str, checkpoint.Stateful]:
        parts: dict[str, checkpoint.Stateful] = {
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "stream": self.stream,
            "adaptive": self.adaptive,
        }
        if self.pretraining is not None:
            parts["pretraining"] = self.pretraining
        return parts if self.critic is None else parts | {"critic": self.critic}

    @property
    def changes(self) -> list[str]:
        """How the data differ from those of the checkpoint that was loaded."""
        found = [self.stream.changes, self.pretraining.changes if self.pretraining else ""]
        return [change for change in found if change]


def build(config: Config) -> Parts:
    """Data, reward, models, sampler and optimizer, in the order of what can fail fastest."""
    torch.manual_seed(config.seed)
    device = learner_device(config)
    check_limits(config, check_files(config.model), device)
    check_free_memory(config, device)
    if resolve(config).has_critic and config.critic.model not in ("policy", "shared"):
        check_files(config.critic.model)
    check_run(config)
    tokenizer = load_tokenizer(config.model)
    prompts = _load_prompts(config, tokenizer, config.data.train)
    prompts, eval_prompts = _held_out(config, tokenizer, prompts)
    examples, pretraining = None, None
    if config.pretraining.data:
        examples = load_examples(
            config.pretraining.data, tokenizer, "sft",
            token_budget=config.update.token_budget,
            max_length=config.rollout.max_model_len,
        )  # fmt: skip
        check_tokens(config.model, examples.largest_token, config.pretraining.data)
        pretraining = RowRecord("pretraining.data", examples.keys)
    context = SourceContext(
        settings=config.reward,
        fields=prompts.fields,
        tokenizer=tokenizer,
        max_new_tokens=config.rollout.max_new_tokens,
        dtype=config.dtype,
        device=learner_device(config),
        token_budget=config.update.token_budget,
    )
    rewards = RewardSources(context)
    algorithm = resolve(config)
    if algorithm.advantages == "process":
        _check_steps(config, rewards, prompts[0])
    # On the host until it is known whether it gets memory of its own on the device.
    model = load_model(config.model, config.dtype, torch.device("cpu"), config.lm_head_dtype)
    sampler = _sampler(config, model, tokenizer)
    resync = Resync(
        sampler.load_weights, sampler.module, model, config.resync, device=learner_device(config)
    )
    critic = Critic(config, model, learner_device(config)) if algorithm.has_critic else None
    learned = [*model.named_parameters(), *([] if critic is None else critic.named_parameters())]
    optimizer, schedule = make_optimizer(learned, config.update)
    return Parts(
        tokenizer=tokenizer,
        model=model,
        sampler=sampler,
        resync=resync,
        rewards=rewards,
        stream=PromptStream(prompts, prompts.keys, config.rollout.prompts_per_step, config.seed),
        optimizer=optimizer,
        schedule=schedule,
        algorithm=algorithm,
        adaptive=AdaptiveState(algorithm.kl_coef, adapts=algorithm.kl_target is not None),
        critic=critic,
        eval_prompts=eval_prompts,
        examples=examples,
        pretraining=pretraining,
        # with a token appended, so that there is one to score after the shortest prompt
        probe_sequences=[[*p.token_ids, p.token_ids[0]] for p in prompts[:4]],
    )


def _check_steps(config: Config, rewards: RewardSources, prompt: Prompt) -> None:
    """Only a call shows whether a function or a server scores steps."""
    empty = Completion(token_ids=[], logprobs=[], finished=False, weight_version=0)
    if rewards([prompt], [empty]).steps is None:
        raise ConfigError(
            f"algorithm = {config.algorithm!r} learns from rewards of steps, and reward.sources = "
            f"{' '.join(config.reward.sources)} gave a number for an empty completion, not a list "
            "of (end, score): let it return [(end, score), ...] for each completion"
        )


def _load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, path: str) -> Prompts:
    """The prompts of a file, which model and rewards can take."""
    check = check_fields(config.reward.sources)
    prompts = load_prompts(path, tokenizer, config.max_prompt_tokens, check)
    check_tokens(config.model, prompts.largest_token, path)
    return prompts


def _held_out(
    config: Config, tokenizer: PreTrainedTokenizerBase, prompts: Prompts
) -> tuple[Prompts, list[Prompt]]:
    """The prompts to learn from and those to be measured on."""
    if not config.data.eval:
        return prompts, []
    limit = config.evaluation.max_prompts
    if isinstance(config.data.eval, int):
        prompts, drawn = split_prompts(prompts, config.data.eval, config.seed)
        return prompts, drawn[:limit]
    held_out = _load_prompts(config, tokenizer, config.data.eval)
    missing = set(prompts.fields) - set(held_out.fields)
    if missing:
        raise DataError(
            f"{config.data.eval} lacks the field {sorted(missing)[0]!r} of "
            f"{config.data.train}, which a reward may read"
        )
    return prompts, held_out[:limit]


def _sampler(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> ColocatedSampler:
    settings = SamplerSettings(
        model_path=config.model,
        dtype=config.sampler_dtype,
        lm_head_dtype=config.lm_head_dtype,
        max_model_len=config.rollout.max_model_len,
        eos_token_ids=eos_token_ids(model, tokenizer),
        kv_cache_gib=config.rollout.kv_cache_gib,
        device=learner_device(config),
    )
    return SAMPLERS[config.sampler].open(settings)


def make_reference(config: Config, parts: Parts) -> None:
    """Freeze the model that step 1 starts from, and keep it on disk for a resumed run."""
    if parts.algorithm.has_reference:
        reference = copy.deepcopy(parts.model)
        # what an earlier run without a checkpoint has left is not this run's
        shutil.rmtree(_references(config), ignore_errors=True)
        checkpoint.save_model(_references(config) / _step_name(0), reference)
        parts.reference = reference.requires_grad_(False).eval()


def renew_reference(config: Config, parts: Parts, step: int) -> None:
    """Make the policy after this step the reference, where it is due."""
    every = parts.algorithm.reference_every_steps
    if parts.reference is None or not every or step % every:
        return
    parts.reference.load_state_dict(parts.model.state_dict())
    checkpoint.save_model(_references(config) / _step_name(step), parts.reference)
    # A run that resumes goes back to the oldest checkpoint at most.
    saved = checkpoint.complete(Path(config.output_dir) / "checkpoints")
    first = _step_of(saved[0]) if saved else 0
    older = [folder for folder in _saved_references(config) if _step_of(folder) <= first]
    for folder in older[:-1]:
        shutil.rmtree(folder)


def load_reference(config: Config, parts: Parts) -> None:
    """The reference that a resumed run had after the step that it resumes from."""
    if not parts.algorithm.has_reference:
        return
    before = [p for p in _saved_references(config) if _step_of(p) <= parts.step]
    if not before:
        raise ConfigError(
            f"{_references(config)} has no reference model of step {parts.step} or before: the run "
            "began without one, so loss.kl_coef must be 0"
        )
    try:
        manifest.check(before[-1])
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}: a run cannot be resumed without its reference model; begin one from the "
            "weights, with another output_dir"
        ) from None
    reference = load_model(str(before[-1]), config.dtype, parts.device, config.lm_head_dtype)
    parts.reference = reference.requires_grad_(False).eval()


def _references(config: Config) -> Path:
    return Path(config.output_dir) / "reference"


def _saved_references(config: Config) -> list[Path]:
    """Oldest first."""
    return sorted(_references(config).glob("step-*"), key=_step_of)


def _step_name(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
