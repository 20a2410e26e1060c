"""Every operation with arguments for one small call, for the matrix of test_contract."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.kernels.backends import DEVICE
from warpo.kernels import ops


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A public function of `ops` and what the promises mean for it.

    Attributes:
        tensors: new arguments by name, float32 where they are numbers.
        floats: those that may also be bfloat16 or float16.
        differentiable: those that a gradient reaches.
        outputs: so many of the results, from the first on, have a gradient.
        masked: those that are not read where `mask` is 0.
        batched: those whose first dimension is that of sequences or tokens, each computed alone.
        vocabulary: the one whose last dimension is the vocabulary.
        wrong: an option and a value outside its set.
        not_promised: number of a promise -> why it has no meaning here.
        kernels: the file of its tests and launches.
        mutates: it writes to its arguments.
        lists: it takes a list of each of the tensors.
        twice: it has a second derivative.
        packed: the same arguments packed, with elements of no sequence at both ends.
        packed_options: options that differ then.
        offsets: which of those hold offsets, and of how many elements.
        same_bits: also with other strides; not where a dense tensor is reduced as one long row, nor
            where the BLAS of a GPU may choose another kernel for them.
    """

    name: str
    kernels: str
    tensors: Callable[[], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    floats: tuple[str, ...]
    differentiable: tuple[str, ...] = ()
    outputs: int | None = None
    masked: tuple[str, ...] = ()
    batched: tuple[str, ...] = ()
    vocabulary: str | None = None
    wrong: tuple[str, Any] = ("backend", "fastest")
    not_promised: dict[int, str] = field(default_factory=dict)
    mutates: bool = False
    lists: bool = False
    twice: bool = False
    same_bits: bool = True
    packed: Callable[[], dict[str, Tensor]] | None = None
    packed_options: dict[str, Any] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)

    def __call__(self, tensors: dict[str, Tensor], backend: str, **options: Any) -> list[Tensor]:
        """All results, in order; an optional one that was not asked for is left out."""
        if self.mutates:
            tensors = {n: x.clone() if x.numel() else x for n, x in tensors.items()}
        arguments = {**self.arguments(tensors), **self.options, "backend": backend, **options}
        results = getattr(ops, self.name)(**arguments)
        if isinstance(results, Tensor):
            return [results]
        return [x for x in results if x is not None]

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {name: [x] for name, x in tensors.items()} if self.lists else dict(tensors)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _numbers(*shape: int, scale: float = 1.0) -> Tensor:
    # of few bits, so that they are the same numbers in every dtype
    return (scale * torch.randn(shape, generator=_generator()) * 16).round().div(16).to(DEVICE)


def _mask(*shape: int) -> Tensor:
    mask = torch.rand(shape, generator=_generator()) < 0.7
    mask[..., 0] = True
    return mask.to(DEVICE)


def _targets(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_generator()).to(DEVICE)


B, T, V = 3, 9, 37
# elements of no sequence at each end of packed arguments
GAP = 2


def _pad(x: Tensor) -> Tensor:
    """With elements that nothing may read: NaN, or 1 where there is none."""
    padding = x.new_full((GAP, *x.shape[1:]), torch.nan if x.is_floating_point() else 1)
    return torch.cat([padding, x, padding])


