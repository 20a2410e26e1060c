"""warpo's kernels inside OpenRLHF:

    from warpo.kernels.integrations import openrlhf

    openrlhf.patch()

in the process that computes, which with Ray is every worker (those of vLLM import OpenRLHF's models
and DeepSpeed by this):

    hook = "warpo.kernels.integrations.openrlhf.patch"
    ray.init(runtime_env={"worker_process_setup_hook": hook})

Left to OpenRLHF, a few vector operations each, on which a kernel gains nothing: compute_approx_kl
with the estimator k1, masked_mean, masked_normalize, compute_reward, aggregate_loss and with it
SFTLoss, ValueLoss without clipping, PairWiseLoss. It has no K-wise loss.
"""

from warpo.kernels.integrations.openrlhf import (  # noqa: F401  (they register replacements)
    advantages,
    logprobs,
    losses,
    pairs,
    policy,
)
from warpo.kernels.integrations.openrlhf._library import library

patch, unpatch, patched = library.patch, library.unpatch, library.patched
names, report = library.names, library.report
