"""GAE on rewards with a KL penalty."""

from warpo.kernels._arguments.gae import ShapedGaeArguments
from warpo.kernels._triton.reverse_scan import reverse_scan


def shaped_gae(a: ShapedGaeArguments) -> None:
    reverse_scan(
        a.gae,
        logprobs=a.logprobs,
        other_logprobs=a.ref_logprobs,
        kl=a.kl,
        kl_coef=a.kl_coef,
        adaptive_kl_coef=a.adaptive_kl_coef,
        entropy_coef=a.entropy_coef,
        log_ratio_limit=a.log_ratio_limit,
        shaped_rewards=a.shaped_rewards,
    )