def _starts(sequences: int, length: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return GAP + length * torch.arange(sequences + 1, dtype=dtype, device=DEVICE)


def _pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is (B, T, ...) in one row."""
    return {
        name: _pad(x.flatten(0, 1)) if x.shape[:2] == (B, T) else x for name, x in tensors.items()
    }


def _packed(tensors: Callable[[], dict[str, Tensor]], *names: str) -> dict[str, Any]:
    """Fields of an operation on (B, T) that also takes packed tokens."""
    names = names or ("cu_seqlens",)
    return {
        "packed": lambda: _pack(tensors()) | {name: _starts(B, T) for name in names},
        "offsets": dict.fromkeys(names, B * T + 2 * GAP),
    }


def _logits() -> dict[str, Tensor]:
    return {"logits": _numbers(B, T, V, scale=3), "targets": _targets(V, B, T), "mask": _mask(B, T)}


def _token_level() -> dict[str, Tensor]:
    return {"rewards": _numbers(B, T), "values": _numbers(B, T).flip(0), "mask": _mask(B, T)}


def _policy() -> dict[str, Tensor]:
    old = -_numbers(B, T).abs() - 0.5
    return {
        "logprobs": old + _numbers(B, T, scale=0.25).flip(1),
        "old_logprobs": old,
        "ref_logprobs": old.flip(0),
        "advantages": _numbers(B, T).flip(1),
        "mask": _mask(B, T),
    }


_LOGPROBS: dict[str, Any] = {
    "kernels": "logprobs",
    "tensors": _logits,
    "floats": ("logits",),
    "differentiable": ("logits",),
    "masked": ("logits",),
    "batched": ("logits", "targets", "mask"),
    "vocabulary": "logits",
    "twice": True,
}
_DENSE = "master and moments are dense; a strided gradient raises"
_NO_MASK = "it takes no mask"
_MASK_OF_MEMBERS = "the members that its mask leaves out are in its own tests"
_SCAN: dict[str, Any] = {
    "kernels": "gae",
    "tensors": _token_level,
    "options": {"gamma": 0.9, "gae_lambda": 0.8},
    "floats": ("rewards", "values"),
    "differentiable": ("rewards", "values"),
    "masked": ("rewards", "values"),
    "batched": ("rewards", "values", "mask"),
    "wrong": ("mask_mode", "skip"),
    **_packed(_token_level),
}
_POLICY_FLOATS = ("logprobs", "old_logprobs", "ref_logprobs", "advantages")
_GROUPS: dict[str, Any] = {"floats": ("rewards",), "wrong": ("std", "robust")}
_MATRIX_PRODUCT = "its result is that of a matrix product, which BLAS rounds by shape and layout"
_MATRIX_TIME = "its launches are matrix products"
_GRADIENT_SAVED = "what it saves is the gradient"
_LOSS_ONLY = "its result is a loss, not logprobs; its own tests have such logits"


def _returns_only() -> dict[str, Tensor]:
    return {name: x for name, x in _token_level().items() if name != "values"}


def _log_ratios() -> dict[str, Tensor]:
    policy = _policy()
    return _token_level() | {n: policy[n] for n in ("logprobs", "old_logprobs")}


def _off_policy() -> dict[str, Tensor]:
    return {name: x for name, x in _log_ratios().items() if name != "values"}


def _shaped() -> dict[str, Tensor]:
    policy = _policy()
    return _token_level() | {n: policy[n] for n in ("logprobs", "ref_logprobs")}


def _values() -> dict[str, Tensor]:
    values = _numbers(B, T)
    return {
        "values": values,
        "old_values": values.flip(0),
        "returns": values.flip(1),
        "mask": _mask(B, T),
    }


def _kl() -> dict[str, Tensor]:
    return {name: _policy()[name] for name in ("logprobs", "ref_logprobs", "mask")}


def _steps_of_completions() -> dict[str, Tensor]:
    """Four completions of two steps each, over T tokens."""
    return {
        "step_rewards": _numbers(8),
        "step_offsets": torch.arange(0, 9, 2, device=DEVICE),
        "step_ends": torch.tensor([2, 5] * 4, device=DEVICE),
    }


def _packed_steps_of_completions() -> dict[str, Tensor]:
    steps = _steps_of_completions()
    return {
        "step_rewards": _pad(steps["step_rewards"]),
        "step_offsets": _starts(4, 2, torch.int64),
        "step_ends": _pad(steps["step_ends"]),
        "cu_seqlens": _starts(4, T),
    }


def _linear() -> dict[str, Tensor]:
    return {
        "hidden": _numbers(B, T, 5),
        "weight": _numbers(V, 5),
        "targets": _targets(V, B, T),
        "mask": _mask(B, T),
    }


def _logits_of_policy() -> dict[str, Tensor]:
    return _logits() | {n: x for n, x in _policy().items() if n != "logprobs"}


def _head_of_policy() -> dict[str, Tensor]:
    return _linear() | {n: x for n, x in _policy().items() if n != "logprobs"}


def _kept() -> dict[str, Tensor]:
    ids = torch.arange(4 * V, device=DEVICE) % V
    return {
        "hidden": _numbers(4, 8),
        "weight": _numbers(V, 8),
        "targets": _targets(V, 4),
        "kept_ids": ids,
        "kept_offsets": torch.arange(0, 4 * V + 1, V, device=DEVICE),
    }


def _pairs() -> dict[str, Tensor]:
    chosen, mask = -_numbers(B, T).abs(), _mask(B, T)
    return {
        "chosen_logprobs": chosen,
        "rejected_logprobs": chosen.flip(0),
        "ref_chosen_logprobs": chosen.flip(1),
        "ref_rejected_logprobs": chosen.flip(0, 1),
        "chosen_mask": mask,
        "rejected_mask": mask.flip(0),
    }


def _rankings() -> dict[str, Tensor]:
    return {
        "scores": _numbers(12),
        "ranks": (torch.arange(12, device=DEVICE) * 5 % 4),
        "cu_groups": torch.arange(0, 13, 4, dtype=torch.int32, device=DEVICE),
        "mask": _mask(12),
    }


def _verdicts() -> dict[str, Tensor]:
    return {
        "logprobs": -_numbers(B, T).abs(),
        "ref_logprobs": -_numbers(B, T).abs().flip(0),
        "desirable": torch.arange(B, device=DEVICE) % 2 == 0,
        "kl": torch.full((), 0.25, device=DEVICE),
        "mask": _mask(B, T),
    }


def _masked_values() -> dict[str, Tensor]:
    return {"values": _numbers(B, T), "mask": _mask(B, T)}


def _lists_of_moments() -> dict[str, Tensor]:
    names = {"grad": "grads", "master": "masters", "exp_avg": "exp_avgs"}
    names["exp_avg_sq"] = "exp_avg_sqs"
    return {names.get(name, name): x for name, x in _moments().items()}


def _moments() -> dict[str, Tensor]:
    master = _numbers(64)
    return {
        "grad": master.flip(0),
        "master": master,
        "exp_avg": 0.1 * master,
        "exp_avg_sq": master.square(),
        "published": master.bfloat16(),
    }


def _squashed() -> dict[str, Tensor]:
    mean = _numbers(B, T)
    return {"mean": mean, "log_std": mean.flip(0), "noise": mean.flip(1)}


def _transitions() -> dict[str, Tensor]:
    values = _numbers(4, 12)
    names = ("next_q1", "next_q2", "next_logprobs")
    return {
        "rewards": values[0],
        "terminated": ~_mask(12),
        **dict(zip(names, values[1:], strict=True)),
    }


OPERATIONS = [
    Operation(name="logprobs", **_LOGPROBS),
    Operation(name="logprobs_and_entropy", **_LOGPROBS),
    Operation(
        name="linear_logprobs",
        kernels="linear_logprobs",
        tensors=_linear,
        floats=("hidden", "weight"),
        differentiable=("hidden", "weight"),
        masked=("hidden",),
        wrong=("logits_dtype", "float64"),
        not_promised={1: _MATRIX_PRODUCT, 3: "it composes logprobs", 12: _MATRIX_TIME},
        same_bits=DEVICE == "cpu",
    ),
    Operation(
        name="linear_logprobs_and_entropy",
        kernels="linear_logprobs",
        tensors=_linear,
        floats=("hidden", "weight"),
        differentiable=("hidden", "weight"),
        masked=("hidden",),
        wrong=("logits_dtype", "float64"),
        not_promised={1: _MATRIX_PRODUCT, 3: "it composes logprobs", 12: _MATRIX_TIME},
        same_bits=DEVICE == "cpu",
    ),
    Operation(
        name="kept_set_logprobs",
        kernels="kept_set_logprobs",
        tensors=_kept,
        floats=("hidden", "weight"),
        differentiable=("hidden", "weight"),
        not_promised={4: _NO_MASK},
        packed=lambda: (
            _kept()
            | {"kept_ids": _pad(_kept()["kept_ids"]), "kept_offsets": _starts(4, V, torch.int64)}
        ),
        offsets={"kept_offsets": 4 * V + 2 * GAP},
    ),
    Operation(
        name="policy_loss",
        kernels="policy_loss",
        tensors=_policy,
        options={"objective": "grpo", "denominator": 3.0},
        floats=_POLICY_FLOATS,
        differentiable=("logprobs",),
        masked=_POLICY_FLOATS,
        wrong=("objective", "grppo"),
        **_packed(_policy),
    ),
    Operation(
        name="policy_loss_from_logits",
        kernels="policy_loss_from_logits",
        tensors=_logits_of_policy,
        options={"objective": "grpo", "denominator": 3.0},
        floats=("logits", "old_logprobs", "ref_logprobs", "advantages"),
        differentiable=("logits",),
        masked=("logits", "old_logprobs", "ref_logprobs", "advantages"),
        vocabulary="logits",
        wrong=("objective", "grppo"),
        not_promised={7: _GRADIENT_SAVED, 8: _LOSS_ONLY, 12: "a call is three launches"},
        **_packed(_logits_of_policy),
    ),
    Operation(
        name="policy_loss_from_hidden",
        kernels="policy_loss_from_hidden",
        tensors=_head_of_policy,
        options={"objective": "grpo", "denominator": 3.0},
        floats=("hidden", "weight"),
        differentiable=("hidden", "weight"),
        masked=("hidden", "old_logprobs", "ref_logprobs", "advantages"),
        wrong=("objective", "grppo"),
        not_promised={
            1: _MATRIX_PRODUCT,
            3: "it composes policy_loss_from_logits",
            12: _MATRIX_TIME,
        },
        same_bits=DEVICE == "cpu",
        **_packed(_head_of_policy),
    ),
    Operation(name="gae", **_SCAN),
    Operation(name="lambda_returns", **_SCAN),
    Operation(
        name="discounted_returns",
        **_SCAN
        | {
            "tensors": _returns_only,
            "options": {"gamma": 0.9},
            "floats": ("rewards",),
            "differentiable": ("rewards",),
            "masked": ("rewards",),
            "batched": ("rewards", "mask"),
            **_packed(_returns_only),
        },
    ),
    Operation(
        name="shaped_gae",
        **_SCAN
        | {
            "kernels": "shaped_gae",
            "tensors": _shaped,
            "options": _SCAN["options"] | {"kl_coef": 0.1},
            "floats": ("rewards", "values", "logprobs", "ref_logprobs"),
            "differentiable": (),
            "masked": ("rewards", "values", "logprobs", "ref_logprobs"),
            "batched": ("rewards", "values", "logprobs", "ref_logprobs", "mask"),
            **_packed(_shaped),
        },
    ),
    Operation(
        name="vtrace",
        **_SCAN
        | {
            "kernels": "vtrace",
            "tensors": _log_ratios,
            "floats": ("rewards", "values", "logprobs", "old_logprobs"),
            "differentiable": (),
            "masked": ("rewards", "values", "logprobs", "old_logprobs"),
            "batched": ("rewards", "values", "logprobs", "old_logprobs", "mask"),
            **_packed(_log_ratios),
        },
    ),
    Operation(
        name="off_policy_returns",
        **_SCAN
        | {
            "kernels": "off_policy_returns",
            "tensors": _off_policy,
            "options": {"gamma": 0.9},
            "floats": ("rewards", "logprobs", "old_logprobs"),
            "differentiable": (),
            "masked": ("rewards", "logprobs", "old_logprobs"),
            "batched": ("rewards", "logprobs", "old_logprobs", "mask"),
            **_packed(_off_policy),
        },
    ),
    Operation(
        name="whiten",
        kernels="whiten",
        tensors=lambda: {"x": _numbers(B, T), "mask": _mask(B, T)},
        floats=("x",),
        differentiable=("x",),
        masked=("x",),
        same_bits=False,
    ),
    Operation(
        name="group_advantages",
        kernels="group_advantages",
        tensors=lambda: {"rewards": _numbers(12)},
        options={"group_size": 4},
        differentiable=("rewards",),
        outputs=1,
        not_promised={4: _MASK_OF_MEMBERS},
        **_GROUPS,
    ),
    Operation(
        name="process_advantages",
        kernels="process_advantages",
        tensors=_steps_of_completions,
        options={"num_tokens": T, "group_size": 2},
        floats=("step_rewards",),
        wrong=("std", "robust"),
        not_promised={4: _MASK_OF_MEMBERS},
        packed=_packed_steps_of_completions,
        packed_options={"num_tokens": 4 * T + 2 * GAP},
        offsets={"step_offsets": 8 + 2 * GAP, "cu_seqlens": 4 * T + 2 * GAP},
    ),
    Operation(
        name="value_loss",
        kernels="value_loss",
        tensors=_values,
        options={"denominator": 3.0},
        floats=("values", "old_values", "returns"),
        differentiable=("values",),
        outputs=1,
        masked=("values", "old_values", "returns"),
        wrong=("loss", "mae"),
        **_packed(_values),
    ),
    Operation(
        name="aggregate",
        kernels="aggregate",
        tensors=_masked_values,
        floats=("values",),
        differentiable=("values",),
        masked=("values",),
        wrong=("aggregation", "mean"),
        **_packed(_masked_values),
    ),
    Operation(
        name="approx_kl",
        kernels="approx_kl",
        tensors=_kl,
        floats=("logprobs", "ref_logprobs"),
        differentiable=("logprobs", "ref_logprobs"),
        masked=("logprobs", "ref_logprobs"),
        batched=("logprobs", "ref_logprobs", "mask"),
        wrong=("estimator", "k4"),
    ),
    Operation(
        name="preference_loss",
        kernels="preference_loss",
        tensors=_pairs,
        floats=tuple(name for name in _pairs() if name.endswith("logprobs")),
        differentiable=("chosen_logprobs", "rejected_logprobs"),
        outputs=1,
        wrong=("loss", "dpoo"),
        not_promised={4: "its two masks are in its own tests"},
        **_packed(_pairs, "chosen_cu_seqlens", "rejected_cu_seqlens"),
    ),
    Operation(
        name="reward_model_loss",
        kernels="reward_model_loss",
        tensors=lambda: {
            "chosen_scores": _numbers(12),
            "rejected_scores": _numbers(12).flip(0),
            "mask": _mask(12),
        },
        floats=("chosen_scores", "rejected_scores"),
        differentiable=("chosen_scores", "rejected_scores"),
        outputs=1,
        masked=("chosen_scores", "rejected_scores"),
    ),
    Operation(
        name="ranking_loss",
        kernels="reward_model_loss",
        tensors=_rankings,
        floats=("scores",),
        differentiable=("scores",),
        outputs=1,
        masked=("scores",),
        packed=lambda: (
            {n: _pad(x) for n, x in _rankings().items() if n != "cu_groups"}
            | {"cu_groups": _starts(3, 4)}
        ),
        offsets={"cu_groups": 12 + 2 * GAP},
    ),
    Operation(
        name="kto_loss",
        kernels="preference_loss",
        tensors=_verdicts,
        floats=("logprobs", "ref_logprobs"),
        differentiable=("logprobs",),
        outputs=1,
        masked=("logprobs", "ref_logprobs"),
        **_packed(_verdicts),
    ),
    Operation(
        name="squashed_gaussian",
        kernels="squashed_gaussian",
        tensors=_squashed,
        floats=("mean", "log_std", "noise"),
        differentiable=("mean", "log_std"),
        batched=("mean", "log_std", "noise"),
        not_promised={4: _NO_MASK},
    ),
    Operation(
        name="soft_q_targets",
        kernels="soft_q_targets",
        tensors=_transitions,
        options={"alpha": 0.2, "gamma": 0.9},
        floats=tuple(name for name in _transitions() if name != "terminated"),
        batched=tuple(_transitions()),
        not_promised={4: "where an episode ends is in its own tests"},
    ),
    Operation(
        name="fingerprint",
        kernels="fingerprint",
        tensors=lambda: {"tensor": _numbers(B, T)},
        floats=("tensor",),
        not_promised={1: "the bits of another dtype are other bits", 4: _NO_MASK},
    ),
    Operation(
        name="fingerprint_foreach",
        kernels="fingerprint",
        tensors=lambda: {"tensors": _numbers(B, T)},
        floats=("tensors",),
        lists=True,
        not_promised={1: "the bits of another dtype are other bits", 4: _NO_MASK},
    ),
    Operation(
        name="adamw_publish",
        kernels="adamw_publish",
        tensors=_moments,
        options={
            "lr": 1e-3,
            "beta1": 0.9,
            "beta2": 0.99,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "step": 3,
        },
        floats=("grad",),
        mutates=True,
        not_promised={2: _DENSE, 4: _NO_MASK},
    ),
    Operation(
        name="adamw_publish_foreach",
        kernels="adamw_publish",
        tensors=_lists_of_moments,
        options={
            "lr": 1e-3,
            "beta1": 0.9,
            "beta2": 0.99,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "steps": [3],
        },
        floats=("grads",),
        mutates=True,
        lists=True,
        not_promised={2: _DENSE, 4: _NO_MASK},
    ),
]

# public functions that only look something up, or read a result
HELPERS = (
    "get_objective",
    "get_preference",
    "kto_metrics",
    "kto_reference_point",
    "merge_reward_model_metrics",
    "merge_value_metrics",
    "policy_metrics",
    "preference_metrics",
    "reward_model_metrics",
    "sum_metrics",
    "value_metrics",
)
