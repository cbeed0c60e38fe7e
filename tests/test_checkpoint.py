"""Checkpoints: complete or absent, in place, and refused when they are of something else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from galore_pretrain import checkpoint
from galore_pretrain.errors import InputError
from galore_pretrain.optim import REGISTRY, build_optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", REGISTRY)
def test_tensors_come_back_bitwise_in_their_dtypes(
    row: str, dtype: torch.dtype, build_tiny: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    options = {"rank": 4} if "galore" in row else {}
    model, other = build_tiny(dtype=dtype, seed=1), build_tiny(dtype=dtype, seed=2)
    optimizer, fresh = (build_optimizer(m, row, lr=0.1, **options) for m in (model, other))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved, restored = checkpoint.named_tensors(model, optimizer), checkpoint.named_tensors(other, fresh)
    checkpoint.save(tmp_path / "step_00000001", saved, {"config": {}, "counts": checkpoint.named_counts(optimizer)})
    state = checkpoint.load(tmp_path / "step_00000001", restored)
    checkpoint.restore_counts(fresh, state["counts"])
    assert saved.keys() == restored.keys()
    for name in saved:
        assert saved[name].dtype == restored[name].dtype
        assert torch.equal(saved[name], restored[name]), name
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), "loading must fill the live weights"
        assert fresh.state[q]["step"] == 1
    assert {f.suffix for f in (tmp_path / "step_00000001").iterdir()} == {".safetensors", ".json"}


def test_large_state_is_split_over_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("galore_pretrain.checkpoint._FILE_BYTES", 100)
    tensors = {f"model.{i}": torch.full((20,), float(i)) for i in range(5)}
    checkpoint.save(tmp_path / "step_00000001", tensors, {"config": {}})
    assert len(list((tmp_path / "step_00000001").glob("*.safetensors"))) == 5
    empty = {name: torch.zeros(20) for name in tensors}
    checkpoint.load(tmp_path / "step_00000001", empty)
    assert all(torch.equal(empty[name], tensors[name]) for name in tensors)


def test_halves_are_never_the_latest_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        checkpoint.save(checkpoint.folder_of(tmp_path, step), {"a": torch.ones(1)}, {"config": {}})
    (tmp_path / "step_00000012.partial").mkdir()
    (tmp_path / "step_00000014").mkdir()  # without a state: somebody else's
    latest = checkpoint.latest(tmp_path)
    assert latest is not None
    assert latest.name == "step_00000010"
    (tmp_path / "step_00000014").rmdir()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step_00000004", "step_00000010"]
    assert checkpoint.latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"a": torch.zeros(3), "b": torch.zeros(2)}, "a is"),
        ({"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(2)}, "a is"),
        ({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(1)}, "c is missing"),
        ({"a": torch.zeros(2)}, "this run's is missing"),
    ],
)
def test_another_models_checkpoint_is_refused(tensors: dict[str, torch.Tensor], named: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "step_00000001", {"a": torch.ones(2), "b": torch.ones(2)}, {"config": {}})
    with pytest.raises(InputError, match=named):
        checkpoint.load(tmp_path / "step_00000001", tensors)


def test_a_checkpoint_of_another_device_loads(tmp_path: Path) -> None:
    """A GPU's random state is saved where there is a GPU, and missed nowhere."""
    with_gpu = {"a": torch.ones(2), "random.cpu": torch.ones(3), "random.cuda": torch.ones(4)}
    without = {"a": torch.zeros(2), "random.cpu": torch.zeros(3)}
    checkpoint.save(tmp_path / "step_00000001", with_gpu, {"config": {}})
    checkpoint.load(tmp_path / "step_00000001", without)
    assert without["a"].sum() == 2
    checkpoint.save(tmp_path / "step_00000002", without, {"config": {}})
    checkpoint.load(tmp_path / "step_00000002", with_gpu)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    for content in (None, "{", "", "{}", "[]"):
        if content is not None:
            (tmp_path / "state.json").write_text(content)
        with pytest.raises(InputError, match="not a checkpoint"):
            checkpoint.read_state(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"config": {}}))
    assert checkpoint.read_state(tmp_path) == {"config": {}}
