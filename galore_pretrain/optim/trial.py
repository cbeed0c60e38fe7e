"""A small model on which a method is tried out, prescribed gradients for it, and how two such trials are compared."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from galore_pretrain.optim.build import build_optimizer
from galore_pretrain.optim.execution import Execution
from galore_pretrain.optim.methods import OPTIONS, is_own, method, resolve_name
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.own import load_method

LR = 0.01
DECAY = 0.1
# In eight bits, blocks have 256 elements, and moments of less than 4096 elements stay fp32. Both kinds are here, also
# where the rank is 8, and where two processes share a tensor out: its parts hold whole blocks.
SHAPES: dict[str, tuple[int, ...]] = {
    "embed_tokens.weight": (256, 64),
    "attn.square.weight": (128, 128),
    "attn.small.weight": (32, 32),
    "mlp.tall.weight": (1024, 32),
    "mlp.wide.weight": (32, 1024),
    "norm.weight": (64,),
    "lm_head.weight": (256, 64),
}
"""The parameters of `TrialModel` and their shapes."""
_SMALL_OPTIONS = {"rank": 8, "update_proj_gap": 3}  # by flag; a run's own values would renew no basis in a few updates
_GRID = 2.0**12
_CODES_BOUND = 0.01
_ROUNDING = 2.0**-23


class CheckFailedError(AssertionError):
    """Says that a method does not hold what the project's own do: which tensor, the figures, and what is likely."""


class NotCheckedError(Exception):
    """Says why something could not be checked of a method."""


Placing = Callable[[str, Tensor], Tensor]
"""Returns a tensor as a process holds it, given its parameter's name."""


def as_it_is(name: str, value: Tensor) -> Tensor:
    """Return ``value``: one process holds all of it."""
    return value


class TrialModel(nn.Module):
    """An embedding, linear layers of ``attn`` and ``mlp`` (square, small, tall, wide), a norm's vector and a head."""

    def __init__(self, dtype: torch.dtype, place: Placing = as_it_is) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(1, 1)
        self.attn = nn.ModuleDict({"square": _linear(), "small": _linear()})
        self.mlp = nn.ModuleDict({"tall": _linear(), "wide": _linear()})
        self.norm = nn.RMSNorm(1)
        self.lm_head = _linear()
        for name, shape in SHAPES.items():
            module = self.get_submodule(name.removesuffix(".weight"))
            value = 0.1 * _drawn(name, shape, 0)
            module.weight = nn.Parameter(place(name, value.to(dtype)))

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, as transformers' models do."""
        return self.lm_head


def _linear() -> nn.Linear:
    """Return a linear layer whose weight is to be replaced."""
    return nn.Linear(1, 1, bias=False)


# Sums of a few gradients must be exact in fp32, whatever the order: then a sum of micro-batches differs from one batch
# by what a method makes of it alone. So gradients are multiples of 2⁻¹² and below 8. Columns differ in size, so that
# subspaces are told apart.
@lru_cache(maxsize=512)
def _drawn(name: str, shape: tuple[int, ...], number: int) -> Tensor:
    """Return normal numbers (fp32, ``shape``), the same for the same name and number, exact multiples of 2⁻¹²."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + number)
    values = torch.randn(shape, generator=generator) * torch.logspace(0, -2, shape[-1])
    return torch.round(values * _GRID) / _GRID


def gradients(number: int) -> dict[str, Tensor]:
    """Return gradient number ``number`` (from 1) of each parameter, fp32 and whole. They may be changed."""
    return {name: _drawn(name, shape, number).clone() for name, shape in SHAPES.items()}


@dataclass(frozen=True)
class Subject:
    """Names a method that is checked, by which numerics, with which ``options`` of `build_optimizer`, and where."""

    name: str
    numerics: str = "sound"
    options: tuple[tuple[str, Any], ...] = ()
    device: str = "cpu"

    def without_refreshes(self) -> "Subject":
        """Return the same method with bases that are not renewed in a few updates, but for the first."""
        gap = OPTIONS["update_proj_gap"].argument
        options = [(name, 1000 if name == gap else value) for name, value in self.options]
        return replace(self, options=tuple(options))

    def build(
        self,
        dtype: torch.dtype,
        *,
        lr: float = LR,
        decay: float = DECAY,
        seed: int = 0,
        torch_seed: int = 0,
        place: Placing | None = None,
    ) -> "Trial":
        """Return a new model and the method's optimizer of it, with its state, on the subject's device.

        Everything begins with the same state of torch's own generator, unless ``torch_seed`` says otherwise.
        ``place`` says where tensors are instead.
        """
        if place is None:
            place = self._on_device
        model = TrialModel(dtype, place)
        torch.manual_seed(torch_seed)
        optimizer = build_optimizer(
            model,
            self.name,
            lr=lr,
            numerics=self.numerics,
            weight_decay=decay,
            seed=seed,
            **dict(self.options),
        )
        optimizer.allocate()
        return Trial(optimizer, dict(model.named_parameters()), place)

    def _on_device(self, name: str, value: Tensor) -> Tensor:
        """Return ``value`` on the subject's device: one process holds all of it."""
        return value.to(self.device)


