"""Which backend runs on which GPU; no test here needs one."""

import importlib
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from warpo.kernels import dispatch
from warpo.kernels._cuda_images import Build, built_for, problem

BUILT = (80, 90, 100)


@pytest.mark.parametrize(
    "capabilities, runtime, driver, capability, says",
    [
        # machine code of the same major version, no newer than the GPU
        (BUILT, 13000, 13000, 80, None),
        (BUILT, 13000, 13000, 89, None),
        (BUILT, 13000, 13000, 90, None),
        (BUILT, 13000, 13000, 103, None),
        # a driver of the same major version is enough for it, an older one is not
        (BUILT, 13010, 13000, 90, None),
        (BUILT, 12080, 13000, 90, None),
        (BUILT, 12080, 12000, 90, None),
        (BUILT, 13000, 12080, 90, "CUDA 13.0, and the driver of GPU is for CUDA 12.8: install one"),
        (BUILT, 13000, 0, 90, "see no NVIDIA driver: install one"),
        # PTX: of the newest alone, for newer GPUs, by a driver no older than the compiler
        (BUILT, 13000, 13000, 120, None),
        (BUILT, 13010, 13020, 120, None),
        (
            BUILT,
            13010,
            13000,
            120,
            "has 12.0 and a driver for CUDA 13.0, which is older than their",
        ),
        (BUILT, 13000, 13000, 75, "8.0, 9.0, 10.0 with CUDA 13.0, and GPU has 7.5: rebuild them"),
        ((89, 100), 13000, 13000, 86, "WARPO_CUDA_ARCHS=86 pip install -e ."),
        ((90,), 13000, 13000, 100, None),
        (
            (90,),
            13000,
            13000,
            80,
            "built for compute capability 9.0 with CUDA 13.0, and GPU has 8.0",
        ),
        ((103,), 13000, 13000, 100, "and GPU has 10.0: rebuild"),
    ],
)
def test_a_gpu_runs_the_kernels_or_the_reason_says_why(
    capabilities, runtime, driver, capability, says
):
    found = problem(Build(capabilities, runtime, driver), capability, "GPU")
    assert found is None if says is None else says in found and "\n" not in found


@pytest.fixture
def gpus(monkeypatch):
    """Makes GPUs of these capabilities visible to the decision, and kernels built for BUILT."""

    def show(*capabilities: int, driver: int = 13000, module: object = None) -> None:
        module = module or SimpleNamespace(build=lambda: (BUILT, 13000, driver))
        monkeypatch.setitem(sys.modules, "warpo.kernels._cuda", module)
        monkeypatch.setattr(dispatch, "_CUDA_IS_BUILT", True)
        monkeypatch.setattr(dispatch, "_REQUESTED", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda index: divmod(capabilities[index or 0], 10)
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"chip {index}")
        forget()

    yield show
    forget()


def forget() -> None:
    dispatch._find_cuda_problem.cache_clear()
    dispatch._decide_on_cuda.cache_clear()


def on_gpu(index: int) -> SimpleNamespace:
    return SimpleNamespace(is_cpu=False, device=torch.device("cuda", index))


def test_each_device_is_decided_once_and_warned_of_once(gpus):
    gpus(90, 75)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        names = [dispatch.choose(on_gpu(index), None) for index in (0, 1, 1, 0, 1)]
    assert names == ["cuda", "triton", "triton", "cuda", "triton"]
    (warning,) = said
    assert str(warning.message) == (
        "backend 'triton' instead of 'cuda': the CUDA kernels are built for compute capability "
        "8.0, 9.0, 10.0 with CUDA 13.0, and chip 1 has 7.5: rebuild them for it: "
        "WARPO_CUDA_ARCHS=75 pip install -e ."
    )


@pytest.mark.parametrize("requested", ["argument", "variable"])
def test_cuda_by_name_is_never_replaced(gpus, monkeypatch, requested):
    gpus(90, 75)
    backend = "cuda" if requested == "argument" else None
    if requested == "variable":
        monkeypatch.setattr(dispatch, "_REQUESTED", "cuda")
    assert dispatch.choose(on_gpu(0), backend) == "cuda"
    with pytest.raises(
        RuntimeError, match="backend 'cuda': .* chip 1 has 7.5: rebuild them for it"
    ):
        dispatch.choose(on_gpu(1), backend)
    assert dispatch.choose(on_gpu(1), "triton") == "triton"


def test_an_old_driver_makes_it_triton(gpus):
    gpus(90, driver=12080)
    with pytest.warns(UserWarning, match=r"chip 0 is for CUDA 12.8: install one for CUDA 13, or"):
        assert dispatch.choose(on_gpu(0), None) == "triton"


def test_a_graph_takes_the_decision_as_a_constant(monkeypatch):
    monkeypatch.setattr(dispatch, "_CUDA_IS_BUILT", True)
    monkeypatch.setattr(dispatch, "_find_cuda_problem", lambda index: f"cuda:{index} has 7.5")
    dispatch._decide_on_cuda.cache_clear()
    device = torch.device("cuda", 1)

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x):
        return x + (1 if dispatch.default(device) == "triton" else 2)

    with pytest.warns(UserWarning, match="cuda:1 has 7.5"):
        assert traced(torch.zeros(1)).item() == 1
    dispatch._decide_on_cuda.cache_clear()


def test_without_a_gpu_the_build_alone_decides():
    code = (
        "import torch\n"
        "from warpo.kernels import dispatch, ops\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(dispatch._CUDA_IS_BUILT, dispatch.default(torch.device('cuda')))"
    )
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() in (["True", "cuda"], ["False", "triton"])


@pytest.mark.skipif(
    not dispatch._CUDA_IS_BUILT,
    reason="warpo.kernels._cuda is not built: pip install -e . with nvcc on the PATH",
)
def test_the_module_says_what_it_was_built_for(gpus):
    module = importlib.import_module("warpo.kernels._cuda")
    build = Build(*module.build())
    assert build.capabilities == tuple(sorted(build.capabilities)) and build.runtime >= 12000
    assert built_for(build).startswith("compute capability ")
    newest = build.capabilities[-1]
    assert problem(build._replace(driver=build.runtime), newest, "GPU") is None
    if not torch.cuda.is_available():
        assert build.driver == 0
        gpus(newest, module=module)
        with pytest.warns(UserWarning, match="see no NVIDIA driver: install one"):
            assert dispatch.choose(on_gpu(0), None) == "triton"
