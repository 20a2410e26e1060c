"""What policy_loss_from_logits gives for rows at all places, as a digest that does not depend on
the chip: `python -m tests.kernels.kept_row_worker`, on the emulated kernels.

A row and its gradient begin anywhere between 16-byte boundaries, in place or apart, and the
gradient of float32 logits is rounded to 16 bits where it is asked for.
"""

import hashlib

import torch
from torch import Tensor

from warpo.kernels import _cpu, dispatch
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.logprobs import LogprobsArguments
from warpo.kernels._arguments.policy_loss import KlPenaltyArguments
from warpo.kernels._arguments.policy_loss_from_logits import PolicyLossFromLogitsArguments
from warpo.kernels.objectives import OBJECTIVES

# a vector; shares of 256 vectors, the last ones empty; shares of more, and a column past a boundary
VOCABS = (1, 9, 4099, 20008, 33001)
HALVES = (torch.bfloat16, torch.float16)
STEPS = 4
IGNORED = -100


def at(x: Tensor, offset: int) -> Tensor:
    """A copy whose first element is `offset` elements past a boundary, and NaN beside each row."""
    stride = x.shape[-1] + 16
    storage = torch.full((offset + x.shape[-2] * stride,), torch.nan, dtype=x.dtype)
    rows = storage[offset:].as_strided((1, *x.shape[-2:]), (0, stride, 1))
    return rows.copy_(x)


def beside(x: Tensor) -> Tensor:
    """What lies between the rows of `at`."""
    steps, vocab = x.shape[-2:]
    return x.as_strided((steps - 1, 16), (x.stride(-2), 1), x.storage_offset() + vocab)


def run(logits: Tensor, gradient: Tensor, targets: Tensor, entropy_coef: float) -> list[Tensor]:
    vocab = logits.shape[-1]
    logprobs, entropy = torch.empty(1, STEPS), torch.empty(1, STEPS)
    forward = LogprobsArguments(
        rows=1,
        steps=STEPS,
        vocab=vocab,
        logits=logits,
        targets=targets,
        temperature=0.8,
        token_temperature=None,
        mask=None,
        ignore_index=IGNORED,
        logprobs=logprobs,
        entropy=entropy,
        stats=None,
        partials=None,
    )
    arguments = PolicyLossFromLogitsArguments(
        objective=OBJECTIVES["gpg"].replace(entropy_coef=entropy_coef).arguments,
        kl_penalty=KlPenaltyArguments(kl=0, kl_coef=0.0, adaptive_kl_coef=None),
        forward=forward,
        sequences=1,
        cu_seqlens=None,
        old_logprobs=None,
        advantages=torch.tensor([[1.0, -2.0, 0.5, 3.0]]),
        ref_logprobs=None,
        sampler_logprobs=None,
        valid_tokens=None,
        denominator=DenominatorArguments(0.5, None),
        grad_logits=gradient,
    )
    dispatch.load("cpu").policy_loss_from_logits(arguments)
    return [logprobs, entropy, gradient]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def check(vocab: int, dtype: torch.dtype, entropy_coef: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    values = (3 * torch.randn(STEPS, vocab, generator=generator)).to(dtype)
    targets = torch.tensor([[0, vocab - 1, IGNORED, vocab // 2]])
    wanted = run(at(values, 0), at(values, 0), targets, entropy_coef)
    for offset, gradient_offset in ((1, 1), (3, 0), (0, 5), (7, 2)):
        apart = at(values, gradient_offset)
        assert same(run(at(values, offset), apart, targets, entropy_coef), wanted)
        over = at(values, offset)
        assert same(run(over, over, targets, entropy_coef), wanted)
        assert beside(apart).isnan().all() and beside(over).isnan().all()
        for half in HALVES if dtype == torch.float32 else ():
            short = at(values.to(half), gradient_offset)
            rounded = [*wanted[:2], wanted[2].to(half)]
            assert same(run(at(values, offset), short, targets, entropy_coef), rounded)
            assert beside(short).isnan().all()
    return wanted


def main() -> None:
    assert _cpu.instruction_set() == "emulated"
    digest = hashlib.sha256()
    for vocab in VOCABS:
        for dtype in (torch.float32, *HALVES):
            for x in check(vocab, dtype, 0.01 if vocab % 2 else 0.0):
                digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())


main()
