"""An operation as a `torch.library` operator, and the short way to it in eager mode."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from warpo.kernels import _symbolic
from warpo.kernels._checks import as_plain
from warpo.kernels._flattening import Fields


def check_transforms(name: str, arguments: Sequence[Any]) -> None:
    """Refuse the derivatives that `torch.autograd.Function` does not compute: forward mode, and the
    transforms of torch.func.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name} is not computed within the transforms of torch.func (grad, jvp, vmap, ...): "
            "use torch.autograd, or backend='reference', which is plain PyTorch"
        )
    if forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None
        for x in _tensors_in(arguments)
    ):
        raise RuntimeError(
            f"{name} has no forward-mode derivative: use reverse mode, or backend='reference', "
            "which is plain PyTorch"
        )


def _tensors_in(arguments: Sequence[Any]) -> Iterator[Any]:
    """The arguments, those of a list one by one."""
    for x in arguments:
        if isinstance(x, list):
            yield from x
        else:
            yield x


def keeps_graph() -> bool:
    """Whether the backward pass that runs leaves its graph, and what it has saved, for another."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def check_first_order(name: str) -> None:
    """Refuse, within a backward pass, to have that pass recorded for a second derivative."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative, which create_graph=True asks for: leave it False, "
            "or pass backend='reference', which is plain PyTorch"
        )


