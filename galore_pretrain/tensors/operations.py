"""Makes functions that launch kernels operations of torch, which fake tensors, counts and profiles see as one each."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version

_NAMESPACE = "galore_pretrain"
_DEVICE_OF: Any = torch.ops.prim.device.default


# More than half of the operations on fake tensors ask for their device. Their mode answers the same, but inside of a
# kernel, where no mode that calls this is active.
def device_asked_for(func: Any, args: Any) -> torch.device | None:
    """Return a fake tensor's device if an operation asks for that alone, else None."""
    if func is _DEVICE_OF and isinstance(args[0], FakeTensor):
        return args[0].fake_device
    return None


@cache
def _library() -> torch.library.Library:
    """Return the package's library of operations, which has to live as long as they are called."""
    return torch.library.Library(_NAMESPACE, "FRAGMENT")


# `torch.library.custom_op` does the same, and has each call go through two layers of Python, for gradients and for
# version counters: a call of `adam_` without its kernel takes 50 to 75 µs of one core, and 5 to 9 by this. An update
# has hundreds. No operation here has a gradient. Its function runs on every device, and a fake one in its place on
# fake tensors.
def operation(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], mutates: Sequence[str] = ()
) -> Callable[..., Any]:
    """Return an operation that calls ``function``, whose annotations say which tensors and numbers it takes.

    On fake tensors it calls ``fake``. ``mutates`` names the arguments, tensors or lists of them, that are changed in
    place. Results have no gradients.
    """
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    library = _library()
    library.define(name + schema)
    overload = getattr(getattr(torch.ops, _NAMESPACE), name).default
    places = [place for place, argument in enumerate(overload._schema.arguments) if argument.name in mutates]

    def run(*arguments: Any) -> Any:
        result = function(*arguments)
        for place in places:
            increment_version(arguments[place])
        return result

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=library)
    called: Callable[..., Any] = overload
    return called
