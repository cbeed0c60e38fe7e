"""The check of a machine, where kernels run: what it says of right ones and of wrong ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_pretrain.check import kernels
from galore_pretrain.check.part import Part, Settings
from galore_pretrain.optim import METHODS, adam
from galore_pretrain.tensors import fused

pytestmark = pytest.mark.usefixtures("few_programs")


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_kernel_that_is_a_hundredth_off_is_found(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = adam._numbers

    def numbers(*arguments: Any) -> fused.AdamNumbers:
        found = right(*arguments)
        return replace(found, factor=factor * found.factor)

    monkeypatch.setattr(adam, "_numbers", numbers)
    monkeypatch.setattr(kernels, "_UPDATES", 1)
    monkeypatch.setattr(kernels, "rows", lambda _: [METHODS["adamw"]])
    part = Part(Settings("cpu", "sample", "sample", str(tmp_path)), tmp_path / "found.jsonl", 600)
    kernels.kernels(part)
    assert [check.ok for check in part.found.checks] == [True, factor == 1]


def test_a_direction_that_is_no_number_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one update of four; what comes after it is right."""
    direction = kernels._Moments.direction

    def broken(self: kernels._Moments, gradient: Tensor, count: int) -> Tensor:
        found = direction(self, gradient, count)
        return torch.full_like(found, torch.nan) if self.by_kernels and count == 2 else found

    monkeypatch.setattr(kernels, "_MOMENTS_ON_CPU", 512)
    for is_broken in (False, True):
        part = Part(Settings("cpu", "sample", "sample", str(tmp_path)), tmp_path / "found.jsonl", 600)
        if is_broken:
            monkeypatch.setattr(kernels._Moments, "direction", broken)
        kernels.eight_bit(part)
        found = {check.name: check for check in part.found.checks}
        check = found["our kernel: 8-bit directions against single operations"]
        assert check.ok is not is_broken
        assert (check.measured == "nan") is is_broken
