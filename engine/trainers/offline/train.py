"""Training from given data: draw examples, compute the loss, update, measure on held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from warpo.engine.config.offline import OfflineConfig
from warpo.engine.data.examples import Example, Examples, load_examples
from warpo.engine.data.stream import PromptStream
from warpo.engine.models.architectures import check_model, check_tokens
from warpo.engine.models.files import check_files, load_tokenizer, read_config
from warpo.engine.models.micro_batches import split_by_tokens
from warpo.engine.models.model import is_packed, load_model
from warpo.engine.models.scalar import load_scalar_model
from warpo.engine.models.score import device_of, score
from warpo.engine.plan.settle import settle_update, told
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.engine.run import checkpoint, plot
from warpo.engine.run.columns import Column
from warpo.engine.run.device import learner_device
from warpo.engine.run.log import Log, read_rows
from warpo.engine.run.loop import Checkpoints, Contents, Run, evaluate_before_first_step, open_run
from warpo.engine.run.resume import is_complete
from warpo.engine.trainers.offline.learner import OfflineLearner
from warpo.engine.trainers.offline.memory import offline_peak
from warpo.engine.trainers.offline.objectives import (
    every_completion,
    make_objective,
    pack_sequences,
)

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
    plot.Panel("seconds per step", (("perf/step_s", "train"),), limits=(0, None)),
)


class Data(NamedTuple):
    """Examples to learn from and to be measured on, and the keys of the former."""

    examples: Sequence[Example]
    eval_examples: list[Example]
    keys: torch.Tensor


def run(config: OfflineConfig, ranks: Ranks = ONE_RANK) -> None:
    """Train as the config says; see `warpo train --help`.

    Raises:
        WarpoError: bad input, or a failed step; a checkpoint of the last complete step is left,
            unless its state has diverged.
        KeyboardInterrupt: Ctrl-C, SIGTERM or the end of the terminal; likewise.
    """
    # a step takes moments: as many rows as one looks through
    shown_every = max(1, config.steps // SHOWN_ROWS)
    config, settled = settle_update(config, offline_peak)
    said = told(config, settled)
    with open_run(config, ranks, said, columns=COLUMNS, shown_every=shown_every) as run:
        log = run.log
        if not is_complete(config, run.saved):
            learner = build(config, run)
            checkpoints = _checkpoints(config, run, learner)
            _prepare(config, run, learner, checkpoints)
            with checkpoints:
                while learner.step < config.steps:
                    run.raise_if_stopped()
                    log.start_step()
                    metrics = learner.update()
                    try:
                        metrics |= learner.evaluate()
                    finally:
                        log.write(learner.step, metrics)
                    if checkpoints.is_due():
                        checkpoints.save()
        _report(Path(config.output_dir) / "metrics.jsonl", log)


def build(config: OfflineConfig, run: Run) -> OfflineLearner:
    """Data, model and optimizer, in the order of what can fail fastest."""
    torch.manual_seed(config.seed)
    device, objective = learner_device(config), make_objective(config)
    with run.log.phase("load"):
        check_files(config.model)
        tokenizer = load_tokenizer(config.model)
        data = _load_data(config, tokenizer, scalar=objective.scalar)
        load = load_scalar_model if objective.scalar else load_model
        model = load(config.model, config.dtype, device)
    if objective.scalar:
        _describe_scalar(config, model, tokenizer)
    if objective.reference:
        # The model is still the reference, so none has to be held next to it.
        count = len(data.examples)
        both = _with_reference(config, run, model, [*data.examples, *data.eval_examples])
        data = data._replace(examples=both[:count], eval_examples=both[count:])
    return OfflineLearner(
        config,
        run,
        objective,
        model=model,
        tokenizer=tokenizer,
        stream=PromptStream(data.examples, data.keys, config.batch_size, config.seed),
        examples=data.examples,
        eval_examples=data.eval_examples,
    )


def _load_data(config: OfflineConfig, tokenizer: PreTrainedTokenizerBase, *, scalar: bool) -> Data:
    examples = _load_examples(config, config.data.train, tokenizer)
    eval_examples: list[Example] = []
    if config.data.eval:
        held_out = _load_examples(config, config.data.eval, tokenizer)
        eval_examples = held_out[: config.evaluation.max_examples]
        _check(config, held_out, config.data.eval, scalar=scalar)
    _check(config, examples, config.data.train, scalar=scalar)
    return Data(examples, eval_examples, examples.keys)


def _load_examples(
    config: OfflineConfig, path: str, tokenizer: PreTrainedTokenizerBase
) -> Examples:
    positions = getattr(read_config(config.model), "max_position_embeddings", None)
    return load_examples(
        path,
        tokenizer,
        config.algorithm,
        token_budget=config.update.token_budget,
        max_length=positions or config.update.token_budget,
        step_separator=config.data.step_separator,
    )


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
    config: OfflineConfig, run: Run, model: PreTrainedModel, examples: Sequence[Example]
) -> list[Example]:
    """The examples with logprobs by the model as it is."""
    done: list[Example] = []
    with run.log.phase("reference") as progress:
        shared = is_packed(model)
        for micro in split_by_tokens(examples, config.update.token_budget, shared=shared):
            run.raise_if_stopped()
            places = every_completion(micro)
            logprobs = score(model, pack_sequences(places).to(device_of(model)), 1.0).cpu()
            lengths = [len(example.completions[i]) for example, i in places]
            parts = iter(logprobs.split(lengths))
            done += [
                replace(example, ref_logprobs=tuple(next(parts) for _ in example.completions))
                for example in micro
            ]
            progress(len(done), len(examples))
    return done


def _checkpoints(config: OfflineConfig, run: Run, learner: OfflineLearner) -> Checkpoints:
    contents = Contents(
        model=learner.model,
        tokenizer=learner.tokenizer,
        parts=learner.stateful,
        check=learner.finish,
    )
    return Checkpoints(config, run, learner.progress, contents)


def _prepare(
    config: OfflineConfig, run: Run, learner: OfflineLearner, checkpoints: Checkpoints
) -> None:
    """Bring the model to the state that the next step starts from, and measure it."""
    log, model = run.log, learner.model
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    log.say(
        f"{config.model}: {millions:.1f} M parameters, {config.dtype} on {device_of(model)}, "
        f"{config.algorithm} on {len(learner.examples)} examples"
    )
    if run.saved:
        checkpoints.load()
        run.say_resumed()
        if learner.stream.changes:
            log.say(learner.stream.changes)
    else:
        checkpoint.rehearse(config.output_dir, model, learner.tokenizer, model.parameters())
    learner.progress.mark()
    evaluate_before_first_step(log, learner.step, learner.evaluate)


def _report(metrics_path: Path, log: Log) -> None:
    """Report what was learned, in a line and in a picture."""
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
