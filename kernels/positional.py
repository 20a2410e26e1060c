"""Operators of flat functions, until each has a named tuple."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from warpo.kernels import symbolic
from warpo.kernels.checks import as_plain
from warpo.kernels.registration import check_first_order, check_transforms


class PositionalOperator:
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
        differentiate_again: in its place where the backward pass is recorded (create_graph=True):
            in differentiable operations of torch. Without it there is no second derivative.
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
        differentiate_again: Callable[..., Any] | None = None,
        mutates: Sequence[str] = (),
        returned: int | None = None,
    ) -> None:
        self._name = name
        self._body = body
        self._returned = returned
        self._differentiable = differentiable
        self._registered = torch.library.custom_op(f"warpo::{name}", body, mutates_args=mutates)
        self._registered.register_fake(fake)
        self._register_numbers(name, body, fake, mutates)
        self._apply = body
        parameters = list(inspect.signature(body).parameters)
        self._mutated = [parameters.index(name) - 1 for name in mutates]
        if save is not None and differentiate is not None:

            def backward_by(first_order: Callable[..., Any]) -> Callable[..., Any]:
                def backward(ctx: Any, *gradients: Any) -> Any:
                    if torch.is_grad_enabled():
                        if differentiate_again is not None:
                            return differentiate_again(ctx, *gradients)
                        check_first_order(name)
                    return first_order(ctx, *[x if x is None else as_plain(x) for x in gradients])

                return backward

            registered = backward_by(differentiate)
            self._registered.register_autograd(registered, setup_context=save)
            self._register_numbers_autograd(save, registered)
            eager = backward_by(differentiate_eager or differentiate)

            def forward(ctx: Any, *arguments: Any) -> Any:
                if differentiable is not None:
                    arguments = (*arguments[:-1], *arguments[-1])
                results = body(*arguments)
                save(ctx, arguments, results)
                return self._public(results)

            def backward(ctx: Any, *gradients: Any) -> Any:
                return (*eager(ctx, *gradients)[:differentiable], None)

            members = {
                "forward": staticmethod(forward),
                "backward": staticmethod(eager if differentiable is None else backward),
            }
            function: Any = type(name, (torch.autograd.Function,), members)
            # without what `Function.apply` does for torch.func, 1.5 us; see __call__
            base: Any = super(torch.autograd.Function, function)  # type: ignore[misc]
            self._apply = base.apply

    def __call__(self, first: Tensor, *arguments: Any) -> Any:
        if is_dynamo_compiling() or torch.compiler._is_compiling_flag:
            return self._public(self._through_library(first, *arguments))
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            check_transforms(self._name, (first, *arguments))
        if type(first) not in (Tensor, nn.Parameter):
            return self._public(self._through_library(first, *arguments))
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

    def _register_numbers(
        self, name: str, body: Callable[..., Any], fake: Callable[..., Any], mutates: Sequence[str]
    ) -> None:
        """The same operator where a number is not a constant of the graph."""
        self._places = symbolic.float_places(body)
        self._of_numbers = torch.library.custom_op(
            f"warpo::{name}_of_numbers",
            symbolic.of_numbers(body),
            mutates_args=mutates,
            # the launch reads them on the CPU, which a replay would not do again
            tags=(torch.Tag.cudagraph_unsafe,),
        )
        self._of_numbers.register_fake(lambda *arguments: fake(*arguments[:-1]))

    def _register_numbers_autograd(
        self, save: Callable[..., None], backward: Callable[..., Any]
    ) -> None:
        def save_numbers(ctx: Any, inputs: Any, output: Any) -> None:
            numbers = inputs[-1].unbind()
            save(ctx, tuple(symbolic.put(inputs[:-1], self._places, numbers)), output)

        self._of_numbers.register_autograd(
            lambda ctx, *gradients: (*backward(ctx, *gradients), None), setup_context=save_numbers
        )

    def _through_library(self, *arguments: Any) -> Any:
        numbers = [arguments[i] for i in self._places]
        if all(symbolic.is_constant(x) for x in numbers):
            return self._registered(*arguments)
        placeholders = symbolic.put(arguments, self._places, [0.0] * len(numbers))
        return self._of_numbers(*placeholders, symbolic.as_numbers(numbers))

    def _public(self, results: Any) -> Any:
        if self._returned is None:
            return results
        return results[0] if self._returned == 1 else results[: self._returned]
