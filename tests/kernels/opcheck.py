"""`torch.library.opcheck` of an operator that takes a named tuple."""

from typing import Any

import torch

from warpo.kernels._registration import Operator


def opcheck(operator: Operator, inputs: Any, **options: Any) -> None:
    torch.library.opcheck(operator.registered, operator.flatten(inputs), **options)
