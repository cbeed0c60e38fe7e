"""Any ``torch.optim.Optimizer`` class as an update rule, where what it does can be had of it one tensor at a time."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import Direction, Scope, UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.shards import Shard

UPDATES = "updates"
"""The name of the state tensor that counts the updates a wrapped class has made: those that were not dropped."""
_STEP = "class_step"
"""How a class's own ``step`` is called in the state, where the optimizer counts by that name."""
_OURS = {
    "params": "the parameters are the model's",
    "lr": "use --lr",
    "weight_decay": "use --weight-decay, which is decoupled",
    "maximize": "a loss is minimized here",
    "foreach": "a tensor is updated by itself",
    "fused": "a tensor is updated by itself",
    "capturable": "updates are not captured",
    "differentiable": "updates are not differentiated",
}
"""Arguments of torch's classes that are not an option's, and why."""

Options = tuple[tuple[str, Any], ...]
OptimizerClass = Any  # type[torch.optim.Optimizer], which mypy does not know to be hashable


@dataclass(frozen=True)
class Wrapped(UpdateRule):
    """Runs ``optimizer``, a class, on a scratch weight of zeros: what that becomes is the update.

    The class is built with a learning rate of 1, without weight decay, and with ``options``; rate and decay (decoupled)
    are this project's. Gradient, scratch weight and arithmetic are fp32. State that has the parameter's shape is kept
    in the parameter's dtype, rounded stochastically in bf16.

    Probes decide whether that is the class's own update. It must not depend on the weight, on what other parameters do,
    or on anything but ``state[p]`` that lasts from update to update; else ValueError says so. If it is the same for a
    matrix as for its halves, and so are the shapes of what the class keeps, processes can share a tensor out; else it
    is gathered (`Scope.WHOLE`). The probes are of 24 updates: what a class does later, or from a size on that is beyond
    128 × 256, they do not see.

    A class may look at the values of its state, and this rule does, so a GPU is waited for at each update of a tensor.
    """

    optimizer: OptimizerClass
    options: Options = ()
    label: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.optimizer.__name__)
        _check_arguments(self.optimizer, self.options)
        _scope_of(self.optimizer, self.options)

    def option_names(self) -> list[str]:
        """Return the names of the class's arguments that an option may set."""
        return list(arguments_of(self.optimizer))

    def configured(self, values: Mapping[str, Any]) -> tuple["Wrapped", set[str]]:
        """Return the rule with those of ``values`` that the class has arguments for, and their names."""
        known = arguments_of(self.optimizer)
        taken = {name: value for name, value in values.items() if name in known}
        if not taken:
            return self, set()
        options = dict(self.options) | taken
        return replace(self, options=tuple(options.items())), set(taken)

    @property
    def scope(self) -> Scope:
        """Say what the probe of halves has found."""
        return _scope_of(self.optimizer, self.options)

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return zeros for what the class keeps of a parameter, and the count ``updates``; ValueError if it refuses."""
        state = {UPDATES: torch.zeros((), dtype=torch.float32, device=like.device)}
        for name, kept in _kept_by(self.optimizer, self.options, tuple(like.shape)).items():
            dtype = kept.dtype
            if dtype.is_floating_point:
                dtype = like.dtype if kept.shape == like.shape else torch.float32
            if shard is not None and self.scope is Scope.PARTS and kept.shape not in ((), like.shape):
                raise ValueError(
                    f"{self.optimizer.__name__} keeps {name} of shape {tuple(kept.shape)} for a part of shape "
                    f"{tuple(like.shape)}: processes cannot share it out; use one process, or --shard none"
                )
            state[_ours(name)] = torch.zeros(kept.shape, dtype=dtype, device=like.device)
        return state

    def layout(self, name: str, state: State, shard: Shard) -> Shard | None:
        """Return where a state tensor lies: with the parameter if it has its shape, else whole on every process."""
        if self.scope is Scope.PARTS:
            return shard if tuple(state[name].shape) == shard.part_shape else None
        # Of the whole parameter: the class may keep something of one shape, which is that of a part by accident.
        kept = _kept_by(self.optimizer, self.options, shard.shape)
        shapes = {_ours(entry): how.shape for entry, how in kept.items()}
        return shard if shapes.get(name) == shard.shape else None

    # A class makes its state at its first update, and only it knows with which values. So its first one is made without
    # any, and later ones with what the one before has left. An update that is dropped must leave nothing.
    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Let the class make an update of a scratch weight (fp32, shaped as ``grad``), and return that as direction."""
        has_values = type(grad) is Tensor and grad.device.type != "meta"
        if not has_values:  # a plan asks for its memory alone
            return self._imagined_update(grad, state)
        if step.valid is not None and not bool(step.valid):
            return Direction(torch.zeros_like(grad))
        scratch = torch.zeros(grad.shape, dtype=torch.float32, device=grad.device, requires_grad=True)
        optimizer = _built(self.optimizer, self.options, [scratch])
        if float(state[UPDATES]) > 0:
            kept = _kept_by(self.optimizer, self.options, tuple(grad.shape))
            optimizer.state[scratch] = {name: how.restored(state[_ours(name)]) for name, how in kept.items()}
        scratch.grad = grad.to(torch.float32, copy=True)  # which the class may change
        optimizer.step()
        for name, value in optimizer.state[scratch].items():
            if value is not None:
                target = state[_ours(name)]
                dtype = torch.float32 if target.is_floating_point() else target.dtype
                new = torch.as_tensor(value, dtype=dtype, device=target.device)
                step.store(target, new, stream=name)
        step.store(state[UPDATES], state[UPDATES] + 1)
        return Direction(scratch.detach(), factor=-1.0)

    def _imagined_update(self, grad: Tensor, state: State) -> Direction:
        """Allocate what an update does, where it is known: the scratch weight, and all of the state once more.

        What the class allocates meanwhile is taken to be another scratch weight.
        """
        kept = [value.float().clone() for value in state.values()]
        scratch = torch.zeros_like(grad, dtype=torch.float32)
        meanwhile = torch.add(grad, scratch)
        del kept, meanwhile
        return Direction(scratch, factor=-1.0)


