"""Whether the CUDA kernels run on a GPU.

The driver must know the CUDA that they are built with: one of the same major version does. Of what
they are compiled to, machine code for capability x.y runs on x.z where z >= y, and PTX for x.y,
which the driver compiles, on any from x.y on, if the driver is no older than the PTX.

Source: https://docs.nvidia.com/deploy/cuda-compatibility (minor version compatibility) and
https://docs.nvidia.com/cuda/cuda-c-programming-guide (binary and PTX compatibility).
"""

from typing import NamedTuple


class Build(NamedTuple):
    """What `warpo.kernels._cuda` says of itself."""

    capabilities: tuple[int, ...]
    """10 major + minor, ascending, of its machine code; the last is there as PTX too."""
    runtime: int
    """CUDA that it is built with: 1000 major + 10 minor."""
    driver: int
    """The newest CUDA that the driver of this machine knows; 0 without a driver."""


def built_for(build: Build) -> str:
    """`compute capability 8.0, 9.0 with CUDA 13.0`"""
    capabilities = ", ".join(map(_capability, build.capabilities))
    return f"compute capability {capabilities} with CUDA {_version(build.runtime)}"


def problem(build: Build, capability: int, gpu: str) -> str | None:
    """Why the kernels do not run on a GPU of this capability and name, with the cure; else None."""
    kernels, runtime = "the CUDA kernels are built", _version(build.runtime)
    if build.driver == 0:
        return f"{kernels} with CUDA {runtime} and see no NVIDIA driver: install one"
    if build.driver // 1000 < build.runtime // 1000:
        return (
            f"{kernels} with CUDA {runtime}, and the driver of {gpu} is for CUDA "
            f"{_version(build.driver)}: install one for CUDA {build.runtime // 1000}, or rebuild "
            f"them with nvcc of CUDA {build.driver // 1000}: pip install -e ."
        )
    if any(x // 10 == capability // 10 and x <= capability for x in build.capabilities):
        return None
    missing = f"{kernels} for {built_for(build)}, and {gpu} has {_capability(capability)}"
    cure = f"rebuild them for it: WARPO_CUDA_ARCHS={capability} pip install -e ."
    if capability < build.capabilities[-1]:
        return f"{missing}: {cure}"
    if build.driver < build.runtime:
        driver = f"a driver for CUDA {_version(build.driver)}, which is older than their PTX"
        return f"{missing} and {driver}: {cure}"
    return None


def _capability(number: int) -> str:
    return f"{number // 10}.{number % 10}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
