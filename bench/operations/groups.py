"""Statistics of groups and of batches."""

from collections.abc import Callable

import torch
from torch import Tensor

from warpo.bench import peers
from warpo.bench.operation import Inputs, Operation, Provider, Sizes, Work, first_rows
from warpo.bench.operations.scans import tokens
from warpo.kernels import ops, reference

STEPS = 4  # of a completion, whose rewards are normalised together


def _make(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    return {"rewards": torch.randn(sizes["prompts"], sizes["group"], device=device)}


def _eager(inputs: Inputs) -> Tensor:
    rewards = inputs["rewards"]
    spread = rewards.std(1, keepdim=True) + 1e-6
    return ((rewards - rewards.mean(1, keepdim=True)) / spread).view(-1)


def _ids(rewards: Tensor) -> Tensor:
    return torch.arange(rewards.numel(), device=rewards.device) // rewards.shape[1]


def _verl(name: str) -> Provider:
    def load() -> Callable:
        function = peers.load("verl.trainer.ppo.core_algos", name)

        def call(inputs: Inputs) -> Tensor:
            # it takes token-level rewards, here of one token, and the prompts' names
            rewards = inputs["rewards"].view(-1, 1)
            names = _ids(inputs["rewards"]).numpy()
            return function(rewards, torch.ones_like(rewards), names)[0].view(-1)

        return call

    return Provider(load=load)


def _process(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    """Completions of 256 tokens with rewards at the ends of four steps."""
    completions = sizes["prompts"] * sizes["group"]
    ends = torch.arange(1, STEPS + 1, dtype=torch.int32, device=device) * 64 - 1
    return {
        "step_rewards": torch.randn(completions * STEPS, device=device),
        "step_offsets": torch.arange(completions + 1, dtype=torch.int32, device=device) * STEPS,
        "step_ends": ends.repeat(completions),
        "group": sizes["group"],
        "prompts": sizes["prompts"],
    }


def _exact_process(inputs: Inputs) -> Tensor:
    completions = inputs["prompts"] * inputs["group"]
    ids = torch.arange(completions, device=inputs["step_rewards"].device) // inputs["group"]
    return reference.process_advantages(
        inputs["step_rewards"],
        inputs["step_offsets"],
        inputs["step_ends"],
        64 * STEPS,
        ids,
        inputs["prompts"],
    )[0]


def _exact_whiten(inputs: Inputs) -> Tensor:
    return reference.whiten(inputs["values"], inputs["mask"])


def _eager_whiten(inputs: Inputs) -> Tensor:
    x, mask = inputs["values"], inputs["mask"]
    count = mask.sum()
    mean = torch.where(mask, x, 0.0).sum() / count
    variance = torch.where(mask, (x - mean) ** 2, 0.0).sum() / (count - 1)
    return torch.where(mask, (x - mean) * (variance + 1e-8).rsqrt(), 0.0)


def _verl_whiten() -> Callable:
    function = peers.load("verl.utils.torch_functional", "masked_whiten")
    return lambda inputs: function(inputs["values"], inputs["mask"])


OPERATIONS = (
    Operation(
        name="group_advantages",
        sizes=("prompts", "group"),
        tiny={"prompts": 2, "group": 2},
        part=first_rows(4),
        make=_make,
        ours=lambda inputs, backend: (
            ops.group_advantages(
                inputs["rewards"].view(-1), inputs["rewards"].shape[1], backend=backend
            ).advantages
        ),
        eager=_eager,
        exact=lambda inputs: reference.group_advantages(
            inputs["rewards"].view(-1), _ids(inputs["rewards"]), len(inputs["rewards"])
        )[0],
        others={
            "verl": _verl("compute_grpo_outcome_advantage"),
            "verl, vectorised": _verl("compute_grpo_vectorized_outcome_advantage"),
        },
        # read the rewards, write the advantages (4 bytes each)
        work=lambda sizes, itemsize, mode: Work(
            read=4 * sizes["prompts"] * sizes["group"],
            written=4 * sizes["prompts"] * sizes["group"],
        ),
    ),
    Operation(
        name="process_advantages",
        sizes=("prompts", "group"),
        tiny={"prompts": 2, "group": 2},
        part=lambda inputs: inputs,
        make=_process,
        ours=lambda inputs, backend: (
            ops.process_advantages(
                inputs["step_rewards"],
                inputs["step_offsets"],
                inputs["step_ends"],
                64 * STEPS,
                inputs["group"],
                backend=backend,
            ).advantages
        ),
        eager=None,
        exact=_exact_process,
        # of a completion read four rewards and ends (4 bytes each), write 256 advantages (4)
        work=lambda sizes, itemsize, mode: Work(
            read=32 * sizes["prompts"] * sizes["group"],
            written=1024 * sizes["prompts"] * sizes["group"],
        ),
    ),
    Operation(
        name="whiten",
        sizes=("sequences", "steps"),
        tiny={"sequences": 2, "steps": 4},
        part=first_rows(4),
        mask="mask",
        make=tokens,
        ours=lambda inputs, backend: ops.whiten(inputs["values"], inputs["mask"], backend=backend),
        eager=_eager_whiten,
        exact=_exact_whiten,
        others={"verl": Provider(load=_verl_whiten)},
        # read twice, for the statistics and for the result (4 bytes and mask 1), write once (4)
        work=lambda sizes, itemsize, mode: Work(
            read=10 * sizes["sequences"] * sizes["steps"],
            written=4 * sizes["sequences"] * sizes["steps"],
        ),
    ),
)