class Operator:
    """A function that returns new tensors and may change given ones, registered as warpo::<name>.

    It takes one named tuple; what `torch.library` sees is flat, see `flattening`. torch.compile,
    export and fake tensors go through `torch.library`, with fake kernel and autograd. Plain tensors
    in eager mode take `torch.autograd.Function`, or the function itself where no gradient is
    recorded: through the library a call takes 10 to 55 us longer (EPYC, torch 2.13), which is more
    than most of these operations.

    Args:
        body: computes the results; the annotations of its named tuple are the schema.
        fake: the same tuple -> empty results of the right shape, dtype and strides.
        save: as `setup_context` of `torch.autograd.Function`, with the tuple as inputs.
        differentiate: as its `backward`; returns the gradients of the differentiable fields.
        differentiable: gradients flow to the first N fields at most. In eager mode the tuple
            travels beside them as one: `torch.autograd.Function` takes 0.2 us for each argument.
        differentiate_eager: instead of `differentiate` in eager mode, where nothing else holds what
            `save` saved, so that it may overwrite it.
        differentiate_again: instead of it where the backward pass is recorded (create_graph=True):
            in differentiable operations of torch. Without it there is no second derivative.
        mutates: names of the tensors, or lists of them, that `body` changes, each of them optional;
            not the first one.
        returned: a call returns the first N of the results, one of them not as a tuple; the others
            are for `save`, which takes 2 us less in eager mode than to return them. All if not
            given.
    """

    def __init__(
        self,
        name: str,
        body: Callable[[Any], Any],
        fake: Callable[[Any], Any],
        save: Callable[[Any, Any, Any], None] | None = None,
        differentiate: Callable[..., tuple[Tensor | None, ...]] | None = None,
        *,
        differentiable: int = 0,
        differentiate_eager: Callable[..., tuple[Tensor | None, ...]] | None = None,
        differentiate_again: Callable[..., tuple[Tensor | None, ...]] | None = None,
        mutates: Sequence[str] = (),
        returned: int | None = None,
    ) -> None:
        self._name = name
        self._body = body
        self._returned = returned
        self._differentiable = differentiable
        self._fields = Fields(body)
        self._mutated = [self._fields.tuple_class._fields.index(name) for name in mutates]
        flat_body, flat_fake = self._fields.flat(body), self._fields.flat(fake)
        self.registered = torch.library.custom_op(f"warpo::{name}", flat_body, mutates_args=mutates)
        self.registered.register_fake(flat_fake)
        self._register_numbers(flat_body, flat_fake, mutates)
        if save is None or differentiate is None:
            return

        def backward_by(first_order: Callable[..., Any]) -> Callable[..., Any]:
            def backward(ctx: Any, *gradients: Any) -> Any:
                if torch.is_grad_enabled():
                    if differentiate_again is not None:
                        return differentiate_again(ctx, *gradients)
                    check_first_order(name)
                return first_order(ctx, *[x if x is None else as_plain(x) for x in gradients])

            return backward

        self._register_autograd(save, backward_by(differentiate))
        self._apply = self._make_function(save, backward_by(differentiate_eager or differentiate))

    def flatten(self, inputs: NamedTuple) -> tuple[Any, ...]:
        """The arguments of `registered`."""
        return self._fields.flatten(inputs)

    def __call__(self, inputs: Any) -> Any:
        first, count = inputs[0], self._differentiable
        if type(first) is list:
            first = first[0]
        if is_dynamo_compiling() or torch.compiler._is_compiling_flag:
            return self._public(self._through_library(inputs))
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            check_transforms(self._name, self.flatten(inputs))
        if type(first) not in (Tensor, nn.Parameter):
            return self._public(self._through_library(inputs))
        if (
            count
            and torch.is_grad_enabled()
            and (
                first.requires_grad
                or count > 1
                and any(isinstance(x, Tensor) and x.requires_grad for x in inputs[1:count])
            )
        ):
            return self._apply(*inputs[:count], inputs)
        results = self._body(inputs)
        if self._mutated:
            # so that a graph that has saved one of them refuses its backward
            changed = list(_tensors_in([inputs[i] for i in self._mutated if inputs[i] is not None]))
            torch.autograd.graph.increment_version(changed)
        return self._public(results)

    def _make_function(
        self, save: Callable[[Any, Any, Any], None], differentiate: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The `apply` of a `torch.autograd.Function` of the differentiable fields and the tuple."""

        def forward(ctx: Any, *arguments: Any) -> Any:
            inputs = arguments[-1]
            results = self._body(inputs)
            save(ctx, inputs, results)
            return self._public(results)

        def backward(ctx: Any, *gradients: Any) -> Any:
            return (*differentiate(ctx, *gradients), None)

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function: Any = type(self._name, (torch.autograd.Function,), members)
        # without what `Function.apply` does for torch.func, 1.5 us; see __call__
        base: Any = super(torch.autograd.Function, function)  # type: ignore[misc]
        return base.apply

    def _register_autograd(
        self, save: Callable[[Any, Any, Any], None], differentiate: Callable[..., Any]
    ) -> None:
        others = (None,) * (len(self._fields.parameters) - self._differentiable)

        def save_flat(ctx: Any, inputs: Any, output: Any) -> None:
            save(ctx, self._fields.build(inputs), output)

        def save_numbers(ctx: Any, inputs: Any, output: Any) -> None:
            numbers = inputs[-1].unbind()
            save_flat(ctx, _symbolic.put(inputs[:-1], self._places, numbers), output)

        def backward(ctx: Any, *gradients: Any) -> Any:
            return (*differentiate(ctx, *gradients), *others)

        def backward_numbers(ctx: Any, *gradients: Any) -> Any:
            return (*backward(ctx, *gradients), None)

        self.registered.register_autograd(backward, setup_context=save_flat)
        self._of_numbers.register_autograd(backward_numbers, setup_context=save_numbers)

    def _register_numbers(
        self, body: Callable[..., Any], fake: Callable[..., Any], mutates: Sequence[str]
    ) -> None:
        """The same operator where a number is not a constant of the graph."""
        self._places = _symbolic.float_places(body)
        self._of_numbers = torch.library.custom_op(
            f"warpo::{self._name}_of_numbers",
            _symbolic.of_numbers(body),
            mutates_args=mutates,
            # the launch reads them on the CPU, which a replay would not do again
            tags=(torch.Tag.cudagraph_unsafe,),
        )
        self._of_numbers.register_fake(lambda *arguments: fake(*arguments[:-1]))

    def _through_library(self, inputs: Any) -> Any:
        arguments = self._fields.flatten(inputs)
        numbers = [arguments[i] for i in self._places]
        if all(_symbolic.is_constant(x) for x in numbers):
            return self.registered(*arguments)
        placeholders = _symbolic.put(arguments, self._places, [0.0] * len(numbers))
        return self._of_numbers(*placeholders, _symbolic.as_numbers(numbers))

    def _public(self, results: Any) -> Any:
        if self._returned is None:
            return results
        return results[0] if self._returned == 1 else results[: self._returned]
