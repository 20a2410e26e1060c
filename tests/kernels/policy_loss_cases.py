"""Hypothesis-made arguments of the policy loss, and what float64 says of them."""

import itertools
import math

import torch
from hypothesis import strategies as st

from tests.kernels.backends import DEVICE, dtypes, strided
from warpo.kernels import reference
from warpo.kernels.objectives import AGGREGATIONS, KL_LEVELS, SURROGATES, Objective
from warpo.kernels.reference.policy_loss import binary_divergence
from warpo.kernels.reference.sequences import sequences_of

PER_TOKEN = (
    "logprobs",
    "old_logprobs",
    "advantages",
    "ref_logprobs",
    "sampler_logprobs",
    "entropy",
)
# Every surrogate at every ratio level that takes it.
OF_TOKENS = ("divergence_tv", "divergence_kl")
LEVELS = [("sequence", "geometric"), ("prefix", "stop_gradient")] + [
    (level, surrogate)
    for level in ("token", "sequence", "product")
    for surrogate in SURROGATES
    if surrogate != "geometric" and (level == "token" or surrogate not in OF_TOKENS)
]
# Every estimator of the KL with the gradients and the source of samples that it takes.
KLS = [
    {"kl_estimator": estimator, "kl_gradient": gradient, "kl_sampled_from": source}
    for estimator, gradient, source in (
        *(("k1", "k2", "policy"), ("k2", "k2", "policy"), ("k3", "k2", "policy")),
        *((name, "estimator", "policy") for name in ("k2", "k3", "reverse_k3")),
        *((name, "estimator", "reference") for name in ("k1", "k2", "k3", "reverse_k3")),
    )
]
# Ratios this close to a bound may be on its other side in float32.
MARGIN = 1e-4


@st.composite
def objectives(draw):
    ratio_level, surrogate = draw(st.sampled_from(LEVELS))
    return Objective(
        ratio_level=ratio_level,
        surrogate=surrogate,
        clip_low=draw(st.sampled_from([0.0, 0.2, 1.0])),
        clip_high=draw(st.sampled_from([0.0, 0.2, 0.28, math.inf])),
        dual_clip=draw(st.sampled_from([1.5, 3.0])),
        tau_negative=draw(st.sampled_from([0.5, 1.05])),
        kl_coef=draw(st.sampled_from([0.0, 0.1, 1.0])),
        kl_level=draw(st.sampled_from(KL_LEVELS)),
        **draw(st.sampled_from(KLS)),
        entropy_coef=draw(st.sampled_from([0.0, 0.5])),
        correction=draw(st.sampled_from(["none", "truncate", "mask"])),
        correction_level=draw(st.sampled_from(["token", "sequence"])),
        correction_low=draw(st.sampled_from([0.0, 0.5])),
        correction_high=draw(st.sampled_from([1.2, 2.0])),
        correction_nan=draw(st.sampled_from(["propagate", "mask"])),
        sequence_mask=draw(
            st.sampled_from([math.inf] if surrogate == "geometric" else [math.inf, 0.0, 0.1])
        ),
        aggregation=draw(st.sampled_from(AGGREGATIONS)),
        log_ratio_limit=draw(st.sampled_from([20.0, 0.5])),
    )