@dataclass(frozen=True)
class _Kept:
    """Says how a class keeps one entry of its state: its shape, and its type where it is a plain number."""

    shape: torch.Size
    dtype: torch.dtype
    number: type | None

    def restored(self, value: Tensor) -> Any:
        """Return a ``value`` of ours as the class keeps it."""
        if self.number is not None:
            return self.number(value.item())
        return value.to(self.dtype, copy=True)


def _ours(name: str) -> str:
    """Return under which name an entry of the class's state is kept."""
    return _STEP if name == "step" else name


def arguments_of(optimizer: OptimizerClass) -> dict[str, Any]:
    """Return the arguments of a class that an option may set, with their defaults."""
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(optimizer).parameters.items():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and name not in _OURS:
            arguments[name] = parameter.default
    return arguments


def _check_arguments(optimizer: OptimizerClass, options: Options) -> None:
    """Raise ValueError where a class takes no learning rate, or does not know an option."""
    if "lr" not in inspect.signature(optimizer).parameters:
        raise ValueError(f"{optimizer.__name__} takes no lr, so its updates have no rate of 1: write it as a rule")
    known = arguments_of(optimizer)
    given = {name for name, _ in options}
    missing = [name for name, default in known.items() if default is inspect.Parameter.empty and name not in given]
    if missing:
        raise ValueError(f"{optimizer.__name__} needs {', '.join(missing)} when it is built: give it a default")
    for name, _ in options:
        if name in _OURS:
            raise ValueError(f"{optimizer.__name__}: {name} is not an option here: {_OURS[name]}")
        if name not in known:
            raise ValueError(f"{optimizer.__name__} has no argument {name}; it has {', '.join(known)}")


def _built(optimizer: OptimizerClass, options: Options, params: Sequence[Tensor], lr: float = 1.0) -> Any:
    """Return the class's optimizer of ``params``, without decay, a tensor at a time."""
    parameters = inspect.signature(optimizer).parameters
    arguments: dict[str, Any] = {"lr": lr, "weight_decay": 0.0, "foreach": False}
    known = {name: value for name, value in arguments.items() if name in parameters}
    return optimizer(list(params), **known, **dict(options))


