"""Comparison of a replacement with the library's own function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.tolerance import DROP_IN_ULPS, ROUNDING


def compare(
    original: Callable,
    ours: Callable,
    *arguments: Any,
    differentiable: Sequence[int | str] = (),
    valid: Tensor | None = None,
    scale: float = 1.0,
    gradient_scale: float = 0.0,
    exact_original: Callable | None = None,
    **keywords: Any,
) -> None:
    """Results of `ours` have the dtypes and shapes of those of `original`, and are as near to those
    of `original` in float64 as its own, up to a few roundings. So are the gradients.

    Args:
        differentiable: positions and names of the arguments whose gradients are compared, for one
            random gradient of each differentiable result.
        valid: results and gradients of its shape are compared where it is true alone.
        scale: of the terms whose sum or difference the results are, where it may be larger.
        gradient_scale: likewise of the terms of the gradients.
        exact_original: in place of the original in float64, where that casts to float32 itself.
    """
    exact = _run(exact_original or original, arguments, keywords, differentiable, torch.float64)
    theirs = _run(original, arguments, keywords, differentiable, None)
    found = _run(ours, arguments, keywords, differentiable, None)
    assert found.keys() == theirs.keys()
    for name, wanted in theirs.items():
        actual = found[name]
        if not isinstance(wanted, Tensor):
            wanted, actual = torch.tensor(wanted), torch.tensor(actual)
        wanted, actual = wanted.detach(), actual.detach()
        assert actual.shape == wanted.shape, f"{name}: {actual.shape} for {wanted.shape}"
        assert actual.dtype == wanted.dtype, f"{name}: {actual.dtype} for {wanted.dtype}"
        _assert_as_near(
            name,
            actual,
            wanted,
            torch.as_tensor(exact[name]).detach(),
            valid,
            scale if name.startswith("result") else gradient_scale,
        )


def _run(
    function: Callable,
    arguments: Sequence[Any],
    keywords: dict[str, Any],
    differentiable: Sequence[int | str],
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Results by position, and gradients by argument."""
    leaves: dict[int | str, Tensor] = {}

    def fresh(key: int | str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        leaf = value.detach().to(dtype or value.dtype)
        if key in differentiable:
            leaves[key] = leaf = leaf.clone().requires_grad_()
        # the strides of the argument, which clone() keeps of dense tensors alone; no leaf, as a
        # function may write to it, as to the logits of a model
        return torch.empty_strided(value.shape, value.stride(), dtype=leaf.dtype).copy_(leaf)

    args = [fresh(i, value) for i, value in enumerate(arguments)]
    kwargs = {name: fresh(name, value) for name, value in keywords.items()}
    results = pytree.tree_leaves(function(*args, **kwargs))
    generator = torch.Generator().manual_seed(0)
    total: Any = 0.0
    for result in results:
        if isinstance(result, Tensor) and result.requires_grad:
            gradient = torch.randn(result.shape, generator=generator, dtype=torch.float64)
            total = total + (result * gradient.to(result.dtype)).sum(dtype=result.dtype)
    if isinstance(total, Tensor):
        total.backward()
    found = {f"result {i}": result for i, result in enumerate(results)}
    return found | {f"gradient of {key}": leaf.grad for key, leaf in leaves.items()}


def _assert_as_near(
    name: str,
    actual: Tensor,
    theirs: Tensor,
    exact: Tensor,
    valid: Tensor | None,
    scale: float,
) -> None:
    if valid is not None and valid.shape == actual.shape:
        actual, theirs, exact = actual[valid], theirs[valid], exact[valid]
    if not actual.is_floating_point():
        assert torch.equal(actual, theirs), f"{name}: {actual} for {theirs}"
        return
    finite = exact.isfinite()
    torch.testing.assert_close(
        actual[~finite].double(), exact[~finite].double(), equal_nan=True, msg=lambda m: name + m
    )
    if not finite.any():
        return
    exact = exact[finite].double()
    error, allowed = (
        (actual[finite].double() - exact).abs(),
        (theirs[finite].double() - exact).abs(),
    )
    rounding = DROP_IN_ULPS * ROUNDING[actual.dtype] * max(float(exact.abs().max()), scale, 1e-30)
    worst = int((error - allowed.max()).argmax())
    assert bool((error <= allowed.max() + rounding).all()), (
        f"{name}: {actual[finite].flatten()[worst]} where float64 has {exact.flatten()[worst]}; "
        f"error {error.max():.2e}, the library's {allowed.max():.2e}, rounding {rounding:.2e}"
    )