@st.composite
def cases(draw, backend: str):
    """Arguments of one dtype, padded or packed, with NaN in masked slots."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes(backend)))
    objective = draw(objectives())
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 17, 130]), max_size=5))
    shape = (sum(lengths),) if packed else (len(lengths), draw(st.sampled_from([0, 1, 3, 40, 300])))
    # ratios of e^12 give gradients that float16 does not hold
    spread = draw(st.sampled_from([1e-3, 0.3] if dtype is torch.float16 else [1e-3, 0.3, 3.0]))
    if dtype is torch.float16 and objective.ratio_level == "prefix":
        objective = objective.replace(log_ratio_limit=0.5)

    def near(x):
        return x + spread * torch.randn(shape, generator=generator)

    base = -2 * torch.rand(shape, generator=generator)
    tensors = {name: near(base) for name in PER_TOKEN if name.endswith("logprobs")}
    tensors["entropy"] = near(base).abs()
    if objective.correction_nan == "mask":
        lost = torch.rand(shape, generator=generator) < 0.1
        tensors["sampler_logprobs"] = tensors["sampler_logprobs"].masked_fill(lost, torch.nan)
    per_sequence = draw(st.booleans()) and len(lengths) != sum(lengths)
    count = (len(lengths),) if per_sequence else shape
    tensors["advantages"] = torch.randn(count, generator=generator)
    layout = draw(st.sampled_from(["dense", "sliced", "transposed"]))
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.6]))
        for name in PER_TOKEN:
            if tensors[name].shape == mask.shape:
                tensors[name] = tensors[name].masked_fill(~mask, torch.nan)
        tensors["mask"] = mask
    tensors = {
        name: strided(x.to(dtype) if name in PER_TOKEN else x, layout)
        for name, x in tensors.items()
    }
    if packed:
        starts = list(itertools.accumulate(lengths, initial=0))
        tensors["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    if draw(st.booleans()):
        tensors["old_logprobs"] = None
    kl_coef = draw(st.sampled_from([None, 0.3, torch.tensor(0.3, device=DEVICE)]))
    return tensors | {"kl_coef": kl_coef}, objective, draw(st.sampled_from([1.0, 7.0, 0.0]))


def exact_loss(arguments, objective, denominator):
    """(logprobs, entropy, loss, metrics) in float64 from the reference."""
    double = {
        n: x.detach().double() if n in PER_TOKEN and x is not None else x
        for n, x in arguments.items()
    }
    logp = double["logprobs"].requires_grad_()
    entropy = double["entropy"].requires_grad_() if "entropy" in double else None
    old = logp.detach() if double["old_logprobs"] is None else double["old_logprobs"]
    cu_seqlens, kl_coef = double.get("cu_seqlens"), double.get("kl_coef")
    has_kl = objective.kl_coef > 0 or kl_coef is not None
    loss, metrics = reference.policy_loss(
        logp,
        old,
        per_token(double["advantages"], logp, cu_seqlens),
        objective,
        torch.tensor(denominator, dtype=torch.float64, device=DEVICE),
        mask=double.get("mask"),
        cu_seqlens=cu_seqlens,
        ref=double["ref_logprobs"] if has_kl else None,
        sampler=double.get("sampler_logprobs"),
        entropy=entropy,
        kl_coef=kl_coef.double() if isinstance(kl_coef, torch.Tensor) else kl_coef,
    )
    return logp, entropy, loss, metrics


def per_token(advantages, logp, cu_seqlens):
    if advantages.shape == logp.shape:
        return advantages
    if cu_seqlens is None:
        return advantages[:, None].expand(logp.shape)
    return advantages.repeat_interleave(cu_seqlens.diff().long())


def near_a_bound(arguments, objective) -> bool:
    """Whether float32 and float64 may disagree on which side of a bound something lies."""
    logp = arguments["logprobs"].double()
    old = logp if arguments["old_logprobs"] is None else arguments["old_logprobs"].double()
    tokens = sequences_of(logp, arguments.get("mask"), arguments.get("cu_seqlens"))
    log_ratio = tokens.clean(logp) - tokens.clean(old)
    log_weight = tokens.clean(old) - tokens.clean(arguments["sampler_logprobs"].double())
    if objective.correction_level == "sequence":
        log_weight = tokens.sum(log_weight)
    levels = [log_ratio]
    if objective.ratio_level != "token":
        sequence = objective.ratio_level == "sequence"
        levels.append(tokens.mean(log_ratio) if sequence else tokens.prefix_sum(log_ratio))
    low, high = objective.clip_low, objective.clip_high
    limit = objective.log_ratio_limit
    ratio_edges = [1 - low, 1 + high, objective.dual_clip, math.exp(limit), math.exp(-limit)]
    weight_edges = [objective.correction_low, objective.correction_high, *ratio_edges[-2:]]
    pairs = [(x, ratio_edges) for x in levels] + [(log_weight, weight_edges)]
    if objective.sequence_mask < math.inf:
        sampler = tokens.clean(arguments["sampler_logprobs"].double())
        drawn = tokens.clean(old) if objective.correction == "none" else sampler
        pairs.append((tokens.mean(drawn - tokens.clean(logp)), [math.exp(objective.sequence_mask)]))
    if objective.surrogate in OF_TOKENS:
        ratio = log_ratio.clamp(-limit, limit).exp()
        moved = binary_divergence(objective, tokens.clean(logp), ratio)
        pairs.append((moved.log(), [low, high]))
    # a log ratio of exactly 0 has the ratio 1 in both
    return any(
        (((x.exp() / edge - 1).abs() < MARGIN) & (x != 0)).any()
        for x, edges in pairs
        for edge in edges
        if 0 < edge < math.inf
    )
