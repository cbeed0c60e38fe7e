"""Updates of the parts of one matrix by two threads, which stand for processes: like `shards.py`, without torchrun."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Barrier

import torch
from torch import Tensor

from galore_pretrain.optim import Step, UpdateRule
from galore_pretrain.optim.moments import State
from galore_pretrain.tensors.shards import Shard


@dataclass
class _Meeting:
    """Where two threads lay down what is to be summed."""

    barrier: Barrier = field(default_factory=lambda: Barrier(2, timeout=60))
    terms: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part(Shard):
    """A shard whose ``group`` is a meeting of threads."""

    def sum(self, part: Tensor) -> Tensor:
        self.group.terms[self.start] = part.clone()
        self.group.barrier.wait()
        total = sum(self.group.terms[start] for start in sorted(self.group.terms))
        self.group.barrier.wait()
        return torch.as_tensor(total)


def updates(
    rule: UpdateRule,
    grads: list[Tensor],
    step: Step,
    shard: Shard | None = None,
) -> tuple[list[Tensor], State]:
    """The directions of one update by each of ``grads``, multiplied out in fp32, and the state they leave."""
    state = rule.init(grads[0], shard)
    directions = []
    for count, grad in enumerate(grads, 1):
        direction = rule.full_update(grad, state, replace(step, count=count, shard=shard)).merged()
        directions.append(direction.whole().float() * direction.factor)
    return directions, state


def updates_in_parts(
    rule: UpdateRule,
    grads: list[Tensor],
    step: Step,
    dim: int,
    cut: int,
) -> tuple[list[Tensor], list[State]]:
    """The same by two threads, of which the first has ``cut`` rows (``dim`` 0) or columns; and the state of each."""
    shape = tuple(grads[0].shape)
    meeting = _Meeting()
    shards = [_Part(dim, start, stop, shape, 2, meeting) for start, stop in ((0, cut), (cut, shape[dim]))]

    def work(shard: Shard) -> tuple[list[Tensor], State]:
        return updates(rule, [shard.of(grad).contiguous() for grad in grads], step, shard)

    with ThreadPoolExecutor(2) as threads:
        (first, state), (second, other) = threads.map(work, shards)
    return [torch.cat(pair, dim) for pair in zip(first, second, strict=True)], [state, other]
