"""What a rule makes of memory: the largest tensor that an operation of it returns."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor of a dtype has that an operation returns."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == self.dtype:
            self.elements = max(self.elements, result.numel())
        return result


def largest(dtype: torch.dtype, work: Callable[[], object]) -> int:
    """How many elements the largest tensor of ``dtype`` has that ``work`` makes or looks at."""
    with _Largest(dtype) as mode:
        work()
    return mode.elements
