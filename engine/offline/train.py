"""Training from given data: draw examples, compute the loss, update, measure on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from warpo.engine import checkpoint, plot
from warpo.engine.architectures import check_model, check_tokens
from warpo.engine.batch import split_by_tokens
from warpo.engine.checkpoint import Saved
from warpo.engine.device import learner_device
from warpo.engine.errors import TrainingError
from warpo.engine.loop import (
    Schedule,
    check_state,
    checkpoint_on_error,
    due,
    raise_if,
    save,
    signals,
)
from warpo.engine.metrics import Column, RunLog, read_rows
from warpo.engine.model import load_model
from warpo.engine.model_files import check_files, load_tokenizer, read_config
from warpo.engine.offline.config import OfflineConfig
from warpo.engine.offline.data import Example, Examples, load_examples
from warpo.engine.offline.families import (
    Family,
    every_completion,
    make_family,
    micro_batches,
    pack_sequences,
)
from warpo.engine.offline.losses import sequence_scores
from warpo.engine.optimizer import AdamW, gradient_norm, make_optimizer, update_metrics
from warpo.engine.resume import claim, is_complete, tell
from warpo.engine.scalar import load_scalar_model
from warpo.engine.step import apply_gradients, score
from warpo.engine.stream import PromptStream

Metrics = dict[str, float]

SHOWN_ROWS = 30
COLUMNS = (
    Column("step", "step", "step", "d"),
    Column("train/loss", "loss", "loss", ".4f"),
    Column("eval/loss", "eval", "eval loss", ".4f"),
    Column("train/accuracy", "acc", "accuracy", ".3f"),
    Column("eval/accuracy", "eval", "eval accuracy", ".3f"),
    Column("train/margin", "margin", "margin", ".3f"),
    Column("grad_norm", "grad", "grad norm", ".3f"),
    Column("lr", "lr", "lr", ".2e"),
    Column("perf/tokens_per_s", "tok/s", "tokens/s", ".0f"),
    Column("perf/step_s", "sec", "seconds", ".1f"),
)
PANELS = (
    plot.Panel("loss", (("train/loss", "train"), ("eval/loss", "held out"))),
    plot.Panel(
        "accuracy",
        (("train/accuracy", "train"), ("eval/accuracy", "held out")),
        limits=(-0.02, 1.02),
    ),
    plot.Panel("margin", (("train/margin", "train"), ("eval/margin", "held out"))),
    plot.Panel("gradient norm", (("grad_norm", "train"),), limits=(0, None)),
    plot.Panel("learning rate", (("lr", "train"),), limits=(0, None)),
    plot.Panel("seconds a step", (("perf/step_s", "train"),), limits=(0, None)),
)


@dataclass(kw_only=True)
class Parts:
    """What a run holds.

    Attributes:
        step: steps whose update is complete.
        whole: False while the weights are between two steps.
        boundary: position of the stream when `step` was completed.
        recent: the examples of that step; empty before this process has made one.
    """

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    family: Family
    stream: PromptStream[Example]
    examples: Sequence[Example]
    eval_examples: list[Example]
    optimizer: AdamW
    schedule: torch.optim.lr_scheduler.LambdaLR
    step: int = 0
    whole: bool = True
    boundary: dict[str, int] = field(default_factory=dict)
    recent: list[Example] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def stateful(self) -> dict[str, checkpoint.Stateful]:
        return {"optimizer": self.optimizer, "schedule": self.schedule, "stream": self.stream}

    def rewind(self) -> None:
        """Back to the position that was taken when `step` was completed."""
        self.stream.load_state_dict(self.boundary)


def run(config: OfflineConfig) -> None:
    """Train as the config says; see `warpo train --help`.

    Raises:
        WarpoError: bad input, or a failed step; a checkpoint of the last complete step is left,
            unless its state has diverged.
        KeyboardInterrupt: Ctrl-C, SIGTERM or the end of the terminal; likewise.
    """
    with (
        claim(config) as saved,
        RunLog(
            config.output_dir,
            config,
            columns=COLUMNS,
            resume_step=saved.step if saved else None,
            # a step takes moments: as many rows as one looks through
            shown_every=max(1, config.steps // SHOWN_ROWS),
        ) as log,
        signals(log) as stop,
    ):
        tell(config, saved, log)
        if not is_complete(config, saved):
            _train(config, log, stop, saved)
        _report(Path(config.output_dir) / "metrics.jsonl", log)


def _train(
    config: OfflineConfig, log: RunLog, stop: Callable[[], bool], saved: Saved | None
) -> None:
    schedule = Schedule(config.checkpoint, saved)
    parts = build(config, log, stop)
    _start(config, parts, log, stop, saved)

    def save_parts() -> None:
        _save(config, parts, log, schedule)

    with checkpoint_on_error(parts, log, save_parts, schedule):
        while parts.step < config.steps:
            raise_if(stop)
            metrics = _step(config, parts, log)
            try:
                metrics |= _evaluation(config, parts, log, stop)
            finally:
                log.write(parts.step, metrics)
            if schedule.is_due(parts.step, config.steps):
                save_parts()


def build(config: OfflineConfig, log: RunLog, stop: Callable[[], bool]) -> Parts:
    """Data, model and optimizer, in the order of what can fail fastest."""
    torch.manual_seed(config.seed)
    device, family = learner_device(config), make_family(config)
    with log.phase("load"):
        check_files(config.model)
        tokenizer = load_tokenizer(config.model)
        loaded = _load_examples(config, config.data.train, tokenizer)
        examples: Sequence[Example] = loaded
        eval_examples: list[Example] = []
        if config.data.eval:
            held_out = _load_examples(config, config.data.eval, tokenizer)
            eval_examples = held_out[: config.evaluation.max_examples]
            _check(config, held_out, config.data.eval, scalar=family.scalar)
        _check(config, loaded, config.data.train, scalar=family.scalar)
        load = load_scalar_model if family.scalar else load_model
        model = load(config.model, config.dtype, device)
    if family.scalar:
        _describe_scalar(config, model, tokenizer)
    if family.reference:
        # The model is still the reference, so none has to be held beside it.
        both = _with_reference(config, model, [*examples, *eval_examples], log, stop)
        examples, eval_examples = both[: len(examples)], both[len(examples) :]
    optimizer, schedule = make_optimizer(
        model.named_parameters(), config.update,
        zero_after=config.steps if config.update.schedule == "linear" else 0,
    )  # fmt: skip
    return Parts(
        tokenizer=tokenizer,
        model=model,
        family=family,
        stream=PromptStream(examples, loaded.keys, config.batch_size, config.seed),
        examples=examples,
        eval_examples=eval_examples,
        optimizer=optimizer,
        schedule=schedule,
    )


def _load_examples(
    config: OfflineConfig, path: str, tokenizer: PreTrainedTokenizerBase
) -> Examples:
    positions = getattr(read_config(config.model), "max_position_embeddings", None)
    return load_examples(
        path, tokenizer, config.algorithm, token_budget=config.update.token_budget,
        max_length=positions or config.update.token_budget,
        step_separator=config.data.step_separator,
    )  # fmt: skip


def _check(config: OfflineConfig, examples: Examples, source: str, *, scalar: bool) -> None:
    """Refuse what the learner cannot compute before weights are read."""
    check_tokens(config.model, examples.largest_token, source)
    cure = f"shorten the examples of {source}"
    check_model(config.model, longest=examples.longest, cure=cure, scalar=scalar)


def _describe_scalar(
    config: OfflineConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write down in the model's config what the readers of its checkpoint need to know."""
    model.config.reward_bias = 0.0
    if model.config.pad_token_id is None:
        # transformers' classifiers find the last token of padded sequences by it
        model.config.pad_token_id = tokenizer.pad_token_id
    if config.algorithm == "process_reward":
        model.config.step_separator = config.data.step_separator