@cache
def _kept_by(optimizer: OptimizerClass, options: Options, shape: tuple[int, ...]) -> dict[str, _Kept]:
    """Return what a class keeps of a parameter of that shape, as an update shows it. ValueError if it refuses such."""
    try:
        state = _state_after_one_update(optimizer, options, shape, "meta")
    except (NotImplementedError, RuntimeError):  # it looks at values
        state = _state_after_one_update(optimizer, options, shape, "cpu")
    kept: dict[str, _Kept] = {}
    for name, value in state.items():
        if value is None:
            continue
        if isinstance(value, Tensor):
            kept[name] = _Kept(value.shape, value.dtype, number=None)
        elif isinstance(value, (int, float)):
            kept[name] = _Kept(torch.Size(), torch.float32, number=type(value))
        else:
            raise ValueError(
                f"{optimizer.__name__} keeps {name}, which is neither a tensor nor a number but "
                f"{type(value).__name__}: a checkpoint could not hold it"
            )
    if UPDATES in kept:
        raise ValueError(f"{optimizer.__name__} keeps {UPDATES}, a name that is taken here; give it another")
    return kept


def _state_after_one_update(
    optimizer: OptimizerClass, options: Options, shape: tuple[int, ...], device: str
) -> dict[str, Any]:
    """Return the state that an update by a gradient of ones leaves, fp32; ValueError where the class refuses it."""
    scratch = torch.zeros(shape, device=device, requires_grad=True)
    try:
        built = _built(optimizer, options, [scratch])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{optimizer.__name__} refuses a parameter of shape {shape}: {error}") from error
    scratch.grad = torch.ones(shape, device=device)
    built.step()
    return dict(built.state[scratch])


_UPDATES = 24
_LARGE = (128, 256)  # beyond the size from which some factor their moments


