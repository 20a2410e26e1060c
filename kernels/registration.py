"""An operation as a `torch.library` operator, and the short way to it in eager mode."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Operator:
    """A function that returns new tensors and may change given ones, registered as warpo::<name>.

    torch.compile, export and fake tensors go through `torch.library`, with fake kernel and
    autograd. Plain tensors in eager mode take `torch.autograd.Function`, or the function itself
    where no gradient is recorded: through the library a call takes 10 to 55 us longer (EPYC, torch
    2.13), which is more than most of these operations.

    Args:
        body: computes the results; its annotations are the schema.
        fake: the same arguments -> empty results of the right shape, dtype and strides.
        save: as `setup_context` of `torch.autograd.Function`.
        differentiate: as its `backward`.
        differentiate_eager: in its place in eager mode, where nothing else holds what `save` saved,
            so that it may overwrite it.
        differentiable: gradients flow to the first so many arguments at most. In eager mode the
            others then travel as one: `torch.autograd.Function` takes 0.2 us for each argument.
        mutates: names of the tensors that `body` changes, each of them optional; not the first one.
        returned: a call returns so many of the results, one of them not as a tuple; the others are
            for `save`, which takes 2 us less in eager mode than to return them. All if not given.
    """

    def __init__(
        self,
        name: str,
        body: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None] | None = None,
        differentiate: Callable[..., Any] | None = None,
        differentiable: int | None = None,
        differentiate_eager: Callable[..., Any] | None = None,
        mutates: Sequence[str] = (),
        returned: int | None = None,
    ) -> None:
        self._body = body
        self._returned = returned
        self._differentiable = differentiable
        self._registered = torch.library.custom_op(f"warpo::{name}", body, mutates_args=mutates)
        self._registered.register_fake(fake)
        self._apply = body
        parameters = list(inspect.signature(body).parameters)
        self._mutated = [parameters.index(name) - 1 for name in mutates]
        if save is not None and differentiate is not None:
            self._registered.register_autograd(differentiate, setup_context=save)
            differentiate = differentiate_eager or differentiate

            def forward(ctx: Any, *arguments: Any) -> Any:
                if differentiable is not None:
                    arguments = (*arguments[:-1], *arguments[-1])
                results = body(*arguments)
                save(ctx, arguments, results)
                return self._public(results)

            def backward(ctx: Any, *gradients: Any) -> Any:
                return (*differentiate(ctx, *gradients)[:differentiable], None)

            members = {
                "forward": staticmethod(forward),
                "backward": staticmethod(differentiate if differentiable is None else backward),
            }
            function: Any = type(name, (torch.autograd.Function,), members)
            # without what `Function.apply` does for torch.func, 1.5 us; see __call__
            base: Any = super(torch.autograd.Function, function)  # type: ignore[misc]
            self._apply = base.apply

    def __call__(self, first: Tensor, *arguments: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or type(first) not in (Tensor, nn.Parameter)
            or torch._C._are_functorch_transforms_active()
        ):
            return self._public(self._registered(first, *arguments))
        rest = None if self._differentiable is None else self._differentiable - 1
        if torch.is_grad_enabled() and (
            first.requires_grad
            or rest != 0
            and any(isinstance(x, Tensor) and x.requires_grad for x in arguments[:rest])
        ):
            if rest is None:
                return self._apply(first, *arguments)
            return self._apply(first, *arguments[:rest], arguments[rest:])
        results = self._body(first, *arguments)
        if self._mutated:
            # so that a graph that has saved one of them refuses its backward
            changed = [arguments[i] for i in self._mutated if arguments[i] is not None]
            torch.autograd.graph.increment_version(changed)
        return self._public(results)

    def _public(self, results: Any) -> Any:
        if self._returned is None:
            return results
        return results[0] if self._returned == 1 else results[: self._returned]
