"""How a moment is kept between two updates: one axis of a method, independent of the rule that uses it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]


class MomentStore(Protocol):
    """Keeps one moment of a parameter under ``name`` in that parameter's state."""

    def zeros(self, name: str, like: Tensor) -> State:
        """The entries of ``state`` that hold a moment of ``like``'s shape, on its device."""
        ...

    def read(self, state: State, name: str) -> Tensor:
        """The moment in the dtype that the rule computes in; changing it in place is allowed, ``write`` must follow."""
        ...

    def write(self, state: State, name: str, value: Tensor, generator: torch.Generator | None) -> None:
        """Keep ``value``; ``generator`` supplies the bits where the store rounds stochastically."""
        ...

    def narrow(self, state: State, name: str, start: int, stop: int) -> State:
        """Views of the entries that hold the elements ``start:stop`` of the flattened moment."""
        ...


@dataclass(frozen=True)
class Dense:
    """A tensor of the parameter's shape and dtype.

    ``rounding="stochastic"``: arithmetic in fp32; a bf16 moment is rounded up or down with probabilities that keep its
    mean, so that v·0.999 decays. ``"nearest"``: arithmetic in the storage dtype itself, as the published code
    does it; in bf16, v·0.999 rounds back to v and never decays.
    """

    rounding: str = "stochastic"

    def zeros(self, name: str, like: Tensor) -> State:
        return {name: torch.zeros_like(like)}

    def read(self, state: State, name: str) -> Tensor:
        moment = state[name]
        return moment if self.rounding == "nearest" else moment.float()

    def write(self, state: State, name: str, value: Tensor, generator: torch.Generator | None) -> None:
        moment = state[name]
        if value is not moment:  # the very tensor where arithmetic and storage share a dtype
            moment.copy_(round_stochastic(value, generator) if moment.dtype == torch.bfloat16 else value)

    def narrow(self, state: State, name: str, start: int, stop: int) -> State:
        return {name: state[name].view(-1)[start:stop]}


def round_stochastic(value: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round fp32 ``value`` to bf16, up with probability equal to the fraction that nearest rounding would lose.

    E[result] = value, so an update smaller than half a bf16 ulp is not lost but made with its probability. bf16 is
    the upper half of fp32: adding 16 uniform bits below it carries into the upper half with the wanted probability.
    Non-finite values pass unchanged.
    """
    bits = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    rounded = (value.view(torch.int32) + bits).bitwise_and_(-65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).bfloat16()
