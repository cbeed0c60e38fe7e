"""Where kernels run, and what is said where they do not; and which sums a launch takes. Stand-ins take their place."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_pretrain.check import kernels as checked
from galore_pretrain.check.part import Part, Settings
from galore_pretrain.optim import sums
from galore_pretrain.optim.sums import Sums
from galore_pretrain.tensors import capability
from galore_pretrain.tensors.values import HostCopy

WRONG = "a small update came out wrong"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """A machine with GPUs, on the second of which no kernel runs; return of which the trial was made."""
    tried: list[torch.device] = []

    def small_updates_are_right(device: torch.device) -> bool:
        tried.append(device)
        if device.index == 2:
            raise ImportError("No module named 'triton'\nand more")
        return device.index != 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(capability, "small_updates_are_right", small_updates_are_right)
    capability._why_not_on_cuda.cache_clear()
    yield tried
    capability._why_not_on_cuda.cache_clear()


def test_each_gpu_is_tried_once(asked: list[torch.device]) -> None:
    for _ in range(2):
        assert [capability.runs_on(torch.device("cuda", index)) for index in range(3)] == [True, False, False]
        assert capability.runs_on(torch.device("cuda"))
    assert asked == [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 2), torch.device("cuda")]


@pytest.mark.parametrize(("index", "why"), [(1, WRONG), (2, "No module named 'triton'")])
def test_why_kernels_do_not_run_is_said_with_what_helps(
    index: int, why: str, asked: list[torch.device], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "galore_pretrain"):
        assert not capability.runs_on(torch.device("cuda", index))
    (record,) = caplog.records
    assert f"do not run here ({why})" in record.getMessage()
    assert "install galore-pretrain[kernels] and a C compiler" in record.getMessage()
    part = Part(Settings(f"cuda:{index}", "sample", "sample", str(tmp_path)), tmp_path / "found.jsonl", 600)
    part.__dict__["device"] = torch.device("cuda", index)  # which this machine has not
    checked.kernels(part)
    (check,) = part.found.checks
    assert (check.ok, check.measured) == (False, why)
    assert "galore-pretrain[kernels]" in check.bound


def pending(grad: Tensor) -> Any:
    step = SimpleNamespace(bits=None)
    return SimpleNamespace(grad=grad, step=step, host=None, known_finite=None, own_norm=None)


def test_one_launch_adds_to_a_sum_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs have no order. A hook comes twice where a backward pass was not begun."""
    launches: list[list[int]] = []
    monkeypatch.setattr(sums, "add_all_", lambda totals, parts, seeds: launches.append([id(t) for t in totals]))
    waiting = Sums()
    one, other = pending(torch.zeros(3)), pending(torch.zeros(4))
    for total in (one, other, one, one):
        waiting.add(total, pending(torch.ones(total.grad.shape)), "sum 2")
    waiting.flush()
    assert launches == [[id(one.grad), id(other.grad)], [id(one.grad)], [id(one.grad)]]


def test_numbers_come_to_the_host_whatever_device_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    empty = torch.empty

    def unpinned(*shape: Any, pin_memory: bool, **options: Any) -> Tensor:
        assert pin_memory
        made.append(empty(*shape, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", unpinned)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    source = torch.tensor([1.0, 2.0])
    with torch.device("meta"):
        copy = HostCopy(source)
    assert made[0].device.type == "cpu"
    assert copy.tolist() == [1.0, 2.0]
