"""Replacement of another library's functions by ones that run on our kernels, and its undoing.

A replacement takes the arguments of the function that it replaces, with that function before them.
Where the kernels do not do what is asked for it raises `PassOn`, and the library's function is
called with the same arguments. It is installed wherever the original is held, as in modules that
imported it by name.
"""

import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from warpo.kernels.integrations.serving import Calls, PassOn, named

ROUNDED = (torch.bfloat16, torch.float16)


class IntegrationError(RuntimeError):
    """A library that cannot be patched: not installed, not a tested version, or not the tested
    functions. The message says how to cure it.
    """


@dataclass(frozen=True)
class Replacement:
    """One function of a library and what takes its place.

    Attributes:
        module: where the library defines it.
        name: "function" or "Class.method".
        operations: of `warpo.kernels.ops`, that it runs on.
        function: called with the original, then with the arguments of the call.
        rounds: results of bfloat16 and float16 are rounded once, from float32, where the library
            rounds at each of its steps.
        calls: counts since `patch` or `Calls.clear`.
    """

    module: str
    name: str
    operations: tuple[str, ...]
    function: Callable[..., Any]
    rounds: bool = False
    calls: Calls = field(default_factory=Calls, compare=False)

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> Any:
        """The module or class that holds it."""
        *classes, _ = self.name.split(".")
        return functools.reduce(getattr, classes, importlib.import_module(self.module))

    def current(self) -> Any:
        """The function that the library holds: its own, or ours."""
        return vars(self.owner())[self.name.rpartition(".")[2]]


@dataclass(frozen=True)
class Registry:
    """A dictionary in which a library looks functions up by name.

    Attributes:
        module, name: where it is.
        register: name in the module of the library's own hook: register(key)(function) puts a
            function in. None where the library has none that replaces.
    """

    module: str
    name: str
    register: str | None = None

    def put(self, key: Any, function: Callable) -> None:
        module = importlib.import_module(self.module)
        if self.register is None:
            getattr(module, self.name)[key] = function
        else:
            getattr(module, self.register)(key)(function)


class Library:
    """The functions of one library that have replacements.

    Args:
        name: of the package, which is also its name on PyPI and our optional extra.
        tested: versions on which tests/integrations passed.
        registries: of the library, searched like modules.
    """

    def __init__(
        self, name: str, tested: Sequence[str], registries: Sequence[Registry] = ()
    ) -> None:
        self.name = name
        self.tested = tuple(tested)
        self.registries = tuple(registries)
        self.replacements: dict[str, Replacement] = {}

    def replaces(
        self, module: str, name: str, *operations: str, rounds: bool = False
    ) -> Callable[[Callable], Callable]:
        """Decorator of a replacement of `module.name` that runs on these operations."""

        def register(function: Callable) -> Callable:
            if name in self.replacements:
                raise ValueError(f"{self.name}: two replacements of {name}")
            self.replacements[name] = Replacement(module, name, operations, function, rounds)
            return function

        return register

    def version(self) -> str | None:
        """The installed version."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def requirement(self) -> str:
        """Requirement to give to pip."""
        return f"{self.name}=={self.tested[-1]}"

    def patch(
        self, only: Sequence[str] | None = None, *, library_rounding: bool = False
    ) -> "Patch":
        """Replace the library's functions by ours, in every module that holds them. Functions that
        are replaced already stay so.

        Args:
            only: names of functions as in `names()`; all if not given.
            library_rounding: log-probabilities and entropies of bfloat16 and float16 logits are
                the library's to the bit: such calls are passed on. Ours are computed in float32
                and rounded once, which is closer to the exact value.

        Returns:
            A handle: `unpatch()` takes back what this call replaced; as a context manager it does
            so at the end.

        Raises:
            ValueError: `only` holds a name that has no replacement.
            IntegrationError: the library is not installed or cannot be imported, its version is not
                among `tested`, or a function has another signature. Nothing is patched then.
        """
        chosen = self._choose(only)
        self._check_version()
        found = self._current(chosen)
        fresh = [(r, original) for r, original in found if not is_ours(original)]
        self._check_signatures(fresh)
        patch = Patch(self, [(f, wrap(r, f, library_rounding)) for r, f in fresh])
        for replacement, _ in fresh:
            replacement.calls.clear()
        patch.apply()
        return patch

    def unpatch(self) -> None:
        """Puts all functions of the library back."""
        ours = [r.current() for r in self.replacements.values() if self._imported(r)]
        self.swap([(f, original_of(f)) for f in ours if is_ours(f)])

    def names(self) -> tuple[str, ...]:
        """Functions that have replacements."""
        return tuple(self.replacements)

    def patched(self) -> tuple[str, ...]:
        """Functions that are replaced in this process."""
        return tuple(
            name
            for name, r in self.replacements.items()
            if self._imported(r) and is_ours(r.current())
        )

    def report(self) -> str:
        """Count the calls that each replaced function has served in this process and has passed
        on to the library, and why.
        """
        lines = [f"{self.name} {self.version()}: {len(self.patched())} functions replaced"]
        width = max(map(len, self.replacements))
        for name, replacement in self.replacements.items():
            if name in self.patched():
                lines.append(f"  {name:{width}}  {replacement.calls}")
        return "\n".join(lines)

    def problem(self) -> str | None:
        """Why `patch()` would be refused; None if it would not. Imports the library."""
        try:
            self._check_version()
            self._check_signatures(self._current(self.replacements.values()))
        except IntegrationError as error:
            return str(error)
        return None

    def swap(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Old functions become new ones wherever they are held."""
        new = {id(old): new for old, new in pairs}
        for holder, name, old in [held for held in self._held() if id(held[2]) in new]:
            if isinstance(holder, Registry):
                holder.put(name, new[id(old)])
            else:
                setattr(holder, name, new[id(old)])

    def _held(self) -> Iterator[tuple[Any, Any, Any]]:
        """Everything that modules, registries and the classes of replacements hold: holder, name,
        value.
        """
        for replacement in self.replacements.values():
            if self._imported(replacement):
                name = replacement.name.rpartition(".")[2]
                yield replacement.owner(), name, replacement.current()
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                yield module, name, value
        for registry in self.registries:
            if registry.module in sys.modules:
                found: MutableMapping = getattr(sys.modules[registry.module], registry.name)
                for key, value in list(found.items()):
                    yield registry, key, value

    @staticmethod
    def _imported(replacement: Replacement) -> bool:
        return replacement.module in sys.modules

    def _choose(self, only: Sequence[str] | None) -> list[Replacement]:
        if only is None:
            return list(self.replacements.values())
        if isinstance(only, str):
            raise ValueError(f"only must be a list of names, got the string {only!r}: [{only!r}]")
        unknown = [name for name in only if name not in self.replacements]
        if unknown:
            raise ValueError(
                f"{self.name}: no replacement for {', '.join(map(repr, unknown))}; "
                f"there are {', '.join(self.replacements)}"
            )
        return [self.replacements[name] for name in only]

    def _check_version(self) -> None:
        version = self.version()
        if version is None:
            raise IntegrationError(
                f"{self.name} is not installed in {sys.executable}: "
                f"pip install {self.requirement()}"
            )
        if version not in self.tested:
            raise IntegrationError(
                f"{self.name} {version} is installed, and the replacements were tested with "
                f"{', '.join(self.tested)}: pip install {self.requirement()}"
            )

    def _current(self, replacements: Iterable[Replacement]) -> list[tuple[Replacement, Any]]:
        """Each with what the library holds now. Imports the library."""
        try:
            return [(r, r.current()) for r in replacements]
        except ImportError as error:
            raise IntegrationError(
                f"{self.name} {self.version()} is installed but cannot be imported in "
                f"{sys.executable}: {error}; install what it lacks, or name the functions that you "
                "want: patch(only=[...])"
            ) from error

    def _check_signatures(self, found: Sequence[tuple[Replacement, Any]]) -> None:
        wrong = []
        for replacement, original in found:
            wanted = _parameters(replacement.function)[1:]
            if not is_ours(original) and _parameters(original) != wanted:
                wrong.append(
                    f"{replacement.path}{inspect.signature(original)}, "
                    f"tested with ({', '.join(map(_show, wanted))})"
                )
        if wrong:
            raise IntegrationError(
                f"{self.name} {self.version()}: functions have other signatures than the tested "
                "ones:\n  " + "\n  ".join(wrong) + "\nreinstall it by pip install "
                f"--force-reinstall {self.name}=={self.version()}, or name the functions that you "
                "want: patch(only=[...])"
            )


