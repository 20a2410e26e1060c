"""Report of backends, of installed libraries, and of replaced functions with the calls they served.

warpo doctor trl                                             # in a process of its own
from warpo.kernels.integrations import doctor; print(doctor.report())        # in yours
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence

import torch

from warpo.kernels import _cuda_images, dispatch
from warpo.kernels.integrations.patching import Library

LIBRARIES = ("trl", "verl", "openrlhf", "torchrl", "stable_baselines3")


def report(libraries: Sequence[str] = LIBRARIES) -> str:
    """The findings as text. Imports those of the libraries that are installed.

    Raises:
        ValueError: no integration has such a name.
    """
    unknown = [name for name in libraries if name not in LIBRARIES]
    if unknown:
        raise ValueError(
            f"no integration {', '.join(map(repr, unknown))}; there are {', '.join(LIBRARIES)}"
        )
    lines = [_versions(), "", "backends"]
    lines += [f"  {name:6}  {state}" for name, state in backends()]
    lines += ["", "libraries"]
    for name in libraries:
        lines += functions(name)
    return "\n".join(lines)


def summary(name: str) -> tuple[str, str | None]:
    """A library in a line, and why it cannot be patched if so. Imports it where it is installed."""
    library = _library(name)
    if library is None:
        return _not_installed(name), None
    problem = library.problem()
    count = len(library.names())
    can = "cannot be patched" if problem else f"{name}.patch() replaces {count} functions"
    return f"{library.version()}, {can}", problem


def _versions() -> str:
    return (
        f"warpo {importlib.metadata.version('warpo')}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def backends() -> list[tuple[str, str]]:
    """Name and state of each backend: how it was built, for what, and whether it runs here."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "torch sees no GPU"
    built = {name: is_there(f"warpo.kernels._{name}") for name in ("cpu", "cuda")}
    cpu = "not built: pip install -e . with a C++ compiler"
    if built["cpu"]:
        cpu = f"built, {importlib.import_module('warpo.kernels._cpu').instruction_set()}"
    triton = "not installed: pip install triton"
    if is_there("triton"):
        triton = f"{importlib.metadata.version('triton')}, {gpu}"
    cuda = "not built: pip install -e . with nvcc on the PATH"
    if built["cuda"]:
        build = _cuda_images.Build(*importlib.import_module("warpo.kernels._cuda").build())
        cuda = f"built for {_cuda_images.built_for(build)}, {gpu}"
    problem = dispatch.cuda_problem(None)
    chosen = os.environ.get("WARPO_BACKEND")
    found = [("cpu", cpu), ("triton", triton), ("cuda", cuda)]
    if problem:
        found.append(("", f"not run here, triton takes its place: {problem}"))
    return found + ([("", f"WARPO_BACKEND={chosen} chooses for all tensors")] if chosen else [])


def functions(name: str) -> list[str]:
    """A library's functions, by whom each is done here, and by which operations and backends."""
    library = _library(name)
    if library is None:
        return [f"  {name}: {_not_installed(name)}"]
    version, tested = library.version(), f"tested with {', '.join(library.tested)}"
    problem = library.problem()
    if problem:
        return [f"  {name} {version}: cannot be patched", *_indented(problem)]
    patched = library.patched()
    how = f"from warpo.kernels.integrations import {name}; {name}.patch()"
    lines = [
        f"  {name} {version}: {tested}; {len(patched)} of {len(library.names())} functions "
        f"replaced here" + ("" if patched else f", all by: {how}")
    ]
    width = max(map(len, library.names()))
    for function, replacement in library.replacements.items():
        operations = ", ".join(f"ops.{operation}" for operation in replacement.operations)
        state = "replaced" if function in patched else "the library's"
        lines.append(f"    {function:{width}}  {state:13}  {operations}")
        if function in patched:
            lines.append(f"    {'':{width}}  {replacement.calls}")
    return [
        *lines,
        f"    Tensors on cpu go to the backend {_backend('cpu')}, on cuda to "
        f"{_backend('cuda')}; what these do not do stays with {name}.",
    ]


def _library(name: str) -> Library | None:
    """The integration of a library; None where that is not installed, nor what both need."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return importlib.import_module(f"warpo.kernels.integrations.{name}").library


def _not_installed(name: str) -> str:
    """With the version that is pinned in warpo's extra of that name."""
    extras = importlib.metadata.requires("warpo") or []
    pinned = (line.partition(";")[0] for line in extras if line.replace("-", "_").startswith(name))
    return f"not installed: pip install {next(pinned)}"


def _backend(device: str) -> str:
    return os.environ.get("WARPO_BACKEND") or dispatch.default(torch.device(device))


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]


def is_there(module: str) -> bool:
    """True if a module can be found."""
    return importlib.util.find_spec(module) is not None
