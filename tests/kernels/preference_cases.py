"""Completions for the tests of preference_loss and kto_loss."""

import itertools

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.backends import DEVICE, strided


@st.composite
def completions(draw, generator: torch.Generator, number: int, dtype: torch.dtype):
    """{"logprobs", "ref_logprobs", "mask", "cu_seqlens"}: padded or packed, NaN where masked; some
    completions may have no token.
    """
    packed = draw(st.booleans())
    sizes = st.sampled_from([0, 1, 2, 17, 130, 600])
    lengths = draw(st.lists(sizes, min_size=number, max_size=number))
    shape = (sum(lengths),) if packed else (number, draw(st.sampled_from([0, 1, 3, 40, 600])))
    logprobs = -draw(st.sampled_from([0.01, 2.0])) * torch.rand(shape, generator=generator)
    tensors = {"logprobs": logprobs, "ref_logprobs": logprobs.clone()}
    tensors["ref_logprobs"] += 0.3 * torch.randn(shape, generator=generator)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.6]))
        bad = draw(st.sampled_from([torch.nan, torch.inf]))
        tensors = {name: x.masked_fill(~mask, bad) for name, x in tensors.items()}
    layout = draw(st.sampled_from(["dense", "sliced", "transposed"]))
    result: dict[str, Tensor | None] = {n: strided(x.to(dtype), layout) for n, x in tensors.items()}
    result["mask"] = None if mask is None else strided(mask, layout)
    result["cu_seqlens"] = None
    if packed:
        starts = list(itertools.accumulate(lengths, initial=0))
        result["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    return result


def lists_of(side: dict) -> list[tuple]:
    """(pi, ref) of the valid tokens of every completion, for the oracle."""
    pi, ref = (side[name].detach().double().cpu() for name in ("logprobs", "ref_logprobs"))
    mask = torch.ones_like(pi, dtype=torch.bool) if side["mask"] is None else side["mask"].cpu()
    if side["cu_seqlens"] is None:
        rows = zip(pi, ref, mask, strict=True)
    else:
        bounds = itertools.pairwise(side["cu_seqlens"].tolist())
        rows = ((pi[a:b], ref[a:b], mask[a:b]) for a, b in bounds)
    return [(p[m].cpu().numpy(), r[m].cpu().numpy()) for p, r, m in rows]


def magnitude(*sides: dict) -> float:
    """Largest sum of |logprob| + |ref| over a completion: what float32 rounds."""
    sums = [abs(p).sum() + abs(r).sum() for side in sides for p, r in lists_of(side)]
    return max(sums, default=0.0)
