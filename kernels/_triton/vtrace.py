"""V-trace."""

from warpo.kernels._triton.reverse_scan import reverse_scan


def vtrace(*arguments) -> None:
    """The fields of `Vtrace`."""
    *gae, logprobs, old_logprobs, rho_max, c_max, pg_rho_max, log_ratio_limit = arguments
    reverse_scan(
        *gae, logprobs=logprobs, other_logprobs=old_logprobs, log_ratio_limit=log_ratio_limit,
        ratio_bounds=(rho_max, c_max, pg_rho_max),
    )  # fmt: skip