class Patch:
    """Functions that one call of `patch` replaced, as pairs of original and ours."""

    def __init__(self, library: Library, pairs: Sequence[tuple[Any, Any]]) -> None:
        self.library = library
        self.pairs = pairs

    def apply(self) -> None:
        try:
            self.library.swap(self.pairs)
        except BaseException:
            self.unpatch()
            raise

    def unpatch(self) -> None:
        self.library.swap([(ours, original) for original, ours in self.pairs])

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.unpatch()


def wrap(replacement: Replacement, original: Any, library_rounding: bool = False) -> Any:
    """The replacement with the name, signature and docstring of the original."""
    function = original.__func__ if isinstance(original, staticmethod) else original
    rounds = library_rounding and replacement.rounds

    @functools.wraps(function)
    def ours(*args: Any, **kwargs: Any) -> Any:
        counts = not torch.compiler.is_compiling()
        try:
            if rounds:
                _refuse_rounding(*args, *kwargs.values())
            result = replacement.function(function, *args, **kwargs)
        except PassOn as refusal:
            # outside of this block, so that an error of the library has no context of ours
            reason, instead = refusal.reason, refusal.arguments
        else:
            if counts:
                replacement.calls.served += 1
            return result
        if counts:
            replacement.calls.passed_on[reason] += 1
        return function(*args, **kwargs) if instead is None else function(*instead)

    held = ours if function is original else staticmethod(ours)
    held.__dict__["__warpo__"] = original
    return held


def _refuse_rounding(*arguments: Any) -> None:
    for x in arguments:
        if isinstance(x, Tensor) and x.dtype in ROUNDED:
            raise PassOn(f"{named(x.dtype)}, with library_rounding")


def is_ours(function: Any) -> bool:
    return "__warpo__" in getattr(function, "__dict__", {})


def original_of(function: Any) -> Any:
    """The function that one of ours replaced."""
    return function.__dict__["__warpo__"]


def _parameters(function: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(function, staticmethod):
        function = function.__func__
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


def _show(parameter: tuple[str, Any, Any]) -> str:
    name, kind, default = parameter
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    value = "" if default is inspect.Parameter.empty else f"={default!r}"
    return f"{stars.get(kind, '')}{name}{value}"
