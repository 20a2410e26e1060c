"""Launches of the Triton kernels of policy_loss, for test_triton_compile."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from tests.kernels.launches import flags
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.objective import ObjectiveArguments
from warpo.kernels._arguments.policy_loss import (
    MIN_PARTIALS,
    KlPenaltyArguments,
    PolicyLossArguments,
)
from warpo.kernels._policy_metrics import METRICS

Launch = tuple[str, Callable[[], None]]

TOKEN, SEQUENCE, PREFIX, PRODUCT = range(4)
CLIP, DUAL_CLIP, STOP_GRADIENT, MASK, NONE, REINFORCE, GEOMETRIC, SOFT_GATE = range(8)
DIVERGENCE_TV, DIVERGENCE_KL, GAMMA = range(8, 11)


@dataclass(kw_only=True)
class Case:
    """extras: entropy and its gradient, a coefficient on the device, straight-through where the
    estimator has it.
    """

    dtype: torch.dtype = torch.float32
    packed: bool = False
    mean: bool = False
    level: int = TOKEN
    surrogate: int = CLIP
    kl: int = 0
    kl_sequence: bool = False
    correction: int = 0
    correction_sequence: bool = False
    extras: bool = False

    def objective(self, clip: float) -> ObjectiveArguments:
        return ObjectiveArguments(
            ratio_level=self.level,
            surrogate=self.surrogate,
            ratio_low=1 - clip,
            ratio_high=1 + clip,
            dual_clip=3 + clip,
            tau_positive=1 + clip,
            tau_negative=1 + clip / 2,
            power_positive=2 + clip,
            power_negative=3 + clip,
            rate_positive=3 + clip,
            rate_negative=2 + clip,
            correction=self.correction,
            correction_sequence=self.correction_sequence,
            correction_low=clip,
            correction_high=2 + clip,
            kl_straight_through=self.extras and self.kl <= 3,
            kl_sequence=self.kl_sequence,
            entropy_coef=clip,
            log_ratio_limit=20 * clip,
            sequence_mean=self.mean,
        )


def policy_loss(case: Case, rows: int = 4, steps: int = 100, clip: float = 0.2) -> None:
    from warpo.kernels import _triton

    token = torch.empty(1, steps, dtype=case.dtype).expand(rows, steps)
    scalar, gradient = torch.empty(()), torch.empty(rows, steps)
    arguments = PolicyLossArguments(
        objective=case.objective(clip),
        kl_penalty=KlPenaltyArguments(
            kl=case.kl, kl_coef=clip / 2, adaptive_kl_coef=scalar if case.extras else None
        ),
        sequences=rows,
        steps=steps,
        cu_seqlens=torch.zeros(rows + 1, dtype=torch.int32) if case.packed else None,
        logprobs=token,
        old_logprobs=token,
        advantages=token,
        ref_logprobs=token if case.kl else None,
        sampler_logprobs=token if case.correction else None,
        entropy=token if case.extras else None,
        mask=flags(token, case.mean),
        denominator=DenominatorArguments(0.0, scalar),
        grad_logprobs=gradient,
        grad_entropy=gradient if case.extras else None,
        partials=torch.empty(max(rows, MIN_PARTIALS), len(METRICS)),
        loss=scalar,
        metrics=torch.empty(len(METRICS)),
    )
    _triton.policy_loss(arguments)


BF16 = Case(dtype=torch.bfloat16)
GEOMETRIC_ALL = Case(
    packed=True,
    mean=True,
    level=SEQUENCE,
    surrogate=GEOMETRIC,
    kl=3,
    correction=2,
    correction_sequence=True,
    extras=True,
)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    cases = {
        "token clip k3": replace(BF16, kl=3),
        "sequence geometric k3 sequence mask all": GEOMETRIC_ALL,
    }
    if all_of_them:
        in_sequence = Case(level=SEQUENCE)
        cases |= {
            "token dual clip k1 mean mask": Case(packed=True, mean=True, surrogate=DUAL_CLIP, kl=1),
            "token mask k2 truncate all": replace(
                BF16, mean=True, surrogate=MASK, kl=2, correction=1, extras=True
            ),
            "token clip mask nan": Case(correction=4),
            "token none packed": replace(BF16, packed=True, surrogate=NONE),
            "token reinforce": Case(surrogate=REINFORCE),
            "token soft gate sequence truncate": Case(
                mean=True, surrogate=SOFT_GATE, correction=1, correction_sequence=True
            ),
            "token divergence kl": replace(BF16, surrogate=DIVERGENCE_KL),
            "product gamma": Case(level=PRODUCT, surrogate=GAMMA),
            "sequence clip k2": replace(BF16, level=SEQUENCE, kl=2),
            "sequence dual clip mask all": replace(
                in_sequence, packed=True, surrogate=DUAL_CLIP, kl=3, correction=2, extras=True
            ),
            "product clip k3 of the sequence": replace(
                BF16, packed=True, mean=True, level=PRODUCT, kl=3, kl_sequence=True
            ),
            "token reverse k3": Case(kl=4),
            "token none k3 of the reference": Case(surrogate=NONE, kl=7, extras=True),
            "sequence stop gradient": replace(in_sequence, mean=True, surrogate=STOP_GRADIENT),
            "sequence soft gate k1": replace(
                BF16, packed=True, mean=True, level=SEQUENCE, surrogate=SOFT_GATE, kl=1
            ),
            "prefix stop gradient k3 truncate all": replace(
                BF16,
                packed=True,
                mean=True,
                level=PREFIX,
                surrogate=STOP_GRADIENT,
                kl=3,
                correction=1,
                extras=True,
            ),
        }
    for label, case in cases.items():
        yield label, partial(policy_loss, case)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 1), (2, 128), (16, 37), (600, 3000)):
        sizes = {"rows": rows, "steps": steps, "clip": 1 / (rows + 1)}
        for case in (
            replace(BF16, kl=3),
            Case(packed=True, mean=True, surrogate=DUAL_CLIP, kl=1),
            replace(BF16, level=SEQUENCE, kl=2),
        ):
            yield partial(policy_loss, case, **sizes)
