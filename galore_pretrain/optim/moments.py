"""How a moment is kept between two updates: one axis of a method, independent of the rule that uses it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.shards import Shard

State = dict[str, Tensor]
_BLOCK = 256  # elements that share a scale: bitsandbytes' own block, and the only one its optimizers know
_SMALL = 4096  # elements below which bitsandbytes keeps a moment in fp32
_codes: dict[tuple[torch.device, bool], Tensor] = {}


class MomentStore(Protocol):
    """Keeps one moment of a parameter under ``name`` in that parameter's state."""

    def zeros(self, name: str, like: Tensor, shard: Shard | None = None) -> State:
        """The entries of ``state`` that hold a moment of ``like``'s shape, on its device. All zero bytes mean zero.

        ``shard``: the part of a tensor that ``like`` is; None means that it is all of it.
        """
        ...

    def read(self, state: State, name: str, step: Step) -> Tensor:
        """The moment in the dtype that the rule computes in; changing it in place is allowed, ``write`` must follow."""
        ...

    def write(self, state: State, name: str, value: Tensor, step: Step) -> None:
        """Keep ``value``, which may be overwritten."""
        ...

    def narrow(self, state: State, name: str, start: int, stop: int) -> State:
        """Views of the entries that hold the elements ``start:stop`` of the flattened moment.

        Both are multiples of 256, unless ``stop`` is the end.
        """
        ...

    is_dense: ClassVar[bool]
    """Whether a moment is one tensor of its own shape."""

    def entries(self, state: State, name: str) -> tuple[str, ...]:
        """Return the names of the entries of ``state`` that hold the moment."""
        ...

    def in_blocks(self, state: State, name: str) -> bool:
        """Whether elements of the moment share a scale, so that its bytes cannot be cut anywhere."""
        ...

    def fused_adam(
        self, grad: Tensor, state: State, step: Step, betas: tuple[float, float], eps: float, *, always: bool = False
    ) -> Tensor | None:
        """Advance both of Adam's moments in one pass and return its direction × −1; None where no kernel does that."""
        ...