def _with_reference(
    config: OfflineConfig,
    model: PreTrainedModel,
    examples: Sequence[Example],
    log: RunLog,
    stop: Callable[[], bool],
) -> list[Example]:
    """The examples with logprobs by the model as it is."""
    device = next(model.parameters()).device
    done: list[Example] = []
    with log.phase("reference") as progress:
        for micro in split_by_tokens(examples, config.update.token_budget):
            raise_if(stop)
            places = every_completion(micro)
            logprobs = score(model, pack_sequences(places).to(device), 1.0).cpu()
            lengths = [len(example.completions[i]) for example, i in places]
            parts = iter(logprobs.split(lengths))
            done += [
                replace(example, ref_logprobs=tuple(next(parts) for _ in example.completions))
                for example in micro
            ]
            progress(len(done), len(examples))
    return done


def _start(
    config: OfflineConfig,
    parts: Parts,
    log: RunLog,
    stop: Callable[[], bool],
    saved: Saved | None,
) -> None:
    millions = sum(p.numel() for p in parts.model.parameters()) / 1e6
    log.say(
        f"{config.model}: {millions:.1f} M parameters, {config.dtype} on {parts.device}, "
        f"{config.algorithm} on {len(parts.examples)} examples"
    )
    if saved:
        parts.step = checkpoint.load(saved, model=parts.model, parts=parts.stateful)
        log.say(f"resumed after step {parts.step} from {saved.path}")
        if parts.stream.changes:
            log.say(parts.stream.changes)
    else:
        checkpoint.rehearse(
            config.output_dir, parts.model, parts.tokenizer, parts.model.parameters()
        )
    parts.boundary = parts.stream.state_dict()
    # a run may have ended within the evaluation after its checkpoint
    if config.evaluation.every_steps and not log.is_evaluated(parts.step):
        log.start_step()
        if evaluated := _evaluation(config, parts, log, stop):
            log.add(parts.step, evaluated)


