"""Functions of other libraries, for timing beside ours. `make peers` installs those libraries into
.peers, out of the way of the environment.
"""

import functools
import importlib
import importlib.metadata
import os
import sys
import types
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warpo.bench.operation import Missing

PEERS = (
    "trl", "verl", "openrlhf", "torchrl", "liger-kernel", "flash-attn", "quack-kernels",
    "pufferlib", "numba",
)  # fmt: skip


def use(folder: Path) -> None:
    """Lets libraries be imported that `make peers` has put there, after those of the environment,
    whose versions of what both have are taken.
    """
    overlays = sorted(path.parent for path in folder.glob("*/built"))
    sys.path.extend(str(path.absolute()) for path in overlays if str(path) not in sys.path)


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load(module: str, name: str) -> Any:
    """An attribute of a module of a peer.

    Raises:
        Missing: the peer, or a package that it needs, is not installed.
    """
    # ray, which verl imports, would warn about the accelerators of this machine at every start
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError) as error:
        raise Missing(f"{module}: {error}; install it by `make peers`".replace("\n", " ")) from None


def trl_grpo_loss(beta: float) -> Callable[..., Tensor]:
    """`GRPOTrainer._compute_loss` on given logprobs: its trainer without model, data and ranks."""
    trainer = load("trl", "GRPOTrainer")

    class Alone:
        num_processes, sync_gradients = 1, True

        def gather(self, x: Tensor) -> Tensor:
            return x

        def reduce(self, x: Tensor, reduction: str = "sum") -> Tensor:
            return x

        gather_for_metrics = gather

    state: Any = types.SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=beta, loss_type="grpo",
        epsilon_low=0.2, epsilon_high=0.2, use_vllm=False, current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, accelerator=Alone(),
        model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    compute = functools.partial(trainer._compute_loss, state, None)

    def loss(
        logprobs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        state._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, old, None)
        state._metrics["train"].clear()
        empty = torch.zeros(len(logprobs), 0, dtype=torch.int64)
        ids = torch.zeros(logprobs.shape, dtype=torch.int64)
        return compute({
            "prompt_ids": empty, "prompt_mask": empty, "completion_ids": ids,
            "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        })  # fmt: skip

    return loss
