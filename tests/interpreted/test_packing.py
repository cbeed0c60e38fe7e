"""A basis in 4 or 8 bits, read by a kernel: the same numbers to the bit, by one operation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_pretrain.optim.bases import empty_basis, read_basis, write_basis
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.capability import runs_on
from galore_pretrain.tensors.packing import Packed


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_a_kernel_reads_what_single_operations_do(
    rows: int, columns: int, bits: int, dtype: torch.dtype, seed: int
) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed = Packed.empty(torch.empty(0, dtype=dtype), rows, columns, bits).written(matrix)
    assert torch.equal(packed.read(by_kernel=True), packed.read())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_read_as_such(value: float) -> None:
    packed = Packed.empty(torch.empty(0), 2, 300, 4).written(torch.ones(2, 300))
    packed.scales[1] = value
    by_kernel = packed.read(by_kernel=True)
    assert torch.equal(by_kernel.isfinite(), packed.read().isfinite())
    assert not by_kernel.isfinite().all()


def test_a_basis_is_read_by_the_kernel_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_on(torch.device("cpu"))
    state = empty_basis("b", torch.empty(0), 3, 5, "int4")
    write_basis(state, "b", torch.ones(3, 5), Step(1))
    asked = []
    monkeypatch.setattr(Packed, "read", lambda self, *, by_kernel=False: asked.append(by_kernel))
    read_basis(state, "b")
    assert asked == [True]
