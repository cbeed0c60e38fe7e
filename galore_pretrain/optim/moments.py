"""Keeps moments between two updates: one axis of a method, independent of the rule that uses it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.fused import BLOCK, Moment
from galore_pretrain.tensors.shards import Shard

State = dict[str, Tensor]
_SMALL = 4096  # elements below which bitsandbytes keeps a moment in fp32
_codes: dict[tuple[torch.device, bool], Tensor] = {}


class MomentStore(Protocol):
    """Keeps one moment of a parameter under ``name`` in that parameter's state."""

    def zeros(self, name: str, like: Tensor, shard: Shard | None = None) -> State:
        """Return entries of ``state`` that hold a moment of zeros of ``like``'s shape, on its device.

        Entries whose bytes are all zero stand for a moment of zeros, so zeroing them begins a moment anew.
        ``shard``: the part of a tensor that ``like`` is; None means that it is all of it.
        """
        ...

    def read(self, state: State, name: str, step: Step) -> Tensor:
        """Return the moment in the dtype that the rule computes in.

        It may be changed in place, if ``write`` follows.
        """
        ...

    def write(self, state: State, name: str, value: Tensor, step: Step) -> None:
        """Keep ``value``, which may be overwritten."""
        ...

    def restore(self, state: State, name: str, value: Tensor) -> None:
        """Keep a ``value`` that `read` has returned, fp32 and contiguous, so that it returns the same again."""
        ...

    def narrow(self, state: State, name: str, start: int, stop: int) -> State:
        """Return views of the entries that hold the elements ``start:stop`` of the flattened moment.

        Both are multiples of 256, unless ``stop`` is the end.
        """
        ...

    is_dense: ClassVar[bool]
    """Whether a moment is one tensor of its own shape."""

    @property
    def computes_in_fp32(self) -> bool:
        """Return whether what `read` returns, and the rule computes with, is fp32."""
        ...

    def entries(self, state: State, name: str) -> tuple[str, ...]:
        """Return the names of the entries of ``state`` that hold the moment."""
        ...

    def in_blocks(self, state: State, name: str) -> bool:
        """Return whether elements of the moment share a scale, so that its bytes cannot be cut anywhere."""
        ...

    def for_kernel(self, state: State, name: str) -> Moment:
        """Return the moment as kernels of our own take it."""
        ...

    def fused_adam(
        self,
        grad: Tensor,
        state: State,
        step: Step,
        betas: tuple[float, float],
        eps: float,
        *,
        always: bool = False,
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

    @property
    def computes_in_fp32(self) -> bool:
        """Return whether arithmetic is in fp32, whatever the moment's dtype."""
        return self.rounding != "nearest"

    def zeros(self, name: str, like: Tensor, shard: Shard | None = None) -> State:
        """Return one contiguous tensor of zeros, in the shape and dtype of ``like``."""
        return {name: torch.zeros_like(like, memory_format=torch.contiguous_format)}

    def read(self, state: State, name: str, step: Step) -> Tensor:
        """Return the moment in fp32, or in its own dtype where arithmetic is in that."""
        if self.rounding == "nearest":
            return step.working_copy(state[name])
        return step.working_copy(state[name], torch.float32)

    def write(self, state: State, name: str, value: Tensor, step: Step) -> None:
        """Keep ``value``, rounded with the random bits of the stream ``name`` where it is fp32 and the moment bf16."""
        step.store(state[name], value, stream=name)

    def restore(self, state: State, name: str, value: Tensor) -> None:
        """Keep ``value`` in the moment's dtype, which it came from."""
        state[name].copy_(value)

    def narrow(self, state: State, name: str, start: int, stop: int) -> State:
        """Return a view of the elements ``start:stop``; a dense moment can be cut anywhere."""
        flat = state[name].view(-1)
        return {name: flat[start:stop]}

    def entries(self, state: State, name: str) -> tuple[str, ...]:
        """Return the one name."""
        return (name,)

    def in_blocks(self, state: State, name: str) -> bool:
        """No elements share a scale."""
        return False

    def for_kernel(self, state: State, name: str) -> Moment:
        """Return the values."""
        return Moment(state[name])

    def fused_adam(
        self,
        grad: Tensor,
        state: State,
        step: Step,
        betas: tuple[float, float],
        eps: float,
        *,
        always: bool = False,
    ) -> Tensor | None:
        """Return None: torch's kernel for dense moments is called by the rule itself."""
        return None


@dataclass(frozen=True)
class Blockwise8bit:
    """A byte an element and an fp32 scale a block of 256, by bitsandbytes (arXiv 2110.02861, §2: dynamic quantization).

    Moments named ``…_sq`` are not negative and use the unsigned map. A moment of fewer than 4096 elements stays a
    dense fp32 tensor, as in bitsandbytes' own optimizers. Where processes share a moment out, blocks begin anew with
    each part.
    """

    is_dense: ClassVar[bool] = False
    computes_in_fp32: ClassVar[bool] = True

    def zeros(self, name: str, like: Tensor, shard: Shard | None = None) -> State:
        """Return bytes of ``like``'s shape and fp32 scales, one a block; of a small moment one fp32 tensor."""
        shape = like.shape if shard is None else shard.shape
        if math.prod(shape) < _SMALL:
            return {name: torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)}
        # The map is made here, since a step of fake tensors cannot look at values.
        _code_values(signed=not name.endswith("_sq"))
        blocks = -(-like.numel() // BLOCK)
        return {
            name: torch.zeros_like(like, dtype=torch.uint8, memory_format=torch.contiguous_format),
            f"{name}_absmax": like.new_zeros(blocks, dtype=torch.float32),
        }

    # Dynamic quantization (arXiv 2110.02861, §2): element i of block b is scale[b] · code[byte[i]]. The code has 256
    # values in [−1, 1] (unsigned: [0, 1]), dense near 0 on a scale of powers of ten, for moments of one block differ by
    # orders of magnitude. A block's scale is the largest magnitude in it, so an outlier costs only its 256 neighbours.
    def read(self, state: State, name: str, step: Step) -> Tensor:
        """Return the moment in fp32, dequantized from its bytes and scales."""
        moment = state[name]
        scale = state.get(f"{name}_absmax")
        if scale is None:
            return step.working_copy(moment)
        from bitsandbytes import functional

        values = functional.dequantize_blockwise(
            moment,
            absmax=scale,
            code=_code(name, moment),
            blocksize=BLOCK,
        )
        return torch.as_tensor(values)

    def write(self, state: State, name: str, value: Tensor, step: Step) -> None:
        """Keep ``value`` in new scales, and in the bytes of the nearest values of the code."""
        if f"{name}_absmax" not in state:
            step.store(state[name], value)
            return
        from bitsandbytes import functional

        code = _code(name, state[name])
        with ordered_on_default_stream(value.device):
            quantized, how = functional.quantize_blockwise(value, code=code, blocksize=BLOCK)
        step.store(state[name], quantized)
        step.store(state[f"{name}_absmax"], how.absmax)

    # `write` takes a block's largest magnitude for its scale. What it keeps can be less: the signed code has no −1, so
    # a largest magnitude that is negative is read back as 0.993 of itself. Written again, the block would get that for
    # its scale, and all of its values would move, whenever a state is saved and loaded. Here the scale is found that
    # they were read with.
    def restore(self, state: State, name: str, value: Tensor) -> None:
        """Keep ``value`` in the bytes and scales that it was read from, where blocks begin in the same places."""
        scale = state.get(f"{name}_absmax")
        if scale is None:
            state[name].copy_(value)
            return
        code = _code(name, value)
        middles = (code[1:] + code[:-1]) / 2
        flat_value = value.view(-1)
        flat_bytes = state[name].view(-1)
        for start, stop in chunks(flat_value, flat_value.numel(), chunk_elements(value.device)):
            part = flat_value[start:stop]
            padding = -part.numel() % BLOCK
            blocks = torch.nn.functional.pad(part, (0, padding)).view(-1, BLOCK)
            new_bytes, new_scale = _requantized(blocks, code, middles)
            flat_bytes[start:stop] = new_bytes.view(-1)[: part.numel()]
            first_block = start // BLOCK
            scale[first_block : first_block + len(blocks)] = new_scale

    def narrow(self, state: State, name: str, start: int, stop: int) -> State:
        """Return views of the bytes ``start:stop`` and of the scales of their blocks."""
        flat = state[name].view(-1)
        part = {name: flat[start:stop]}
        scale = state.get(f"{name}_absmax")
        if scale is not None:
            first_block = start // BLOCK
            end_block = -(-stop // BLOCK)
            part[f"{name}_absmax"] = scale[first_block:end_block]
        return part

    def entries(self, state: State, name: str) -> tuple[str, ...]:
        """Return the names of the bytes and the scales; of a small moment, its one name."""
        return tuple(entry for entry in (name, f"{name}_absmax") if entry in state)

    def in_blocks(self, state: State, name: str) -> bool:
        """Return whether the moment is large enough to be kept in blocks that share a scale."""
        return f"{name}_absmax" in state

    def for_kernel(self, state: State, name: str) -> Moment:
        """Return the bytes, scales and code; of a small moment, its values."""
        if not self.in_blocks(state, name):
            return Moment(state[name])
        return Moment(state[name], state[f"{name}_absmax"], _code(name, state[name]))

    def fused_adam(
        self,
        grad: Tensor,
        state: State,
        step: Step,
        betas: tuple[float, float],
        eps: float,
        *,
        always: bool = False,
    ) -> Tensor | None:
        """Return Adam's direction × −1 by bitsandbytes' kernel, which updates both moments in the same pass.

        Return None where the composed rule is as good or the kernel does not apply: on a CPU it is the same sequence of
        operations (``always`` runs it there too), and small moments are dense.
        """
        names = ["exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"]
        if not grad.is_cuda and not always:
            return None
        if "exp_avg_absmax" not in state or not grad.numel():
            return None
        from bitsandbytes import functional

        parts = [step.working_copy(state[name]) for name in names]
        moment1, moment2, scale1, scale2 = parts
        scratch = torch.zeros_like(grad, dtype=torch.float32)
        grad = grad.float()
        code1 = _code("exp_avg", grad)
        code2 = _code("exp_avg_sq", grad)
        # The kernel updates a weight. One of 0, at the rate 1, becomes the direction with its sign turned. `beta3` and
        # `alpha` belong to another optimizer of the same kernel (AdEMAMix).
        with ordered_on_default_stream(grad.device):
            functional.optimizer_update_8bit_blockwise(
                "adam",
                g=grad,
                p=scratch,
                state1=moment1,
                state2=moment2,
                beta1=betas[0],
                beta2=betas[1],
                beta3=0.0,
                alpha=0.0,
                eps=eps,
                step=step.count,
                lr=1.0,
                qmap1=code1,
                qmap2=code2,
                absmax1=scale1,
                absmax2=scale2,
            )
        for name, part in zip(names, parts, strict=True):
            step.store(state[name], part)
        return scratch


# Let s be the scale, and c = 0.993 the magnitude of the signed code's first value. If a value has the byte of 1, it is
# s, and larger than any negative one, which is −c · s at most. Otherwise the largest magnitude was negative: it is
# −c · s, and no positive one is larger. Dividing by c may be off by a last bit, so the neighbours are tried too.
def _requantized(blocks: Tensor, code: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
    """Return bytes (blocks × 256) and scales (blocks) that ``blocks`` (fp32, blocks × 256) were read from."""
    scale = blocks.amax(1)
    if code[0] < 0:
        negative = -blocks.amin(1)
        scale = torch.where(scale > negative, scale, negative / -code[0])
    divisor = torch.where(scale > 0, scale, 1.0)
    normalized = blocks / divisor[:, None]
    new_bytes = torch.bucketize(normalized, middles, out_int32=True)
    values = code[new_bytes]
    up = torch.full_like(scale, torch.inf)
    for neighbour in (torch.nextafter(scale, -up), torch.nextafter(scale, up), scale):
        is_same = (values * neighbour[:, None] == blocks).all(1)
        scale = torch.where(is_same, neighbour, scale)
    return new_bytes.to(torch.uint8), scale


# bitsandbytes' `quantize_blockwise` and `optimizer_update_8bit_blockwise` take no stream and launch on the default one
# (its csrc/ops.cu), which torch's other streams do not wait for. FSDP2 calls the hooks of layerwise updates on a stream
# of its own. Without both waits, moments are computed from gradients that are not there yet, in silence.
@contextmanager
def ordered_on_default_stream(device: torch.device) -> Iterator[None]:
    """Let CUDA's default stream wait for the current one on entry, and the current one for the default one on exit.

    Nothing happens where the current stream is the default one, or the device has no streams.
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
    """Return the current and the default CUDA stream of ``device``; None where they are one, or there are none."""
    if device.type != "cuda":
        return None
    current = torch.cuda.current_stream(device)
    default = torch.cuda.default_stream(device)
    if current == default:
        return None
    return current, default


@cache
def _code_values(*, signed: bool) -> list[float]:
    """Return the 256 values of bitsandbytes' dynamic map, in [−1, 1], or in [0, 1] where not signed."""
    from bitsandbytes import functional

    code = functional.create_dynamic_map(signed=signed)
    return [float(value) for value in code.tolist()]


def _code(name: str, like: Tensor) -> Tensor:
    """Return the 256 values that a byte of the moment ``name`` stands for, in units of its block's scale."""
    signed = not name.endswith("_sq")
    if type(like) is not Tensor or like.is_meta:
        # It is made anew, and not kept: a fake tensor must not outlive its mode.
        return torch.tensor(_code_values(signed=signed), device=like.device)
    key = like.device, signed
    if key not in _codes:
        _codes[key] = torch.tensor(_code_values(signed=signed), device=like.device)
    return _codes[key]
