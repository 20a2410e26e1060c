"""Builds the extension modules and maps the folders into the namespace `warpo`.

warpo.kernels._cpu   always: each file of csrc/cpu once for each instruction set, chosen at import
warpo.kernels._cuda  where nvcc is found, on the PATH or under CUDA_HOME; needs no GPU or driver

WARPO_CUDA=0       leaves _cuda out
WARPO_CUDA_ARCHS   compute capabilities for _cuda, such as "90" or "80,90", in place of those of
                   80, 90 and 100 that nvcc knows; the newest also as PTX
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

ROOT = Path(__file__).parent
# the biggest job takes 0.25 GiB
JOBS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CUDA_ARCHS = (80, 90, 100)

CXX = os.environ.get("CXX", "g++").split()
# no-trapping-math: without it conditionals on floats do not vectorise. NaN and inf stay.
CXX_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=fast",
    "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas", "-Icsrc",
]  # fmt: skip
BINDING_FLAGS = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
ISA_FLAGS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
    ]  # fmt: skip


def find_nvcc() -> Path | None:
    if os.environ.get("WARPO_CUDA") == "0" or not any(ROOT.glob("csrc/cuda/*.cu")):
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    return Path(found) if found else None


def known_archs(nvcc: Path) -> list[int]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return sorted({int(arch) for arch in re.findall(r"\bcompute_(\d+)\b", listed.stdout)})


def cuda_archs(known: list[int]) -> list[int]:
    """What to compile for, ascending: WARPO_CUDA_ARCHS, else the defaults that nvcc knows."""
    given = os.environ.get("WARPO_CUDA_ARCHS")
    knows = f"nvcc knows {', '.join(map(str, known))}"
    if given:
        wanted = [arch.strip() for arch in given.split(",")]
        wrong = [arch for arch in wanted if arch not in map(str, known)]
        if wrong:
            raise PlatformError(
                f"WARPO_CUDA_ARCHS={given}: {knows} and not {', '.join(wrong)}: "
                "choose of these, or another nvcc by CUDA_HOME"
            )
        return sorted(map(int, set(wanted)))
    archs = [arch for arch in CUDA_ARCHS if arch in known]
    if not archs:
        raise PlatformError(
            f"{knows} and none of {', '.join(map(str, CUDA_ARCHS))}: choose another nvcc by "
            "CUDA_HOME, one of these by WARPO_CUDA_ARCHS, or set WARPO_CUDA=0"
        )
    return archs


def nvcc_flags(archs: list[int]) -> list[str]:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    # ncu shows the source by -lineinfo, which leaves the machine code as it is but takes
    # space, hence the compression
    return [
        "-O3", "-std=c++17", "-lineinfo", "-Xfatbin=-compress-all",
        "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc", *codes,
    ]  # fmt: skip


def cuda_library_folder(nvcc: Path) -> Path:
    """Folder of libcudart_static.a, asked of nvcc: the nvcc on the PATH may be a wrapper."""
    plan = subprocess.run(
        [nvcc, "--dryrun", "-cudart=static", "x.o"], capture_output=True, text=True, check=True
    ).stderr
    for line in plan.splitlines():
        if line.startswith("#$ LIBRARIES="):
            for option in line.partition("=")[2].split():
                folder = Path(option.strip('"').removeprefix("-L").strip('"'))
                if (folder / "libcudart_static.a").exists():
                    return folder
    raise PlatformError(
        f"{nvcc} names no folder with libcudart_static.a: "
        "install the CUDA runtime, or set WARPO_CUDA=0"
    )


class Build(build_ext):
    """Compiles what changed, a file on each core, and links each module from its objects."""

    def build_extension(self, extension: Extension) -> None:
        self.objects = Path(self.build_temp) / "objects"
        self.objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if extension.name.endswith("_cuda"):
            jobs, link = self.cuda_jobs()
        else:
            jobs, link = self.cpu_jobs(), []
        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(self.compile, jobs))
        command = [*CXX, "-shared", "-fopenmp", "-fvisibility=hidden", *map(str, objects), *link]
        newest = max(path.stat().st_mtime for path in objects)
        if self.force or not target.exists() or target.stat().st_mtime < newest:
            self.spawn([*command, "-o", str(target)])

    def cpu_jobs(self) -> list[tuple[str, list[str]]]:
        kernels = sorted(ROOT.glob("csrc/cpu/*.cpp"))
        jobs = [("csrc/bindings.cpp", [*CXX, *CXX_FLAGS, *BINDING_FLAGS])]
        for path in kernels:
            source = str(path.relative_to(ROOT))
            if path.name.endswith("_product.cpp") or path.name == "dispatch.cpp":
                jobs.append((source, [*CXX, *CXX_FLAGS]))
                continue
            for isa, flags in ISA_FLAGS.items():
                jobs.append((source, [*CXX, *CXX_FLAGS, *flags, f"-DWARPO_ISA={isa}"]))
        return jobs

    def cuda_jobs(self) -> tuple[list[tuple[str, list[str]]], list[str]]:
        nvcc = find_nvcc()
        archs = cuda_archs(known_archs(nvcc))
        if not os.environ.get("WARPO_CUDA_ARCHS") and len(archs) < len(CUDA_ARCHS):
            left_out = [str(arch) for arch in CUDA_ARCHS if arch not in archs]
            self.warn(f"{nvcc} does not know {', '.join(left_out)}: _cuda is built without")
        sources = sorted(ROOT.glob("csrc/cuda/*.c*"))
        jobs = [(str(path.relative_to(ROOT)), [str(nvcc), *nvcc_flags(archs)]) for path in sources]
        jobs.append(("csrc/bindings.cpp", [*CXX, *CXX_FLAGS, *BINDING_FLAGS, "-DWARPO_CUDA"]))
        folder = cuda_library_folder(nvcc)
        return jobs, [f"-L{folder}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]

    def compile(self, job: tuple[str, list[str]]) -> Path:
        source, command = job
        key = hashlib.sha256(" ".join(command).encode()).hexdigest()[:8]
        target = self.objects / f"{Path(source).stem}-{key}.o"
        depends = target.with_suffix(".d")
        if self.force or not is_current(target, depends):
            self.spawn([*command, "-MMD", "-MF", str(depends), "-c", source, "-o", str(target)])
        return target

    def get_source_files(self) -> list[str]:
        """For the source distribution: everything under csrc."""
        return [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*")) if p.is_file()]


def is_current(target: Path, depends: Path) -> bool:
    """Whether the object is newer than every file that its compiler read."""
    if not (target.exists() and depends.exists()):
        return False
    names = depends.read_text().replace("\\\n", " ").partition(":")[2].split()
    built = target.stat().st_mtime
    return all(os.path.exists(name) and os.path.getmtime(name) <= built for name in names)


def packages() -> dict[str, str]:
    """Name and folder of every package: kernels, engine, bench and what holds Python below."""
    found = {}
    for top in ("kernels", "engine", "bench"):
        for folder in sorted({path.parent for path in ROOT.glob(f"{top}/**/*.py")} | {ROOT / top}):
            if folder.is_dir():
                relative = folder.relative_to(ROOT)
                found[".".join(("warpo", *relative.parts))] = str(relative)
    return found


os.chdir(ROOT)  # paths are relative, so that compilers' messages and dependency files are too
extensions = [Extension("warpo.kernels._cpu", sources=[])]
if find_nvcc():
    extensions.append(Extension("warpo.kernels._cuda", sources=[]))

setup(
    packages=list(packages()),
    package_dir=packages(),
    package_data={
        "warpo.bench": ["py.typed"],
        "warpo.bench.report": ["page.html"],
        "warpo.engine": ["py.typed"],
        "warpo.kernels": ["py.typed", "*.pyi"],
    },
    include_package_data=False,  # requirements are for the source tree
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    zip_safe=False,
)
