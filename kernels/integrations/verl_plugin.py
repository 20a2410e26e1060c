"""Patches verl in the process that imports it, for VERL_USE_EXTERNAL_MODULES."""

from warpo.kernels.integrations import verl

verl.patch()
