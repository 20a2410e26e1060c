"""Statistics of groups of rewards."""

import torch

from warpo.bench import peers
from warpo.bench.case import Call, Case, each_backend, relative_error
from warpo.kernels import ops, reference


def group_advantages_case(device: str, groups: int, group_size: int) -> Case:
    rewards = torch.randn(groups * group_size, device=device)

    def eager() -> object:
        table = rewards.view(groups, group_size)
        return (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-6)

    def verl(name: str) -> Call:
        function = peers.load("verl.trainer.ppo.core_algos", name)
        # it takes token-level rewards, here of one token, and the prompts' names
        index = torch.arange(groups).repeat_interleave(group_size).numpy()
        token_rewards, mask = rewards[:, None], torch.ones(len(rewards), 1, device=device)
        return lambda: function(token_rewards, mask, index)

    def error(backend: str) -> float:
        count = 4 * group_size
        ids = torch.arange(count, device=device) // group_size
        wanted = reference.group_advantages(rewards[:count].double(), ids, 4)[0]
        actual = ops.group_advantages(rewards, group_size, backend=backend)
        return relative_error(actual.advantages[:count], wanted)

    def ours(backend: str) -> Call:
        return lambda: ops.group_advantages(rewards, group_size, backend=backend)

    return Case(
        name="group_advantages",
        size=f"{groups} x {group_size} float32",
        providers=each_backend(device, ours)
        | {
            "eager": lambda: eager,
            "verl": lambda: verl("compute_grpo_outcome_advantage"),
            "verl vectorised": lambda: verl("compute_grpo_vectorized_outcome_advantage"),
        },
        error=error,
        traffic=rewards.numel() * 8,  # read the rewards, write the advantages
        goals={"verl": 100, "verl vectorised": 5} if device == "cpu" else {},
    )
