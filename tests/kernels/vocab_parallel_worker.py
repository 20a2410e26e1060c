"""One rank of test_vocab_parallel: its share of the vocabulary against the whole, in float64."""

import os
import sys

import torch
from torch import distributed

from warpo.kernels import ops, reference

rank, store, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
group = distributed.group.WORLD
generator = torch.Generator().manual_seed(0)
vocab, lead = 74, (3, 5)

for dtype in (torch.float32,) if backend == "triton" else (torch.float32, torch.bfloat16):
    for temperature in (1.0, 0.5 + torch.rand(lead, generator=generator)):
        logits = (4 * torch.randn(*lead, vocab, generator=generator) + 1000).to(dtype)
        logits[1, 2, : vocab // 2] = -torch.inf  # one rank has nothing to offer
        targets = torch.randint(0, vocab, lead, generator=generator)
        targets[1, 2] = vocab - 1
        targets[0, 1] = -100
        targets[0, 0], targets[2, 4] = 0, vocab // 2  # the first of each part
        mask = torch.rand(lead, generator=generator) < 0.8
        logits[~mask] = torch.nan
        exact = logits.double().requires_grad_()
        warmth = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
        wanted = reference.logprobs(exact, targets, warmth, mask)
        upstream = [torch.randn(lead, generator=generator) for _ in range(2)]
        sum((x * g).sum() for x, g in zip(wanted, upstream, strict=True)).backward()
        part = slice(rank * vocab // 2, (rank + 1) * vocab // 2)
        for inplace in (False, True):
            leaf = logits[..., part].clone().requires_grad_()
            working = leaf * 1 if inplace else leaf
            result = ops.logprobs_and_entropy(
                working,
                targets,
                temperature=temperature,
                mask=mask,
                process_group=group,
                inplace_backward=inplace,
                backend=backend,
            )
            torch.autograd.backward(result, upstream)
            for mine, exactly in zip(result, wanted, strict=True):
                torch.testing.assert_close(mine.double(), exactly, rtol=2e-5, atol=2e-5)
            tolerance = {"rtol": 1e-4, "atol": 2e-6}
            if dtype is torch.bfloat16:
                tolerance = {"rtol": 2**-8, "atol": 1e-4}
            torch.testing.assert_close(leaf.grad.double(), exact.grad[..., part], **tolerance)

        # both ranks have the same bits
        other = torch.empty(2, *lead)
        distributed.all_gather(list(other), result.logprobs.detach())
        assert torch.equal(other[0], other[1])

outside = ops.logprobs(torch.zeros(2, 4), torch.tensor([8, 3]), process_group=group)
assert outside.isnan().tolist() == [True, False]

# All is checked. The graph holds the group, and a group that goes with the interpreter aborts it
# now and then: its threads are running.
distributed.barrier()
os._exit(0)
