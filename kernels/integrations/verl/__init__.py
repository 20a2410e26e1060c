"""warpo's kernels inside verl:

    from warpo.kernels.integrations import verl

    verl.patch()

Workers are processes of their own. verl imports what VERL_USE_EXTERNAL_MODULES names in each of
them, so that

    export VERL_USE_EXTERNAL_MODULES=warpo.kernels.integrations.verl_plugin

patches driver and workers alike, and takes the place of the lines above. Ray passes the environment
on to the processes of its node; a cluster that runs already gets it by
`+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=...`.
"""

from warpo.kernels.integrations.verl import (  # noqa: F401  (they register replacements)
    advantages,
    logprobs,
    losses,
    terms,
)
from warpo.kernels.integrations.verl._library import library

patch, unpatch, patched = library.patch, library.unpatch, library.patched
names, report = library.names, library.report
