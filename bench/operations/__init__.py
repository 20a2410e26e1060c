"""The operations of `warpo.kernels.ops` that are timed, by name."""

from warpo.bench.operation import Operation
from warpo.bench.operations import (
    control,
    groups,
    heads,
    losses,
    preferences,
    scans,
    vocabulary,
    weights,
)

_MODULES = (vocabulary, heads, losses, preferences, scans, groups, control, weights)

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for module in _MODULES for operation in module.OPERATIONS
}
