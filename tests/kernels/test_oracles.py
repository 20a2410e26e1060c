"""The references of logprobs and group_advantages against NumPy. Those of the other operations are
in the file of each.
"""

import numpy as np
import pytest
import torch

from tests.oracles import group_advantages as groups_oracle
from tests.oracles import logprobs as logprobs_oracle
from warpo.kernels import reference


@pytest.mark.parametrize("temperature", [1.0, 0.3, "per token"])
def test_logprobs_entropy_and_gradients(temperature):
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(9, 23, generator=generator, dtype=torch.float64)
    logits[2, 5:9] = -torch.inf
    targets = torch.randint(0, 23, (9,), generator=generator)
    targets[2] = 0
    if temperature == "per token":
        temperature = torch.rand(9, generator=generator, dtype=torch.float64) + 0.5
    logits.requires_grad_()
    found = reference.logprobs(logits, targets, temperature)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in found]
    wanted = logprobs_oracle.logprobs(
        logits.detach().numpy(), targets.numpy(), np.asarray(temperature)
    )
    for a, b in zip([*found, *gradients], wanted, strict=True):
        torch.testing.assert_close(a.detach(), torch.from_numpy(b), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("std", ["sample", "population", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "length_weighted"])
def test_group_advantages(std, baseline):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 6, (40,), generator=generator)
    ids[ids == 4] = 3  # a group without members
    rewards = torch.randn(40, generator=generator, dtype=torch.float64)
    rewards[ids == 2] = 0.5
    lengths = torch.randint(1, 99, (40,), generator=generator).double()
    options = {"std": std, "baseline": baseline}
    given = lengths if baseline == "length_weighted" else None
    found, *_ = reference.group_advantages(rewards, ids, 6, **options, lengths=given)
    wanted = groups_oracle.group_advantages(
        rewards.numpy(), ids.numpy(), **options, lengths=lengths.numpy()
    )
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-10, atol=1e-12)
