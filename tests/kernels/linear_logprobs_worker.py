"""One rank of test_linear_logprobs: its share of the weight against the whole, in float64."""

import os
import sys

import torch
from torch import distributed

from warpo.kernels import ops, reference

rank, store, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
group = distributed.group.WORLD
generator = torch.Generator().manual_seed(0)
vocab, lead, size = 74, (3, 5), 12

for softcap, cache in ((None, False), (4.0, False), (None, True)):
    hidden, weight, bias = (
        torch.randn(shape, generator=generator)
        for shape in ((*lead, size), (vocab, size), (vocab,))
    )
    targets = torch.randint(0, vocab, lead, generator=generator)
    targets[0, 1] = -100
    targets[0, 0], targets[2, 4] = 0, vocab // 2  # the first of each part
    mask = torch.rand(lead, generator=generator) < 0.8
    hidden[~mask] = torch.nan
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    wanted = reference.linear_logprobs(
        *exact[:2], targets, 0.8, mask, bias=exact[2], softcap=softcap
    )
    upstream = [torch.randn(lead, generator=generator) for _ in range(2)]
    torch.autograd.backward(wanted, upstream)
    part = slice(rank * vocab // 2, (rank + 1) * vocab // 2)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight[part], bias[part])]
    result = ops.linear_logprobs_and_entropy(
        *leaves[:2],
        targets,
        bias=leaves[2],
        temperature=0.8,
        mask=mask,
        softcap=softcap,
        cache_logits=cache,
        workspace_bytes=1000,
        process_group=group,
        backend=backend,
    )
    torch.autograd.backward(result, upstream)
    for mine, exactly in zip(result, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exactly, rtol=2e-5, atol=2e-5)
    gradients = (exact[0].grad, exact[1].grad[part], exact[2].grad[part])
    for mine, exactly in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(mine.grad.double(), exactly, rtol=1e-4, atol=1e-5)
    # both ranks have the same bits
    for tensor in (result.logprobs.detach(), leaves[0].grad):
        other = torch.empty(2, *tensor.shape)
        distributed.all_gather(list(other), tensor)
        assert torch.equal(other[0], other[1])

# All is checked. The graph holds the group, and a group that goes with the interpreter aborts it
# now and then: its threads are running.
distributed.barrier()
os._exit(0)
