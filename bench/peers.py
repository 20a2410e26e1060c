"""Functions of other libraries, for timing beside ours. `make peers` installs those libraries into
.peers, out of the way of the environment.
"""

import importlib
import importlib.metadata
import logging
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
    "triton",
    "trl",
    "verl",
    "openrlhf",
    "torchrl",
    "liger-kernel",
    "flash-attn",
    "quack-kernels",
    "pufferlib",
    "numba",
)

# Of packages that other libraries import and that install on a CUDA machine alone.
STAND_INS = Path(__file__).parent / "stand_ins"


def use(folder: Path) -> None:
    """Lets libraries be imported that `make peers` has put there, after those of the environment,
    whose versions of what both have are taken.
    """
    overlays = [*sorted(folder.glob("*/site-packages")), STAND_INS]
    sys.path.extend(str(path.absolute()) for path in overlays if str(path) not in sys.path)


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
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
    logging.disable(logging.WARNING)  # of accelerators and packages that it would rather have
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError) as error:
        raise Missing(f"{module}: {error}; install it by `make peers`".replace("\n", " ")) from None
    finally:
        logging.disable(logging.NOTSET)


_TRL_ARGS: dict[str, Any] = dict(
    use_bias_correction_kl=False,
    delta=None,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
    steps_per_generation=1,
    entropy_target=0.2,
    entropy_coef_delta=0.01,
    entropy_coef_max=1.0,
    entropy_coef_min=0.0,
)
_TRL_STATE: dict[str, Any] = dict(
    loss_type="grpo",
    importance_sampling_level="token",
    beta=0.0,
    epsilon_low=0.2,
    epsilon_high=0.2,
    use_vllm=False,
    vllm_importance_sampling_correction=True,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    max_completion_length=256,
    current_gradient_accumulation_steps=1,
    aux_loss_enabled=False,
    router_aux_loss_coef=0.001,
    _entropy_bonus_enabled=False,
    use_adaptive_entropy=False,
    entropy_coef=0.0,
    _last_world_entropy=float("inf"),
    _entropy_window_stats=None,
    training=True,
)


def trl_trainer(name: str, **settings: Any) -> Any:
    """A trainer of TRL with what its `_compute_loss` reads: no model, data or other processes.

    Args:
        name: "GRPOTrainer" or "RLOOTrainer".
        settings: attributes, and those of its `args`, in place of the defaults here. `forward` is
            what its forward pass returns: logprobs, entropy and the loss of a router.
    """
    trainer_class = load("trl", name)
    trainer = trainer_class.__new__(trainer_class)
    args = {name: settings.pop(name, value) for name, value in _TRL_ARGS.items()}
    attributes = _TRL_STATE | settings
    vars(trainer).update(attributes)
    trainer.args = types.SimpleNamespace(**args)
    trainer.model = types.SimpleNamespace(training=attributes.pop("training"))
    trainer.accelerator = _OneProcess()
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: trainer.forward
    return trainer


class _OneProcess:
    """accelerate's `Accelerator`, of one process."""

    num_processes, sync_gradients = 1, True

    def gather(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, x: Tensor, reduction: str = "sum") -> Tensor:
        return x

    def pad_across_processes(self, x: Tensor, dim: int, pad_index: float) -> Tensor:
        return x

    gather_for_metrics = gather


def trl_inputs(advantages: Tensor, mask: Tensor, **others: Any) -> dict[str, Any]:
    """Inputs of TRL's `_compute_loss` next to the model: completions without prompts."""
    ids = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    return {
        "prompt_ids": ids[:, :0],
        "prompt_mask": mask[:, :0],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        **others,
    }


def trl_grpo_loss(beta: float) -> Callable[..., Tensor]:
    """`GRPOTrainer._compute_loss` on given logprobs: its trainer without model, data and ranks."""
    trainer = trl_trainer("GRPOTrainer", beta=beta)

    def loss(
        logprobs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        trainer.forward = logprobs, old, None
        trainer._metrics["train"].clear()
        inputs = trl_inputs(advantages, mask, old_per_token_logps=old, ref_per_token_logps=ref)
        return trainer._compute_loss(None, inputs)

    return loss
