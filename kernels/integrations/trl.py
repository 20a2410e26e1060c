"""warpo's kernels inside TRL:

from warpo.kernels.integrations import trl

trl.patch()
"""

from warpo.kernels.integrations import (  # noqa: F401
    trl_lm_head,
    trl_logprobs,
    trl_policy,
    trl_preferences,
)
from warpo.kernels.integrations.trl_library import library

patch, unpatch, patched = library.patch, library.unpatch, library.patched
names, report = library.names, library.report
