"""`warpo check`: what a run relies on, tried on its own model and data before it starts."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console

from warpo.engine import mismatch, step
from warpo.engine.architectures import check_run, check_tokens
from warpo.engine.batch import Batch, Rollout, pack
from warpo.engine.build import Parts, build
from warpo.engine.config import Config
from warpo.engine.data import Prompts, load_prompts
from warpo.engine.device import learner_device
from warpo.engine.errors import WeightMismatch
from warpo.engine.invariance import (
    LAYOUTS,
    MAX_LAYERS,
    MAX_VOCABULARY,
    Divergence,
    divergences,
    eager_attention,
    load_cut_model,
)
from warpo.engine.limits import check_limits
from warpo.engine.memory import (
    MIB,
    PHASES,
    MemoryPlan,
    plan_memory,
    resync_of,
    rollouts_of,
)
from warpo.engine.model_files import check_files, load_tokenizer
from warpo.engine.peak_memory import PeakMemory, free_memory, rehearse
from warpo.engine.probe import probe_weights, relative
from warpo.engine.resolve import resolve
from warpo.engine.sampler.base import SamplingOptions
from warpo.engine.sampler.kinds import SAMPLERS
from warpo.engine.terminal import OutputConsole
from warpo.engine.train import train_step
from warpo.kernels import ops
from warpo.kernels.objectives import OBJECTIVES, Objective

MEMORY_BOUND = 0.05
# Tokenizer, data, the objects of vLLM and of Python, pages: 22 to 50 MiB of the resident set were
# seen beside the tensors, whatever the model.
MEMORY_FLOOR = 64 * MIB

# Rollouts whose gradients are compared: prompts x completions, and their most new tokens.
INVARIANCE_PROMPTS, INVARIANCE_GROUP, INVARIANCE_TOKENS = 2, 2, 32
# Sampling takes no more memory for longer completions: the KV cache is there from the beginning.
MEASURED_NEW_TOKENS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One finding: a name, a value against its bound, and what to do where it fails."""

    name: str
    text: str
    ok: bool
    cure: str = ""


