"""Bases in 8 and 4 bits: what rounding costs, that they go through an optimizer as dense ones, and what is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from galore_pretrain.optim import GaLore, RuleOptimizer
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.bases import basis_shape, empty_basis, read_basis, write_basis
from galore_pretrain.optim.projector import random_basis
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.packing import GROUP, Packed

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def packed(matrix: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Packed:
    rows, columns = matrix.shape
    return Packed.empty(torch.empty(0, dtype=dtype), rows, columns, bits).written(matrix)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from(DTYPES),
    shift=st.sampled_from([0.0, 3.0, -3.0, 1000.0]),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]),
    seed=st.integers(0, 1000),
)
def test_an_element_comes_back_within_a_step(
    rows: int, columns: int, bits: int, dtype: torch.dtype, shift: float, size: float, seed: int
) -> None:
    """Groups of one sign included. Half a step is from rounding to a code, half from the zero, which cuts off an end
    of the range. In bf16, its own rounding and that of the scale come on top: 2⁻⁹ of a number, and of the range."""
    generator = torch.Generator().manual_seed(seed)
    matrix = (torch.randn(rows, columns, generator=generator) + shift) * size
    held = packed(matrix, bits, dtype)
    assert held.bits == bits
    flat = torch.nn.functional.pad(matrix.flatten(), (0, -matrix.numel() % GROUP)).view(-1, GROUP)
    span = flat.amax(1).clamp(min=0) - flat.amin(1).clamp(max=0)
    room = span / (2**bits - 1) * 1.001
    if dtype == torch.bfloat16:
        room = room + span * 2**-8
    allowed = room.repeat_interleave(GROUP)[: matrix.numel()].view(rows, columns)
    read = held.read()
    assert read.dtype == dtype
    assert ((read.float() - matrix).abs() <= allowed).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_a_constant_group_and_zeros_stay_what_they_are(bits: int, value: float) -> None:
    assert (packed(torch.full((3, 300), value), bits).read() == value).all()
    mixed = torch.linspace(-1, 1, 256).view(1, 256)
    mixed[0, ::3] = 0
    assert (packed(mixed, bits).read()[0, ::3] == 0).all()


def test_two_codes_of_four_bits_share_a_byte() -> None:
    sizes = {store: empty_basis("b", torch.empty(0).bfloat16(), 512, 128, store) for store in ("dense", "int8", "int4")}
    held = {store: sum(value.nbytes for value in state.values()) for store, state in sizes.items()}
    elements, groups = 512 * 128, 512 * 128 // 256
    assert held == {"dense": 2 * elements, "int8": elements + 3 * groups, "int4": elements // 2 + 3 * groups}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("store", "off"), [("dense", 1e-5), ("int8", 2e-2), ("int4", 0.1)])
def test_a_rounded_basis_is_nearly_orthonormal(side: Any, store: str, off: float) -> None:
    """The largest entry of PᵀP − I is below that. In 4 bits vectors are too long by a hundredth in the mean."""
    shape = (768, 96) if side == "left" else (96, 768)
    state = empty_basis("b", torch.empty(0), *shape, store)
    write_basis(state, "b", random_basis(shape, side, 3, CPU), Step(1))
    basis = read_basis(state, "b")
    assert basis is not None
    if side == "right":
        basis = basis.T
    gram = basis.T @ basis
    assert (gram - torch.eye(96)).abs().max() < off
    assert 0.99 < gram.diagonal().mean() < 1.02


@settings(deadline=None, max_examples=30)
@given(m=st.integers(1, 25), n=st.integers(1, 25), store=st.sampled_from(["int8", "int4"]))
def test_a_state_says_the_shape_of_its_basis(m: int, n: int, store: str) -> None:
    """Odd ones too, of which the last byte has one code."""
    state = empty_basis("b", torch.empty(0), m, n, store)
    assert basis_shape(state, "b") == (m, n)
    assert basis_shape(state, "another") is None
    matrix = torch.arange(m * n).view(m, n).float()
    write_basis(state, "b", matrix, Step(1))
    read = read_basis(state, "b")
    assert read is not None
    assert read.shape == (m, n)
    write_basis(state, "b", torch.zeros(m, n), Step(1, valid=torch.tensor(False)))
    again = read_basis(state, "b")
    assert again is not None
    assert torch.equal(again, read)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_is_that_of_the_rounded_basis(proj_type: str, dtype: torch.dtype) -> None:
    """A dense rule that is given the rounded bases makes the same updates to the bit, until the next refresh."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(24, 37, generator=generator).to(dtype) for _ in range(5)]
    weights = []
    for store in ("int4", "dense"):
        p = torch.nn.Parameter(torch.zeros(24, 37, dtype=dtype))
        rule = GaLore(Adam(), rank=6, update_proj_gap=100, proj_type=proj_type, refresh="together", basis_store=store)
        optimizer = RuleOptimizer([{"params": [p], "rule": rule}], lr=0.1)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
            if store == "int4":
                bases = rule.bases(optimizer.tensors(p))
            elif gradient is gradients[0]:
                with torch.no_grad():
                    p.copy_(weights[0][0])
                    for held, rounded in zip(rule.bases(optimizer.tensors(p)), bases, strict=True):
                        if held is not None and rounded is not None:
                            held.copy_(rounded)
            weights.append([p.detach().clone()])
    with_codes, dense = weights[:5], weights[5:]
    # The moments of the first update are those of the basis before it was rounded, by the dense rule.
    for ours, theirs in zip(with_codes[1:], dense[1:], strict=True):
        assert torch.allclose(ours[0].float(), theirs[0].float(), atol=0.05)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"basis_store": "int2"}, "basis_store 'int2' is unknown; choose from dense, int8, int4"),
        ({"basis_store": "int4", "basis": "tracked"}, "far larger than the turns of a tracked one"),
        ({"basis_store": "int8", "published": True}, "is not the published code's"),
    ],
)
def test_what_cannot_be_kept_so_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        GaLore(Adam(), **options)
