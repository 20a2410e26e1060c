"""Calls of every operation at small and odd sizes, forward and backward, for compute-sanitizer: a
kernel under it runs many times slower, so each path of each kernel is taken once.

    compute-sanitizer --tool memcheck python -m tests.kernels.small_calls --device cuda

Those that leave their products to cuBLAS are left out.
"""

import argparse
import os
import sys

DTYPES = ("float32", "bfloat16", "float16")
# A row within one block, past it, and at what the loss from logits keeps and does not keep of a
# row in shared memory; odd: rows on no boundary of 16 bytes.
VOCABULARIES = (37, 9001, 33024, 120001)
# Scans within a warp, a block and beyond.
SCANS = ((3, 7), (5, 30), (4, 100), (3, 500), (2, 1000), (2, 5000))


def every_operation(device: str) -> None:
    from tests.kernels.operations import OPERATIONS
    from tests.kernels.test_contract import run

    for operation in OPERATIONS:
        if "linear" not in operation.name and "hidden" not in operation.name:
            run(operation, operation.tensors(), device)


def vocabularies(device: str) -> None:
    import torch

    from warpo.kernels import ops

    for vocabulary in VOCABULARIES:
        for dtype in (getattr(torch, name) for name in DTYPES):
            logits = torch.randn(5, vocabulary, device=device).to(dtype).requires_grad_()
            targets = torch.randint(0, vocabulary, (5,), device=device)
            ops.logprobs_and_entropy(logits, targets)[0].sum().backward()
            batch = logits.detach()[None].clone().requires_grad_()
            old, advantages = torch.zeros(1, 5, device=device), torch.ones(1, device=device)
            found = ops.policy_loss_from_logits(
                batch, targets[None], advantages, "dapo", old_logprobs=old
            )
            (2 * found.loss).backward()


def scans(device: str) -> None:
    import torch

    from warpo.kernels import ops

    numbers = {"gamma": 0.9, "gae_lambda": 0.8}
    for shape in SCANS:
        rewards, values = torch.randn(2, *shape, device=device).unbind()
        mask = torch.rand(shape, device=device) < 0.7
        for mode in ("carry", "zero", "compact"):
            leaf = rewards.clone().requires_grad_()
            found = ops.gae(leaf, values, **numbers, mask=mask, mask_mode=mode)
            found.advantages.sum().backward()
        ops.gae(rewards.t().contiguous(), values.t().contiguous(), **numbers, time_dim=0)


def weights(device: str) -> None:
    import torch

    from warpo.kernels import ops

    weights = torch.randn(70_001, device=device)
    ops.adamw_publish(
        weights.flip(0),
        weights.clone(),
        0.1 * weights,
        weights.square(),
        weights.bfloat16(),
        lr=1e-3,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        step=3,
    )
    ops.fingerprint(weights)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.small_calls")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    args = parser.parse_args(words)
    os.environ["WARPO_TEST_DEVICE"] = args.device
    for part in (every_operation, vocabularies, scans, weights):
        part(args.device)
        if args.device == "cuda":
            import torch

            torch.cuda.synchronize()
        print(part.__name__, "done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
