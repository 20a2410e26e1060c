"""warpo's kernels inside TRL:

from warpo.kernels.integrations import trl

trl.patch()
"""

from warpo.kernels.integrations.trl import (  # noqa: F401  (they register replacements)
    lm_head,
    logprobs,
    policy,
    preferences,
)
from warpo.kernels.integrations.trl._library import library

patch, unpatch, patched = library.patch, library.unpatch, library.patched
names, report = library.names, library.report
