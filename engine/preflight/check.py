"""`warpo check`: what a run relies on, tried on its own model and data before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from warpo.engine.config.policy import Config
from warpo.engine.config.resolve import resolve
from warpo.engine.config.samplers import SAMPLERS
from warpo.engine.data.prompts import Prompts, load_prompts
from warpo.engine.learner.agreement import relative
from warpo.engine.learner.learner import Learner
from warpo.engine.models.architectures import check_run, check_tokens
from warpo.engine.models.batch import pack
from warpo.engine.models.files import check_files, load_tokenizer
from warpo.engine.models.score import device_of, score
from warpo.engine.models.step_rollouts import StepRollouts, step_rollouts
from warpo.engine.plan.memory import MIB, PHASES, MemoryPlan, plan_memory, resync_of
from warpo.engine.plan.settle import settle
from warpo.engine.preflight.check_step import TriedRun, measure_step
from warpo.engine.preflight.invariance import (
    LAYOUTS,
    MAX_LAYERS,
    MAX_VOCABULARY,
    REPEATED_BOUND,
    REPEATS,
    Divergence,
    divergences,
    eager_attention,
    load_cut_model,
    repeated_divergence,
    with_branches,
)
from warpo.engine.preflight.peak_memory import PeakMemory
from warpo.engine.preflight.report import Line, Report
from warpo.engine.rollout.sampler.base import Sampler, SamplingOptions
from warpo.engine.run.device import learner_device
from warpo.engine.run.free_memory import free_memory
from warpo.engine.run.terminal import OutputConsole
from warpo.engine.trainers.policy.limits import check_limits
from warpo.engine.types import TokenSequence
from warpo.kernels import ops
from warpo.kernels.objectives import OBJECTIVES, Objective

MEMORY_BOUND = 0.05
# Tokenizer, data, the objects of vLLM and of Python, pages: 22 to 50 MiB of the resident set were
# seen besides the tensors, whatever the model.
MEMORY_FLOOR = 64 * MIB

# Rollouts whose gradients are compared: prompts x completions, and their most new tokens.
INVARIANCE_PROMPTS, INVARIANCE_GROUP, INVARIANCE_TOKENS = 2, 2, 32


def run(config: Config, *, plan_only: bool = False, console: Console | None = None) -> bool:
    """Check a config, see `warpo check --help`; True if all holds.

    Raises:
        WarpoError: the config cannot be built.
    """
    console = console or OutputConsole()
    report = Report(console)
    config, settled = settle(config)
    if settled:
        report.say(settled)
    check_limits(config, check_files(config.model), learner_device(config))
    check_run(config)
    tokenizer = load_tokenizer(config.model)
    prompts = load_prompts(config.data.train, tokenizer, config.max_prompt_tokens)
    check_tokens(config.model, prompts.largest_token, config.data.train)
    device, lengths = learner_device(config), prompts.lengths.tolist()
    with console.status("planning memory"):
        plan = plan_memory(config, lengths, device, resync_of(config))
    _report_plan(report, plan, device, planned_only=plan_only)
    if plan_only or not report.ok:
        return report.ok
    with console.status("loading") as status:
        with ExitStack() as stack:
            tried = TriedRun(config, plan, report, stack)
            meter = measure_step(tried, prompts, status.update)
            mode = tried.weights.resync.mode
            if mode != resync_of(config):
                plan = plan_memory(config, lengths, device, mode)
            _report_memory(report, plan, meter, config)
            status.update("sampling")
            rollouts = _sample(config, tried.rollouts.sampler, prompts)
            _report_attention(report, config, tried.learner, rollouts)
            # The learner, the optimizer and the KV cache make room for the model in float64.
            tried.rollouts.sampler.release_kv()
            del tried
        _report_invariance(report, config, rollouts.sequences, device, status.update)
    return report.ok


def _report_plan(
    report: Report, plan: MemoryPlan, device: torch.device, *, planned_only: bool
) -> None:
    shape = plan.shape
    report.head(
        f"memory plan on {device}, MiB; micro-batches of {shape.sequences} rollouts of "
        f"{shape.prompt_tokens} + {shape.completion_tokens} tokens"
    )
    for name, size in plan.held.items():
        report.say(f"        {name:20}{size / MIB:12.1f}")
    if planned_only:
        for name in PHASES:
            report.say(f"        peak of {name:12}{plan.phases[name] / MIB:12.1f}")
    free = free_memory(device)
    worst = max(plan.phases, key=lambda name: plan.phases[name])
    report.add(
        Line(
            name="fits",
            text=f"peak {plan.peak / MIB:.1f} ({worst}), free {free / MIB:.1f}",
            ok=plan.peak <= free,
            cure="lower update.token_budget (activations), rollout.kv_cache_gib or "
            "rollout.max_new_tokens, or take a smaller model or dtype: bfloat16",
        )
    )


def _report_memory(report: Report, plan: MemoryPlan, meter: PeakMemory, config: Config) -> None:
    report.head(
        f"memory, peak of each phase, MiB; bound {MEMORY_BOUND:.0%} of the prediction or "
        f"{MEMORY_FLOOR / MIB:.0f}; measured: {meter.what}"
    )
    for name in PHASES:
        predicted, measured = plan.phases[name], meter.peaks[name]
        difference, bound = measured - predicted, max(MEMORY_BOUND * predicted, MEMORY_FLOOR)
        text = (
            f"predicted {predicted / MIB:9.1f}  measured {measured / MIB:9.1f}  "
            f"difference {difference / MIB:+8.1f} ({difference / predicted:+.1%})"
        )
        if unplanned := _unplanned(name, config):
            report.say(f"        {name:16}  {text}, not judged: {unplanned}")
            continue
        report.add(
            Line(
                name=name,
                text=text,
                ok=abs(difference) <= bound,
                cure="the plan is wrong for this model or machine: do not rely on what it says "
                "fits; leave room for the difference, and report it",
            )
        )


def _unplanned(phase: str, config: Config) -> str:
    """Why the memory of a phase is not as planned, or nothing."""
    if phase in ("sample", "publish") and not SAMPLERS[config.sampler].has_kv_cache:
        planned = " and ".join(kind.title for kind in SAMPLERS.values() if kind.has_kv_cache)
        return f"only {planned}'s memory is planned"
    if config.update.compile:
        return "what torch.compile takes, and spares in compiled layers, is not planned"
    return ""


def _sample(config: Config, sampler: Sampler, prompts: Prompts) -> StepRollouts:
    """Completions of the shortest prompts; gradients of few tokens show what those of many do."""
    order = prompts.lengths.argsort(kind="stable")
    shortest = [prompts[int(i)] for i in order[:INVARIANCE_PROMPTS]]
    groups = sampler.generate(
        [prompt.token_ids for prompt in shortest],
        SamplingOptions(
            group_size=INVARIANCE_GROUP,
            temperature=config.rollout.temperature,
            max_new_tokens=min(INVARIANCE_TOKENS, config.rollout.max_new_tokens),
            seed=config.seed,
        ),
    )
    return step_rollouts(shortest, groups, [0.0] * (len(shortest) * INVARIANCE_GROUP))


@torch.no_grad()
def _report_attention(
    report: Report, config: Config, learner: Learner, rollouts: StepRollouts
) -> None:
    """Packed rows of the whole model against its own attention."""
    temperature, model = config.rollout.temperature, learner.model
    sequences = with_branches(rollouts.sequences)
    packed = score(model, pack(sequences).to(learner.device), temperature)
    with eager_attention(model):
        alone = torch.cat([_eager_logprobs(model, x, temperature) for x in sequences])
    error, bound = relative(packed - alone, alone).max().item(), config.probe_tolerance
    report.add(
        Line(
            name="attention",
            text=f"{error:.1e} <= {bound:g}, learner with sequences packed against the model's own "
            "eager attention, each by itself and unpadded",
            ok=error <= bound,
            cure="the learner does not compute this model's function: do not train it; or, where "
            "dtype is bfloat16, raise probe.tolerance to what its rounding takes",
        )
    )


def _eager_logprobs(
    model: PreTrainedModel, sequence: TokenSequence, temperature: float
) -> torch.Tensor:
    ids = torch.from_numpy(sequence.token_ids)[None].to(device_of(model))
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    logprobs = ops.logprobs(logits, ids[0, 1:], temperature=temperature)
    return logprobs[sequence.prompt_length - 1 :]


def _report_invariance(
    report: Report,
    config: Config,
    sequences: Sequence[TokenSequence],
    device: torch.device,
    progress: Callable[[str], None],
) -> None:
    objectives = dict(OBJECTIVES)
    own = resolve(config).objective
    if not isinstance(own, Objective):
        own = OBJECTIVES["grpo"]
    name = next((name for name, row in OBJECTIVES.items() if row == own), "this config's")
    objectives[name] = own
    options: dict[str, Any] = dict(
        temperature=config.rollout.temperature, max_new_tokens=config.rollout.max_new_tokens
    )
    model, cut = load_cut_model(config.model, sequences, device)
    found = divergences(
        model,
        cut,
        objectives,
        **options,
        progress=lambda done, total: progress(f"loss invariance, objective {done + 1} of {total}"),
    )
    model, cut = load_cut_model(config.model, sequences, device, torch.float32)
    rounding = divergences(model, cut, {name: own}, **options)
    model, cut = load_cut_model(config.model, sequences, device, getattr(torch, config.dtype))
    repeated = repeated_divergence(model, cut, own, **options)
    report.head(
        "loss invariance: gradient of an optimizer step against that of one micro-batch, relative "
        f"L2, worst of {len(objectives)} objectives\n  ({len(sequences)} rollouts; of the model at "
        f"most {MAX_LAYERS} layers and {MAX_VOCABULARY} tokens, products in float64; in brackets "
        f"{name} in float32)"
    )
    for layout, bound in LAYOUTS.items():
        worst = worst_of(found, layout)
        alone = worst_of(rounding, layout)
        report.add(
            Line(
                name=layout,
                text=f"{worst.relative:.1e} <= {bound:g}, worst {worst.objective} "
                f"({alone.relative:.1e})",
                ok=worst.relative <= bound,
                cure=f"the gradient of {worst.objective} depends on how rollouts are laid out: "
                "update.token_budget changes what is learned. Do not train with this build",
            )
        )
    report.add(
        Line(
            name="repeated",
            text=f"{repeated:.1e} <= {REPEATED_BOUND:g}, one micro-batch {REPEATS} times over, in "
            f"{config.dtype}",
            ok=repeated <= REPEATED_BOUND,
            cure=f"gradients do not accumulate in float32: with dtype = {config.dtype} "
            "update.token_budget changes what is learned. Do not train with this build",
        )
    )


def worst_of(found: Sequence[Divergence], layout: str) -> Divergence:
    """The largest of a layout; one that is not a number is larger than all."""
    return max(
        (divergence for divergence in found if divergence.layout == layout),
        key=lambda d: d.relative if d.relative == d.relative else float("inf"),
    )