# The probes, in fp64, where updates from different weights differ by rounding alone.
@cache
def _scope_of(optimizer: OptimizerClass, options: Options) -> Scope:
    """Return which part of a tensor the class has to see. ValueError where it cannot be had a tensor at a time."""
    name = optimizer.__name__
    generator = torch.Generator().manual_seed(0)
    first, second, weight = torch.randn(3, _UPDATES, 6, 8, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(6, 8, dtype=torch.float64)
    try:
        (alone,) = _updates(optimizer, options, [zeros], [first])
        (from_weight,) = _updates(optimizer, options, [weight[0]], [first])
        (other_alone,) = _updates(optimizer, options, [zeros], [second])
        together, other_together = _updates(optimizer, options, [zeros, zeros], [first, second])
        rebuilt = _updates_of_rebuilt(optimizer, options, first)
    except Exception as error:  # whatever a class raises that wants something else than gradients
        if "closure" in str(error):
            raise ValueError(f"{name} evaluates the loss itself (closure): only gradients can be had here") from error
        raise ValueError(f"{name} cannot be updated by gradients alone: {_reason(error)}") from error
    if not torch.allclose(alone, from_weight, rtol=1e-7, atol=1e-9):
        raise ValueError(
            f"{name} reads the weight: its update from another weight is another one. Only rules that look at "
            "gradients alone can be run here"
        )
    if not torch.allclose(alone, rebuilt, rtol=1e-7, atol=1e-9):
        raise ValueError(
            f"{name} remembers more than state[p] holds, in its groups or attributes: no checkpoint would have it"
        )
    is_alone = torch.allclose(alone, together, rtol=1e-7, atol=1e-9)
    if not is_alone or not torch.allclose(other_alone, other_together, rtol=1e-7, atol=1e-9):
        raise ValueError(
            f"{name} couples parameters: two at a time are updated otherwise than each by itself, and layerwise "
            "updates make each by itself"
        )
    large = torch.randn(3, *_LARGE, generator=generator, dtype=torch.float64)
    if not _is_kept_by_element(optimizer, options):
        return Scope.WHOLE
    if _are_alike_in_halves(optimizer, options, first) and _are_alike_in_halves(optimizer, options, large):
        return Scope.PARTS
    return Scope.WHOLE


def _is_kept_by_element(optimizer: OptimizerClass, options: Options) -> bool:
    """Return whether what a class keeps of a matrix and of its halves has their shape, but for single numbers."""
    for shape in ((6, 8), (3, 8), (6, 4)):
        try:
            kept = _kept_by(optimizer, options, shape)
        except ValueError:  # it refuses such a shape
            return False
        if any(how.shape not in ((), shape) for how in kept.values()):
            return False
    return True


def _are_alike_in_halves(optimizer: OptimizerClass, options: Options, grads: Tensor) -> bool:
    """Return whether the updates of a matrix are those of its halves, cut either way."""
    whole = _part_updated(optimizer, options, grads)
    for dim in (1, 2):
        halves = [_part_updated(optimizer, options, half) for half in grads.chunk(2, dim)]
        parts = [half for half in halves if half is not None]
        if whole is None or len(parts) < 2:
            return False
        if not torch.allclose(whole, torch.cat(parts, dim), rtol=1e-7, atol=1e-9):
            return False
    return True


@cache
def is_linear_in_rate(optimizer: OptimizerClass, options: Options) -> bool:
    """Return whether the class's updates at a rate that changes are those at the rate 1, multiplied by it."""
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(_UPDATES, 6, 8, generator=generator, dtype=torch.float64)
    rates = [0.01 / (1 + number) for number in range(_UPDATES)]
    zeros = torch.zeros(6, 8, dtype=torch.float64)
    (at_one,) = _updates(optimizer, options, [zeros], [grads])
    (at_rates,) = _updates(optimizer, options, [zeros], [grads], rates)
    factors = torch.tensor(rates, dtype=torch.float64)[:, None, None]
    return torch.allclose(at_rates, at_one * factors, rtol=1e-6, atol=1e-12)


def _part_updated(optimizer: OptimizerClass, options: Options, grads: Tensor) -> Tensor | None:
    """Return the updates (updates × rows × columns) of a matrix or a part of one; None where the class refuses it."""
    try:
        (updates,) = _updates(optimizer, options, [torch.zeros_like(grads[0])], [grads])
    except Exception:  # whatever a class raises for a shape it does not take
        return None
    return updates


def _updates(
    optimizer: OptimizerClass,
    options: Options,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    rates: Sequence[float] = (),
) -> list[Tensor]:
    """Return by how much each of ``weights`` changes at each update by its gradients (updates × rows × columns).

    The rate is 1, or that of ``rates`` for each update; the first is that which the class is built with.
    """
    params = [weight.clone().requires_grad_() for weight in weights]
    built = _built(optimizer, options, params, lr=rates[0] if rates else 1.0)
    changes: list[list[Tensor]] = [[] for _ in params]
    for number in range(len(grads[0])):
        before = [p.detach().clone() for p in params]
        if rates:
            built.param_groups[0]["lr"] = rates[number]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad[number].clone()
        built.step()
        for i, p in enumerate(params):
            changes[i].append(p.detach() - before[i])
    return [torch.stack(of_one) for of_one in changes]


def _updates_of_rebuilt(optimizer: OptimizerClass, options: Options, grads: Tensor) -> Tensor:
    """Return the updates of a weight by a new optimizer each, which is given ``state[p]`` of the one before."""
    state: dict[str, Any] = {}
    updates: list[Tensor] = []
    for grad in grads:
        scratch = torch.zeros_like(grad).requires_grad_()
        built = _built(optimizer, options, [scratch])
        before = set(state)
        if state:
            built.state[scratch] = state
        scratch.grad = grad.clone()
        built.step()
        state = built.state[scratch]
        if before and before != set(state):
            raise ValueError(f"it begins to keep {', '.join(sorted(before ^ set(state)))} after its first update only")
        updates.append(scratch.detach())
    return torch.stack(updates)


def _reason(error: Exception) -> str:
    """Return what an exception says, with its kind, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
