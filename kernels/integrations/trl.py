"""warpo's kernels inside TRL:

from warpo.kernels.integrations import trl

trl.patch()
"""

from warpo.kernels.integrations import trl_logprobs as _logprobs  # noqa: F401
from warpo.kernels.integrations import trl_policy as _policy  # noqa: F401
from warpo.kernels.integrations.trl_library import library

patch, unpatch, patched, names = library.patch, library.unpatch, library.patched, library.names
