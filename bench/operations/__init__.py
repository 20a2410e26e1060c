"""What is timed: the operations of `warpo.kernels.ops`, by name."""

from warpo.bench.operation import Operation
from warpo.bench.operations import vocabulary

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for module in (vocabulary,) for operation in module.OPERATIONS
}
