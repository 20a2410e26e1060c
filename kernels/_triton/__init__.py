"""The operations in Triton: a backend with the functions that `native` describes.

Every shape, stride and number is a run-time argument: a kernel is compiled once for each set of
dtypes, present optional tensors and flags, logits also by alignment. With TRITON_INTERPRET=1 set
before Python starts, the kernels run on CPU tensors, slowly, for tests; use float32 there, since
the interpreter truncates float32 where a GPU rounds to bfloat16.
"""

from warpo.kernels._triton.gae import gae_backward, gae_forward
from warpo.kernels._triton.group_advantages import (
    group_advantages_backward,
    group_advantages_forward,
)
from warpo.kernels._triton.logprobs import logprobs_backward, logprobs_forward
from warpo.kernels._triton.policy_loss import policy_loss
from warpo.kernels._triton.shaped_gae import shaped_gae
from warpo.kernels._triton.vtrace import vtrace
from warpo.kernels._triton.whiten import whiten_backward, whiten_forward

__all__ = [
    "gae_backward",
    "gae_forward",
    "group_advantages_backward",
    "group_advantages_forward",
    "logprobs_backward",
    "logprobs_forward",
    "policy_loss",
    "shaped_gae",
    "vtrace",
    "whiten_backward",
    "whiten_forward",
]