def load_subject(
    name: str, numerics: str = "sound", options: Mapping[str, Any] | None = None, device: str = "cpu"
) -> Subject:
    """Return what is checked of the method ``name``, which is loaded where it is from outside the package.

    Where ``options`` do not say otherwise, ranks are 8 and bases are renewed every 3 updates. ValueError where a run
    would refuse the method or an option.
    """
    row, _ = resolve_name(name)
    if is_own(row):
        load_method(row)
    values: dict[str, Any] = {}
    for key, value in (options or {}).items():
        values[key] = tuple(value) if isinstance(value, list) else value  # rules are hashed
    for flag, small in _SMALL_OPTIONS.items():
        if flag in method(row).options:
            values.setdefault(OPTIONS[flag].argument, small)
    subject = Subject(row, numerics, tuple(values.items()), device)
    subject.build(torch.float32)
    return subject


@dataclass
class Trial:
    """A model's parameters by name, their optimizer, and what the weights were before."""

    optimizer: RuleOptimizer
    params: dict[str, Tensor]
    place: Placing = as_it_is
    before: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.weights()

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the weights."""
        return {name: p.detach().clone() for name, p in self.params.items()}

    def states(self) -> dict[str, State]:
        """Return copies of the state tensors of each parameter, by their names."""
        copies: dict[str, State] = {}
        for name, p in self.params.items():
            copies[name] = {key: value.clone() for key, value in self.optimizer.tensors(p).items()}
        return copies

    def set_gradients(self, grads: Mapping[str, Tensor]) -> None:
        """Set the gradients of parameters, given whole and in fp32."""
        for name, grad in grads.items():
            p = self.params[name]
            p.grad = self.place(name, grad.to(p.dtype, copy=True))

    def step(self, grads: Mapping[str, Tensor]) -> None:
        """Make one update as torch's own loop would: set the gradients, and call ``step``."""
        self.set_gradients(grads)
        self.optimizer.step()

    def update(self, execution: Execution, micro_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Update by an execution, from ``micro_batches``. Backward meets the last weights first, as in a model."""
        parts = list(micro_batches)
        for number, grads in enumerate(parts):
            execution.begin(number, len(parts))
            for name in reversed(self.params):
                p = self.params[name]
                torch.autograd.backward(p, self.place(name, grads[name].to(p.dtype, copy=True)))
        execution.complete()


def require_equal(one: Trial, other: Trial, where: str, likely: str) -> None:
    """Raise CheckFailedError where two trials' weights or states differ in a bit."""
    for name, p in one.params.items():
        require_same(p.detach(), other.params[name].detach(), f"{name} {where}", likely)
    states = one.states()
    for name, state in other.states().items():
        for key, value in state.items():
            require_same(states[name][key], value, f"{key} of {name} {where}", likely)


def require_same(one: Tensor, other: Tensor, what: str, likely: str) -> None:
    """Raise CheckFailedError where two tensors differ in a bit."""
    if one.shape != other.shape:
        raise CheckFailedError(f"{what}: the shapes are {tuple(one.shape)} and {tuple(other.shape)}; {likely}")
    if torch.equal(one, other):
        return
    apart = (one.float() - other.float()).abs()
    count = int((one != other).sum())
    raise CheckFailedError(
        f"{what}: {count:,} of {one.numel():,} elements differ, by {float(apart.max()):.2g} at most; {likely}"
    )


def has_codes(state: State) -> bool:
    """Return whether a state keeps moments in 8 bits, where a last bit of difference may become another code."""
    return any(value.dtype in (torch.uint8, torch.int8) for value in state.values())


def require_close(one: Trial, other: Trial, bound: float, where: str, likely: str) -> None:
    """Raise CheckFailedError where weights are further apart than ``bound`` times the way that they have come.

    With state of 8 bits, 0.01 of the way is allowed.
    """
    for name, p in one.params.items():
        limit = bound
        if has_codes(one.optimizer.tensors(p)):
            limit = max(bound, _CODES_BOUND)
        require_near(p.detach(), other.params[name].detach(), one.before[name], limit, f"{name} {where}", likely)


def require_near(one: Tensor, other: Tensor, before: Tensor, bound: float, what: str, likely: str) -> None:
    """Raise CheckFailedError where ‖one − other‖ is above ``bound`` · ‖one − before‖ and the weights' own rounding."""
    apart = float((one.float() - other.float()).norm())
    way = float((one.float() - before.float()).norm())
    rounding = _ROUNDING * float(before.float().norm())
    if not apart <= bound * way + rounding:
        raise CheckFailedError(
            f"{what}: {apart:.2g} apart after a way of {way:.2g} (‖·‖), and {bound:g} of it is allowed; {likely}"
        )
