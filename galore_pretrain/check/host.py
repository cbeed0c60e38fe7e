"""The part `host_sums`: whether sums of gradients that lie on the host are those on the device, bit for bit."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from galore_pretrain.check.part import Part
from galore_pretrain.check.prescribed import DECAY, LR
from galore_pretrain.check.updates import forget
from galore_pretrain.optim import GlobalStep, HostSums, Layerwise, RuleOptimizer, build_rules
from galore_pretrain.tensors.transport import transport_of

_MATRICES = 6
_SIZE = 2048  # rows and columns; 8 MiB in bf16, of which a copy takes a third of a millisecond
_SIZE_ON_CPU = 96
_UPDATES = 2
_MICRO_BATCHES = 3  # two of which are added to a sum
_CYCLES = 4_000_000  # that the computing stream sleeps before each gradient: a few milliseconds


# Gradients are prescribed, since attention's own are added up in another order each time. Before each of them the
# computing stream sleeps: a side stream that does not wait for it would copy what is not there yet. Each execution
# locks memory of its own.
def host_sums(part: Part) -> None:
    """Check that weights and moments come to the same by sums on the host as by sums on the device."""
    for execution in (GlobalStep, Layerwise):
        on_device = _updated(part, execution, on_host=False)
        on_host = _updated(part, execution, on_host=True)
        apart = 0
        for one, other in zip(on_device, on_host, strict=True):
            apart += not torch.equal(one, other)
        name = f"{execution.__name__}: tensors that sums on the host make otherwise"
        part.check(name, apart, f"none of {len(on_device)}", apart == 0)


def _updated(part: Part, execution: Any, *, on_host: bool) -> list[Tensor]:
    """Return weights and moments after some updates of AdamW in bf16, the same whenever they are made."""
    forget(part.device)
    size = _SIZE if part.is_on_gpu else _SIZE_ON_CPU
    generator = torch.Generator(part.device).manual_seed(0)
    params: list[Tensor] = []
    for _ in range(_MATRICES):
        weight = torch.randn(size, size, generator=generator, device=part.device)
        params.append(nn.Parameter(weight.bfloat16()))
    rule, _ = build_rules("adamw", "sound")
    optimizer = RuleOptimizer([{"params": params, "rule": rule}], lr=LR, weight_decay=DECAY)
    optimizer.allocate()
    sums = HostSums(transport_of(params[0])) if on_host else None
    running = execution(optimizer, 0.0, host_sums=sums)
    for _ in range(_UPDATES):
        for number in range(_MICRO_BATCHES):
            running.begin(number, _MICRO_BATCHES)
            for p, gradient in zip(params, _gradients(part, size, generator), strict=True):
                torch.autograd.backward([p], [gradient])
        running.complete()
        running.outcome()
    found = [p.detach() for p in params]
    for p in params:
        found += optimizer.tensors(p).values()
    return found


def _gradients(part: Part, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield a gradient of each matrix, late."""
    for _ in range(_MATRICES):
        if part.is_on_gpu:
            torch.cuda._sleep(_CYCLES)
        yield torch.randn(size, size, generator=generator, device=part.device).bfloat16()
