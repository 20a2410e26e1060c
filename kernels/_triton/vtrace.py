"""V-trace."""

from warpo.kernels._arguments.gae import VtraceArguments
from warpo.kernels._triton.reverse_scan import reverse_scan


def vtrace(a: VtraceArguments) -> None:
    reverse_scan(
        a.gae,
        logprobs=a.logprobs,
        other_logprobs=a.old_logprobs,
        log_ratio_limit=a.log_ratio_limit,
        ratio_bounds=(a.rho_max, a.c_max, a.pg_rho_max),
        weighs_advantages=a.weighs_advantages,
    )
