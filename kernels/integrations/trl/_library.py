"""The functions of TRL that have replacements."""

from warpo.kernels.integrations.patching import Library

library = Library("trl", tested=("1.16.0",))
