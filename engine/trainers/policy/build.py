"""The three objects of a run, built from its config. Whatever can be refused is refused before a
model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from warpo.engine.config.policy import Config
from warpo.engine.config.resolve import resolve
from warpo.engine.config.reward_model import reward_sources, reward_training
from warpo.engine.data.examples import Examples
from warpo.engine.data.pretraining import load_pretraining
from warpo.engine.data.prompts import Prompt, Prompts, load_prompts, split_prompts
from warpo.engine.errors import ConfigError, DataError
from warpo.engine.learner.adapters import Adapters
from warpo.engine.learner.learner import Learner
from warpo.engine.learner.reward_model import RewardModelLearner
from warpo.engine.models.architectures import check_run, check_tokens
from warpo.engine.models.files import check_files, load_tokenizer
from warpo.engine.models.model import eos_token_ids, load_model
from warpo.engine.rollout.collect import Rollouts
from warpo.engine.rollout.labelled import PairSource
from warpo.engine.rollout.rewards.base import SourceContext
from warpo.engine.rollout.rewards.combine import RewardSources
from warpo.engine.rollout.rewards.fields import check_fields
from warpo.engine.rollout.sampler.base import ColocatedSampler, SamplerSettings, open_sampler
from warpo.engine.run.device import learner_device
from warpo.engine.run.loop import Run
from warpo.engine.trainers.policy.limits import check_adapters, check_free_memory, check_limits
from warpo.engine.types import Completion
from warpo.engine.weights.resync import Resync
from warpo.engine.weights.sync import WeightSync


class Data(NamedTuple):
    """Data that a run reads: prompts to learn from and to be measured on, and examples of
    pretraining.data, None without.
    """

    prompts: Prompts
    eval_prompts: list[Prompt]
    examples: Examples | None


@contextmanager
def build(config: Config, run: Run) -> Iterator[tuple[Rollouts, Learner, WeightSync]]:
    """Data, rewards, models, sampler and optimizer, in the order of what can fail fastest; the
    processes of the rewards end with it.
    """
    with run.log.phase("load"):
        _check(config)
        tokenizer = load_tokenizer(config.model)
        data = load_data(config, tokenizer)
        rewards = _rewards(config, data, tokenizer)
    with rewards:
        with run.log.phase("load"):
            if resolve(config).estimator.needs_steps:
                _check_steps(config, rewards, data.prompts[0])
            built = _build(config, run, data, rewards, tokenizer)
        yield built


def _check(config: Config) -> None:
    torch.manual_seed(config.seed)
    device = learner_device(config)
    hf_config = check_files(config.model)
    check_limits(config, hf_config, device)
    check_free_memory(config, device)
    if resolve(config).has_critic and config.critic.model not in ("policy", "shared"):
        check_files(config.critic.model)
    check_run(config)
    check_adapters(config, hf_config)


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """All data of a config, which model and rewards can take.

    Raises:
        DataError: some of it is not usable.
    """
    prompts = _load_prompts(config, tokenizer, config.data.train)
    prompts, eval_prompts = _held_out(config, tokenizer, prompts)
    if not config.pretraining.data:
        return Data(prompts, eval_prompts, None)
    examples = load_pretraining(
        config.pretraining.data,
        tokenizer,
        token_budget=config.update.token_budget,
        max_length=config.rollout.max_model_len,
    )
    check_tokens(config.model, examples.largest_token, config.pretraining.data)
    return Data(prompts, eval_prompts, examples)


def _rewards(config: Config, data: Data, tokenizer: PreTrainedTokenizerBase) -> RewardSources:
    context = SourceContext(
        settings=replace(config.reward, sources=reward_sources(config)),
        fields=data.prompts.fields,
        prompt=data.prompts[0].fields["prompt"],
        tokenizer=tokenizer,
        max_new_tokens=config.rollout.max_new_tokens,
        dtype=config.dtype,
        device=learner_device(config),
        token_budget=config.update.token_budget,
    )
    return RewardSources(context)


def _build(
    config: Config,
    run: Run,
    data: Data,
    rewards: RewardSources,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Rollouts, Learner, WeightSync]:
    # On the host until it is known whether it gets memory of its own on the device.
    model = load_model(config.model, config.dtype, torch.device("cpu"), config.lm_head_dtype)
    sampler = _sampler(config, model, tokenizer)
    resync = Resync(
        sampler.load_weights, sampler.module, model, config.resync, device=learner_device(config)
    )
    pairs, reward_model = _reward_model(config, run, rewards)
    adapters = None
    if config.lora.rank:
        adapters = Adapters(model, config.lora, seed=config.seed, path=config.model)
    learner = Learner(config, run, model, tokenizer, data.examples, reward_model, adapters)
    rollouts = Rollouts(
        config,
        run,
        learner.algorithm,
        sampler=sampler,
        rewards=rewards,
        prompts=data.prompts,
        eval_prompts=data.eval_prompts,
        labelled=pairs,
    )
    learner.progress.track(stream=rollouts.stream)
    return rollouts, learner, WeightSync(config, run, learner, sampler, resync)


def _reward_model(
    config: Config, run: Run, rewards: RewardSources
) -> tuple[PairSource | None, RewardModelLearner | None]:
    """Where a reward model learns: the pairs that it learns from, and what lets it learn."""
    row, settings = resolve(config), config.reward_model
    training = reward_training(config, row)
    if training is None:
        if row.trains_reward_model:
            is_kept = settings.labels == "none"
            why = "reward_model.labels is none" if is_kept else "no source is a model:DIR"
            run.log.say(f"{row.name}: no reward model is trained, since {why}")
        return None, None
    pairs = PairSource(
        rewards,
        model=training.model,
        labels=training.labels,
        limit=settings.pairs_per_step,
        seed=config.seed,
    )
    path, every = pairs.model.path, training.every_steps
    run.log.say(
        f"the reward model {path} learns every {every} steps, labelled by {training.labels}"
    )
    return pairs, RewardModelLearner(config, pairs.model, every, run.ranks)


def _check_steps(config: Config, rewards: RewardSources, prompt: Prompt) -> None:
    """Only a call shows whether a function or a server scores steps."""
    empty = Completion.of([], [], finished=False, weight_version=0)
    if rewards([prompt], [empty]).steps is None:
        raise ConfigError(
            f"algorithm = {config.algorithm!r} learns from rewards of steps, and reward.sources = "
            f"{' '.join(config.reward.sources)} gave a number for an empty completion, not a list "
            "of (end, score): let it return [(end, score), ...] for each completion"
        )


def _load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, path: str) -> Prompts:
    """The prompts of a file, which model and rewards can take."""
    check = check_fields(reward_sources(config))
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
        kv_cache_gib=config.rollout.kv_cache_bytes / 2**30,
        device=learner_device(config),
    )
    return open_sampler(config.sampler, settings)
