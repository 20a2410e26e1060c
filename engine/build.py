"""The parts of a run, built from its config. Whatever can be refused is refused before a model is
loaded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from warpo.engine import checkpoint
from warpo.engine.config import Config, resolve_objective
from warpo.engine.data import Example, Prompt, PromptStream, load_examples, load_prompts
from warpo.engine.errors import ConfigError, DataError
from warpo.engine.model import eos_token_ids, load_model, load_tokenizer
from warpo.engine.optimizer import AdamW
from warpo.engine.resync import Resync
from warpo.engine.rewards.combine import RewardSources
from warpo.engine.sampler.base import Sampler
from warpo.kernels.objectives import Objective


@dataclass(kw_only=True)
class Parts:
    """What a run holds.

    Attributes:
        probe_sequences: token ids that learner and sampler are compared on before the first step.
        step: steps whose update is complete.
        whole: False while the weights are between two steps.
        boundary: position of the stream when `step` was completed.
        fingerprints: of the weights, as the last optimizer step wrote them; None before it.
    """

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    sampler: Sampler
    resync: Resync
    rewards: RewardSources
    stream: PromptStream
    optimizer: AdamW
    schedule: torch.optim.lr_scheduler.LambdaLR
    objective: Objective
    eval_prompts: list[Prompt]
    examples: list[Example]
    probe_sequences: list[list[int]]
    reference: nn.Module | None = None
    step: int = 0
    whole: bool = True
    boundary: dict[str, int] = field(default_factory=dict)
    fingerprints: dict[str, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def publish(self) -> int:
        """Make the learner's weights the sampler's, as those after `step`; returns bytes copied."""
        num_bytes = self.resync.publish(self.fingerprints)
        self.sampler.weights_changed(self.step)
        return num_bytes

    @property
    def stateful(self) -> dict[str, checkpoint.Stateful]:
        return {"optimizer": self.optimizer, "schedule": self.schedule, "stream": self.stream}


def build(config: Config) -> Parts:
    """Data, reward, models, sampler and optimizer, in the order of what can fail fastest."""
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    prompts = load_prompts(config.data.train, tokenizer, config.max_prompt_tokens)
    eval_prompts: list[Prompt] = []
    if config.data.eval:
        eval_prompts = load_prompts(config.data.eval, tokenizer, config.max_prompt_tokens)
        eval_prompts = eval_prompts[: config.evaluation.max_prompts]
        missing = prompts[0].fields.keys() - eval_prompts[0].fields.keys()
        if missing:
            raise DataError(
                f"{config.data.eval} lacks the field {sorted(missing)[0]!r} of "
                f"{config.data.train}, which the reward function may read"
            )
    examples: list[Example] = []
    if config.warm_start.steps:
        examples = load_examples(config.warm_start.data, tokenizer, config.rollout.max_model_len)
    rewards = RewardSources(
        config.reward.sources,
        deadline_s=config.reward.deadline_s,
        fields=list(prompts[0].fields),
        tokenizer=tokenizer,
        max_new_tokens=config.rollout.max_new_tokens,
        dtype=config.dtype,
        device=learner_device(config),
        token_budget=config.update.token_budget,
    )
    # On the host until it is known whether it gets memory of its own on the device.
    model = load_model(config.model, config.dtype, torch.device("cpu"), config.lm_head_dtype)
    sampler = _sampler(config, model, tokenizer)
    resync = Resync(
        sampler.load_weights, sampler.module, model, config.resync, device=learner_device(config)
    )
    optimizer = AdamW(
        model.named_parameters(),
        lr=config.update.lr,
        betas=config.update.betas,
        weight_decay=config.update.weight_decay,
        state=config.update.optimizer_state,
    )
    warmup = config.update.warmup_steps
    return Parts(
        tokenizer=tokenizer,
        model=model,
        sampler=sampler,
        resync=resync,
        rewards=rewards,
        stream=PromptStream(prompts, config.rollout.prompts_per_step, config.seed),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda update: min(1.0, (update + 1) / (warmup + 1))
        ),
        objective=resolve_objective(config.loss),
        eval_prompts=eval_prompts,
        examples=examples,
        # with a token appended, so that there is one to score after the shortest prompt
        probe_sequences=[[*p.token_ids, p.token_ids[0]] for p in prompts[:4]],
    )


def learner_device(config: Config) -> torch.device:
    """Where the learner runs, "auto" looked up."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no CUDA device: set device to cpu")
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _sampler(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    options: dict[str, Any] = {
        "dtype": config.sampler_dtype,
        "lm_head_dtype": config.lm_head_dtype,
        "max_model_len": config.rollout.max_model_len,
        "eos_token_ids": eos_token_ids(model, tokenizer),
    }
    if config.sampler == "vllm":
        from warpo.engine.sampler.vllm import VllmSampler

        return VllmSampler(config.model, kv_cache_gib=config.rollout.kv_cache_gib, **options)
    from warpo.engine.sampler.transformers import TransformersSampler

    return TransformersSampler(config.model, device=learner_device(config), **options)


def make_reference(config: Config, parts: Parts) -> None:
    """Freeze the model that step 1 starts from, and keep it on disk for a resumed run."""
    if parts.objective.kl_coef == 0:
        return
    reference = copy.deepcopy(parts.model).requires_grad_(False).eval()
    reference.save_pretrained(_reference_dir(config))
    parts.reference = reference


def load_reference(config: Config, parts: Parts) -> None:
    """The reference that the resumed run began with."""
    if parts.objective.kl_coef == 0:
        return
    path = _reference_dir(config)
    if not path.is_dir():
        raise ConfigError(
            f"{path} is missing: the run began without a reference model, so kl_coef must be 0"
        )
    reference = load_model(str(path), config.dtype, parts.device, config.lm_head_dtype)
    parts.reference = reference.requires_grad_(False).eval()


def _reference_dir(config: Config) -> Path:
    return Path(config.output_dir) / "reference"