@dataclass(frozen=True)
class Dense:
    """A tensor of the parameter's shape and dtype.

    ``rounding="stochastic"``: arithmetic in fp32; a bf16 moment is rounded up or down with probabilities that keep its
    mean, so that v·0.999 decays. ``"nearest"``: arithmetic in the storage dtype itself, as the published code
    does it; in bf16, v·0.999 rounds back to v and never decays.
    """

    rounding: str = "stochastic"
    is_dense: ClassVar[bool] = True

    def zeros(self, name: str, like: Tensor, shard: Shard | None = None) -> State:
        return {name: torch.zeros_like(like, memory_format=torch.contiguous_format)}

    def read(self, state: State, name: str, step: Step) -> Tensor:
        return step.working_copy(state[name], None if self.rounding == "nearest" else torch.float32)

    def write(self, state: State, name: str, value: Tensor, step: Step) -> None:
        step.store(state[name], value, stream=name)

    def narrow(self, state: State, name: str, start: int, stop: int) -> State:
        return {name: state[name].view(-1)[start:stop]}

    def entries(self, state: State, name: str) -> tuple[str, ...]:
        return (name,)

    def in_blocks(self, state: State, name: str) -> bool:
        return False

    def fused_adam(
        self, grad: Tensor, state: State, step: Step, betas: tuple[float, float], eps: float, *, always: bool = False
    ) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Blockwise8bit:
    """A byte an element and an fp32 scale a block of 256, by bitsandbytes (arXiv 2110.02861, §2: dynamic quantization).

    Moments named ``…_sq`` are not negative and use the unsigned map. A moment of fewer than 4096 elements stays a
    dense fp32 tensor, as in bitsandbytes' own optimizers. Where processes share a moment out, blocks begin anew with
    each part.
    """

    is_dense: ClassVar[bool] = False

    def zeros(self, name: str, like: Tensor, shard: Shard | None = None) -> State:
        if math.prod(like.shape if shard is None else shard.shape) < _SMALL:
            return {name: torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)}
        blocks = -(-like.numel() // _BLOCK)
        _code_values(not name.endswith("_sq"))  # made here, since a step of fake tensors cannot look at values
        return {
            name: torch.zeros_like(like, dtype=torch.uint8, memory_format=torch.contiguous_format),
            f"{name}_absmax": like.new_zeros(blocks, dtype=torch.float32),
        }

    def read(self, state: State, name: str, step: Step) -> Tensor:
        moment, scale = state[name], state.get(f"{name}_absmax")
        if scale is None:
            return step.working_copy(moment)
        from bitsandbytes import functional

        code = _code(name, moment)
        return torch.as_tensor(functional.dequantize_blockwise(moment, absmax=scale, code=code, blocksize=_BLOCK))

    def write(self, state: State, name: str, value: Tensor, step: Step) -> None:
        if f"{name}_absmax" not in state:
            step.store(state[name], value)
            return
        from bitsandbytes import functional

        code = _code(name, state[name])
        with ordered_on_default_stream(value.device):
            quantized, how = functional.quantize_blockwise(value, code=code, blocksize=_BLOCK)
        step.store(state[name], quantized)
        step.store(state[f"{name}_absmax"], how.absmax)

    def narrow(self, state: State, name: str, start: int, stop: int) -> State:
        part = {name: state[name].view(-1)[start:stop]}
        if (scale := state.get(f"{name}_absmax")) is not None:
            part[f"{name}_absmax"] = scale[start // _BLOCK : -(-stop // _BLOCK)]
        return part

    def entries(self, state: State, name: str) -> tuple[str, ...]:
        return tuple(entry for entry in (name, f"{name}_absmax") if entry in state)

    def in_blocks(self, state: State, name: str) -> bool:
        return f"{name}_absmax" in state

    def fused_adam(
        self, grad: Tensor, state: State, step: Step, betas: tuple[float, float], eps: float, *, always: bool = False
    ) -> Tensor | None:
        """Adam's direction × −1 by bitsandbytes' own kernel, which reads, updates and writes both moments in one pass.

        None where the composed rule is as good or the kernel does not apply: on a CPU it is the same sequence of
        operations (``always`` runs it there too), and small moments are dense.
        """
        names = ["exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"]
        if not (grad.is_cuda or always) or names[2] not in state or not grad.numel():
            return None
        from bitsandbytes import functional

        parts = [step.working_copy(state[name]) for name in names]
        scratch = torch.zeros_like(grad, dtype=torch.float32)
        grad, codes = grad.float(), (_code("exp_avg", grad), _code("exp_avg_sq", grad))
        with ordered_on_default_stream(grad.device):
            functional.optimizer_update_8bit_blockwise(
                "adam",
                g=grad,
                p=scratch,
                state1=parts[0],
                state2=parts[1],
                beta1=betas[0],
                beta2=betas[1],
                beta3=0.0,
                alpha=0.0,
                eps=eps,
                step=step.count,
                lr=1.0,
                qmap1=codes[0],
                qmap2=codes[1],
                absmax1=parts[2],
                absmax2=parts[3],
            )
        for name, part in zip(names, parts, strict=True):
            step.store(state[name], part)
        return scratch


@contextmanager
def ordered_on_default_stream(device: torch.device) -> Iterator[None]:
    """Runs CUDA's default stream behind the current stream, and the current stream behind what is launched meanwhile.

    bitsandbytes' `quantize_blockwise` and `optimizer_update_8bit_blockwise` take no stream and launch on the default
    one (its csrc/ops.cu), which torch's other streams do not wait for. FSDP2 calls the hooks of layerwise updates on a
    stream of its own. Without both waits, moments are computed from gradients that are not there yet, in silence.
    """
    streams = current_and_default_stream(device)
    if streams is None:
        yield
        return
    current, default = streams
    default.wait_stream(current)
    yield
    current.wait_stream(default)


def current_and_default_stream(device: torch.device) -> tuple[Any, Any] | None:
    """The current and the default CUDA stream of ``device``; None where they are one, or there are none."""
    if device.type != "cuda":
        return None
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    return None if current == default else (current, default)


@cache
def _code_values(signed: bool) -> list[float]:
    from bitsandbytes import functional

    return [float(value) for value in functional.create_dynamic_map(signed=signed).tolist()]


def _code(name: str, like: Tensor) -> Tensor:
    """The 256 values that a byte of the moment ``name`` stands for, in units of its block's scale."""
    signed = not name.endswith("_sq")
    if type(like) is not Tensor or like.is_meta:  # a fake tensor must not outlive its mode
        return torch.tensor(_code_values(signed), device=like.device)
    if (like.device, signed) not in _codes:
        _codes[like.device, signed] = torch.tensor(_code_values(signed), device=like.device)
    return _codes[like.device, signed]
