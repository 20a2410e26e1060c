"""GAE on rewards with a KL penalty."""

from warpo.kernels._triton.reverse_scan import reverse_scan


def shaped_gae(*arguments) -> None:
    """The fields of `ShapedGae`."""
    *gae, logprobs, ref_logprobs, kl, kl_coef, adaptive_kl_coef, limit, shaped_rewards = arguments
    reverse_scan(
        *gae, logprobs=logprobs, other_logprobs=ref_logprobs, kl=kl, kl_coef=kl_coef,
        adaptive_kl_coef=adaptive_kl_coef, log_ratio_limit=limit, shaped_rewards=shaped_rewards,
    )  # fmt: skip