def _step(config: OfflineConfig, parts: Parts, log: RunLog) -> Metrics:
    """One optimizer step on the next examples."""
    log.start_step()
    examples = parts.stream.next()
    with log.phase("update"):
        micro = micro_batches(examples, config.algorithm, config.update.token_budget)
        vector = parts.family.gradients(parts.model, [m.to(parts.device) for m in micro])
        parts.whole = False
        try:
            grad_norm, update = apply_gradients(parts.optimizer, config.update.max_grad_norm)
        except TrainingError:
            parts.whole = True
            raise
        lr = float(parts.schedule.get_last_lr()[0])
        parts.schedule.step()
    parts.step, parts.boundary, parts.whole = parts.step + 1, parts.stream.state_dict(), True
    parts.recent = examples
    return _named("train", parts.family.read(vector)) | {
        "grad_norm": grad_norm.item(),
        "lr": lr,
        "epoch": parts.stream.epoch,
        "perf/tokens": float(sum(example.num_tokens for example in examples)),
        **update_metrics([update]),
    }


def _named(prefix: str, metrics: Metrics) -> Metrics:
    """Common metrics and those of a row, all under train/ or eval/."""
    return {f"{prefix}/{name.replace('/', '_')}": value for name, value in metrics.items()}


@torch.no_grad()
def _evaluation(
    config: OfflineConfig, parts: Parts, log: RunLog, stop: Callable[[], bool]
) -> Metrics:
    """Loss on the held-out examples, where it is due."""
    every = config.evaluation.every_steps
    if not every or not (parts.step == 0 or due(parts.step, every, config.steps)):
        return {}
    with log.phase("evaluate"):
        micro = micro_batches(parts.eval_examples, config.algorithm, config.update.token_budget)
        asked = parts.model.base_model.register_forward_pre_hook(lambda *_: raise_if(stop))
        try:
            vector = parts.family.gradients(parts.model, [m.to(parts.device) for m in micro])
        finally:
            asked.remove()
    return _named("eval", parts.family.read(vector))


@torch.no_grad()
def _normalise(config: OfflineConfig, parts: Parts, log: RunLog) -> None:
    """Let the mean reward of the training completions be 0."""
    parts.model.config.reward_bias = 0.0
    scores: list[Tensor] = []
    with log.phase("normalise") as progress:
        micro = split_by_tokens(parts.examples, config.update.token_budget)
        for done, examples in enumerate(micro, start=1):
            batch = pack_sequences(every_completion(examples)).to(parts.device)
            scores.append(sequence_scores(parts.model, batch).double())
            progress(done, len(micro))
    mean = torch.cat(scores).mean().item()
    parts.model.config.reward_bias = -mean
    log.say(f"training completions score {mean:.4f} on average; reward_bias = {-mean:.4f}")


def _check_state(config: OfflineConfig, parts: Parts) -> None:
    """Prove before a save that the weights can be gone on with: loss and gradient are finite for
    examples of the last step.

    Raises:
        TrainingError: they are not.
    """
    micro = micro_batches(parts.recent, config.algorithm, config.update.token_budget)[:1]
    if not micro:
        return
    loss = parts.family.read(parts.family.gradients(parts.model, [micro[0].to(parts.device)]))
    norm = gradient_norm(parts.model.parameters()).item()
    parts.optimizer.zero_grad(set_to_none=True)
    check_state(parts.step, loss["loss"], norm, config.output_dir)


def _save(config: OfflineConfig, parts: Parts, log: RunLog, schedule: Schedule) -> None:
    if schedule.saved == parts.step:
        return
    _check_state(config, parts)
    if parts.family.normalise and parts.step == config.steps:
        _normalise(config, parts, log)
    save(parts, log, config, schedule)


def _report(metrics_path: Path, log: RunLog) -> None:
    """What was learned, in a line and in a picture."""
    evaluated = [row for row in read_rows(metrics_path) if "eval/loss" in row]
    if len(evaluated) > 1:
        first, last = evaluated[0], evaluated[-1]
        for name in ("loss", "accuracy", "margin"):
            if f"eval/{name}" in first:
                log.say(
                    f"held-out {name}: {first[f'eval/{name}']:.3f} after step {first['step']}, "
                    f"{last[f'eval/{name}']:.3f} after step {last['step']}"
                )
    log.say(f"learning curves: {plot.plot_run(metrics_path, PANELS)}")
