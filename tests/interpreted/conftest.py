"""What tests under Triton's interpreter share."""

import pytest

from galore_pretrain.tensors import fused


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Adam's kernel 4096 elements a program: the interpreter takes some 35 ms for one, whatever its size.

    Tests by value, in test_fused.py, leave it at what a GPU gets.
    """
    monkeypatch.setattr(fused, "_BLOCKS", 16)
