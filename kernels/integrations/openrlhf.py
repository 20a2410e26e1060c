"""warpo's kernels inside OpenRLHF:

    from warpo.kernels.integrations import openrlhf

    openrlhf.patch()

in the process that computes, which with Ray is every worker (those of vLLM import OpenRLHF's models
and DeepSpeed by this):

    hook = "warpo.kernels.integrations.openrlhf.patch"
    ray.init(runtime_env={"worker_process_setup_hook": hook})

Left to OpenRLHF, since a kernel gains nothing: compute_approx_kl with the estimator k1, masked_mean
over one dimension, masked_normalize, compute_reward.
"""

from warpo.kernels.integrations import (  # noqa: F401  (they register replacements)
    openrlhf_advantages,
    openrlhf_logprobs,
    openrlhf_losses,
    openrlhf_pairs,
    openrlhf_policy,
)
from warpo.kernels.integrations.openrlhf_library import library

patch, unpatch, patched, names = library.patch, library.unpatch, library.patched, library.names
