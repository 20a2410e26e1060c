"""A named tuple as the flat arguments that `torch.library` takes, and back."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

TUPLE_CLASSES: list[Any] = []
"""Of every operator; a compiled backend makes their calls cheap."""


class Fields:
    """The fields of the named tuple that a function takes; those of tuples within it in place.

    Args:
        function: of one parameter, annotated with the class of the tuple.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        signature = inspect.signature(function)
        (parameter,) = signature.parameters.values()
        self.tuple_class: Any = parameter.annotation
        TUPLE_CLASSES.append(self.tuple_class)
        self._returns = signature.return_annotation
        self._blocks: list[tuple[int, Any]] = []
        self.parameters: list[inspect.Parameter] = []
        for name, annotation in inspect.get_annotations(self.tuple_class).items():
            if hasattr(annotation, "_fields"):
                self._blocks.append((len(self.parameters), annotation))
                TUPLE_CLASSES.append(annotation)
                inner = inspect.get_annotations(annotation)
                fields = [(f"{name}_{own}", kind) for own, kind in inner.items()]
            else:
                fields = [(name, annotation)]
            self.parameters += [
                inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
                for name, kind in fields
            ]

    def flatten(self, inputs: Any) -> tuple[Any, ...]:
        flat = tuple(inputs)
        for place, _ in self._blocks:
            flat = (*flat[:place], *flat[place], *flat[place + 1 :])
        return flat

    def build(self, flat: Sequence[Any]) -> Any:
        fields = list(flat)
        for place, block in reversed(self._blocks):
            end = place + len(block._fields)
            fields[place:end] = [block(*fields[place:end])]
        return self.tuple_class(*fields)

    def flat(self, function: Callable[[Any], Any]) -> Callable[..., Any]:
        """The function of the flat arguments, with their signature."""

        def call(*arguments: Any) -> Any:
            return function(self.build(arguments))

        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            self.parameters, return_annotation=self._returns
        )
        return call