class Report:
    """Findings, printed as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.lines: list[Line] = []

    def head(self, text: str) -> None:
        self._console.print(f"\n{text}", markup=False, highlight=False, soft_wrap=True)

    def add(self, line: Line) -> None:
        self.lines.append(line)
        text = f"  {'ok  ' if line.ok else 'FAIL'}  {line.name:16}  {line.text}"
        self.say(text)
        if not line.ok and line.cure:
            self.say(f"        {line.cure}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @property
    def ok(self) -> bool:
        return all(line.ok for line in self.lines)


def run(config: Config, *, plan_only: bool = False, console: Console | None = None) -> bool:
    """Check a config, see `warpo check --help`; True if all holds.

    Raises:
        WarpoError: the config cannot be built.
    """
    console = console or OutputConsole()
    report = Report(console)
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
        parts, meter = _measured_step(config, plan, prompts, report, status.update)
        if parts.resync.mode != resync_of(config):
            plan = plan_memory(config, lengths, device, parts.resync.mode)
        _report_memory(report, plan, meter, config)
        status.update("sampling")
        rollouts = _sample(config, parts, prompts)
        _report_attention(report, config, parts, rollouts)
        # The learner, the optimizer and the KV cache make room for the model in float64.
        parts.rewards.close()
        parts.sampler.release_kv()
        del parts
        _report_invariance(report, config, rollouts, device, status.update)
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


def _measured_step(
    config: Config,
    plan: MemoryPlan,
    prompts: Prompts,
    report: Report,
    progress: Callable[[str], None],
) -> tuple[Parts, PeakMemory]:
    """A step of the planned shape in the order of training, and the probe at its end."""
    device = learner_device(config)
    rehearsed = rehearse(config, device)
    meter = PeakMemory(device)
    with meter.phase("load"):
        parts = build(config)
        if parts.algorithm.has_reference:
            parts.reference = copy.deepcopy(parts.model).requires_grad_(False).eval()
        parts.publish()
    micro_batches = _micro_batches(config, plan, parts)
    # The first update makes the optimizer's state, which all phases of later steps hold.
    progress("update")
    train_step(config, parts, micro_batches, step=config.steps, update=0)
    parts.publish()
    progress("sample")
    longest = int(prompts.lengths.max())
    rng, vocabulary = random.Random(0), _vocab_size(parts)
    requests = [
        [rng.randrange(vocabulary) for _ in range(longest)]
        for _ in range(config.rollout.prompts_per_step)
    ]
    with meter.phase("sample"):
        parts.sampler.generate(
            requests,
            SamplingOptions(
                group_size=config.rollout.group_size, temperature=config.rollout.temperature,
                max_new_tokens=min(MEASURED_NEW_TOKENS, config.rollout.max_new_tokens), seed=0,
            ),
        )  # fmt: skip
    parts.sampler.release_kv()
    progress("score")
    with meter.phase("score"):
        micro_batches = [
            step.with_scores(
                batch, parts.model, parts.reference, parts.critic,
                temperature=config.rollout.temperature, recompute_old=True,
            )
            for batch in micro_batches
        ]  # fmt: skip
    progress("update")
    with meter.phase("update"):
        train_step(config, parts, micro_batches, step=config.steps, update=0)
    progress("publish")
    rollout = rollouts_of(replace(plan.shape, prompt_tokens=longest), vocabulary)[0]
    tokens = rollout.prompt_ids + rollout.completion.token_ids
    with meter.phase("publish"):
        copied = parts.publish()
        parts.sampler.resume_kv()
        parts.resync.verify()
        if config.probe.num_sequences:
            _probe(config, parts, [tokens] * config.probe.num_sequences, report)
    report.head("weights: sampler and learner")
    report.add(
        Line(
            name=f"resync {parts.resync.mode}",
            text=f"{copied} bytes copied after an update, {parts.resync.extra_bytes} bytes of "
            "weights that only the learner has; places and fingerprints agree",
            ok=True,
        )
    )
    if parts.resync.reason:
        report.say(f"        no alias: {parts.resync.reason}")
    del rehearsed
    return parts, meter


def _vocab_size(parts: Parts) -> int:
    return int(parts.model.config.get_text_config().vocab_size)


def _micro_batches(config: Config, plan: MemoryPlan, parts: Parts) -> list[Batch]:
    """One of the planned shape, and a second where the step has several."""
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    several = rollouts > config.update.minibatches * plan.shape.sequences
    batch = pack(rollouts_of(plan.shape, _vocab_size(parts))).to(parts.device)
    batch = step.with_scores(
        batch, parts.model, parts.reference, parts.critic,
        temperature=config.rollout.temperature, recompute_old=True,
    )  # fmt: skip
    batch = replace(batch, sampler_logprobs=batch.old_logprobs)
    return [batch] * (2 if several else 1)


def _probe(
    config: Config, parts: Parts, sequences: Sequence[Sequence[int]], report: Report
) -> None:
    """The proof of every step, after an update that moved the weights."""
    bound = config.probe_tolerance
    try:
        probe = probe_weights(parts.model, parts.sampler, sequences, bound, parts.tokenizer.decode)
    except WeightMismatch as found:
        text, ok, cure = f"above {bound:g}", False, str(found)
    else:
        error = relative(probe.learner - probe.sampler, probe.learner).max().item()
        text, ok, cure = f"{error:.1e} <= {bound:g}", True, ""
    report.head("largest difference of a logprob after an update, nats; relative beyond 1 nat")
    report.add(Line(name="probe", text=f"{text}, sampler against learner", ok=ok, cure=cure))
    if ok:
        alone = mismatch.composition(parts.model, sequences, probe)["mismatch/composition_max"]
        report.add(
            Line(
                name="composition",
                text=f"{alone:.1e} <= {bound:g}, learner with sequences packed against one alone",
                ok=alone <= bound,
                cure="what attention and matrix products add is above probe.tolerance: raise it, "
                "or compute in float32",
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
        if name in ("sample", "publish") and not SAMPLERS[config.sampler].has_kv_cache:
            planned = " and ".join(kind.title for kind in SAMPLERS.values() if kind.has_kv_cache)
            report.say(f"        {name:16}  {text}, not judged: only {planned}'s memory is planned")
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


def _sample(config: Config, parts: Parts, prompts: Prompts) -> list[Rollout]:
    """Rollouts of the shortest prompts; gradients of few tokens show what those of many do."""
    order = prompts.lengths.argsort(kind="stable")
    shortest = [prompts[int(i)] for i in order[:INVARIANCE_PROMPTS]]
    groups = parts.sampler.generate(
        [prompt.token_ids for prompt in shortest],
        SamplingOptions(
            group_size=INVARIANCE_GROUP, temperature=config.rollout.temperature,
            max_new_tokens=min(INVARIANCE_TOKENS, config.rollout.max_new_tokens),
            seed=config.seed,
        ),
    )  # fmt: skip
    return [
        Rollout(prompt_ids=prompt.token_ids, completion=completion)
        for prompt, group in zip(shortest, groups, strict=True)
        for completion in group
    ]


@torch.no_grad()
def _report_attention(
    report: Report, config: Config, parts: Parts, rollouts: Sequence[Rollout]
) -> None:
    """Packed rows of the whole model against its own attention."""
    temperature = config.rollout.temperature
    packed = step.score(parts.model, pack(rollouts).to(parts.device), temperature)
    with eager_attention(parts.model):
        alone = torch.cat([_eager_logprobs(parts, rollout, temperature) for rollout in rollouts])
    error, bound = relative(packed - alone, alone).max().item(), config.probe_tolerance
    report.add(
        Line(
            name="attention",
            text=f"{error:.1e} <= {bound:g}, learner with sequences packed against the model's own "
            "eager attention, each alone and unpadded",
            ok=error <= bound,
            cure="the learner does not compute this model's function: do not train it; or, where "
            "dtype is bfloat16, raise probe.tolerance to what its rounding takes",
        )
    )


def _eager_logprobs(parts: Parts, rollout: Rollout, temperature: float) -> torch.Tensor:
    ids = torch.tensor([rollout.prompt_ids + rollout.completion.token_ids], device=parts.device)
    logits = parts.model(input_ids=ids, use_cache=False).logits[0, :-1]
    return ops.logprobs(logits, ids[0, 1:], temperature=temperature)[len(rollout.prompt_ids) - 1 :]


def _report_invariance(
    report: Report,
    config: Config,
    rollouts: Sequence[Rollout],
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
    model, cut_rollouts = load_cut_model(config.model, rollouts, device)
    found = divergences(
        model, cut_rollouts, objectives, **options,
        progress=lambda done, total: progress(f"loss invariance, objective {done + 1} of {total}"),
    )  # fmt: skip
    model, cut_rollouts = load_cut_model(config.model, rollouts, device, torch.float32)
    rounding = divergences(model, cut_rollouts, {name: own}, **options)
    report.head(
        "loss invariance: gradient of an optimizer step against that of one micro-batch, relative "
        f"L2, worst of {len(objectives)} objectives\n  ({len(rollouts)} rollouts; of the model at "
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


def worst_of(found: Sequence[Divergence], layout: str) -> Divergence:
    """The largest of a layout; one that is not a number is larger than all."""
    return max(
        (divergence for divergence in found if divergence.layout == layout),
        key=lambda d: d.relative if d.relative == d.relative else float("inf"),
    )
