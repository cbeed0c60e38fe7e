"""Checkpoints: complete or absent, in place, and refused when they are of something else."""

import contextlib
import io
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from galore_pretrain.errors import InputError
from galore_pretrain.meters import ran_out
from galore_pretrain.optim import REGISTRY, build_optimizer
from galore_pretrain.rundir import checkpoint
from galore_pretrain.rundir.checkpoint import DamagedError
from prescribed import meant_for
from runs import python

STATE: dict[str, Any] = {"config": {}, "trainer": {}, "counts": {}}


@pytest.mark.parametrize("numerics", ["sound", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", REGISTRY)
def test_tensors_come_back_bitwise_in_their_dtypes(
    row: str, dtype: torch.dtype, numerics: str, build_tiny: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"numerics": numerics} | meant_for(row, rank=4)
    model, other = build_tiny(dtype=dtype, seed=1), build_tiny(dtype=dtype, seed=2)
    optimizer, fresh = (build_optimizer(m, row, lr=0.1, **options) for m in (model, other))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved, restored = checkpoint.named_tensors(model, optimizer), checkpoint.named_tensors(other, fresh)
    checkpoint.save(tmp_path / "step_00000001", saved, STATE | {"counts": checkpoint.named_counts(optimizer)})
    found = checkpoint.opened(tmp_path / "step_00000001")
    found.load(restored)
    checkpoint.restore_counts(fresh, found.state["counts"])
    assert saved.keys() == restored.keys()
    for name in saved:
        assert saved[name].dtype == restored[name].dtype
        assert torch.equal(saved[name], restored[name]), name
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), "loading must fill the live weights"
        assert fresh.state[q]["step"] == 1
    assert {f.suffix for f in (tmp_path / "step_00000001").iterdir()} == {".safetensors", ".json"}


def test_large_state_is_split_over_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("galore_pretrain.rundir.checkpoint._FILE_BYTES", 100)
    tensors = {f"model.{i}": torch.full((20,), float(i)) for i in range(5)}
    checkpoint.save(tmp_path / "step_00000001", tensors, STATE)
    assert len(list((tmp_path / "step_00000001").glob("*.safetensors"))) == 5
    empty = {name: torch.zeros(20) for name in tensors}
    checkpoint.opened(tmp_path / "step_00000001").load(empty)
    assert all(torch.equal(empty[name], tensors[name]) for name in tensors)


def test_halves_are_never_the_latest_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        checkpoint.save(checkpoint.folder_of(tmp_path, step), {"a": torch.ones(1)}, STATE)
    (tmp_path / "step_00000012.partial").mkdir()
    newest = checkpoint.newest(tmp_path, set_aside=True)
    assert newest is not None
    assert newest.folder.name == "step_00000010"
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step_00000004", "step_00000010"]
    assert checkpoint.newest(tmp_path / "nowhere", set_aside=True) is None


def test_those_of_every_so_many_updates_stay(tmp_path: Path) -> None:
    for step in range(5, 45, 5):
        checkpoint.save(checkpoint.folder_of(tmp_path, step), {"a": torch.ones(1)}, STATE)
        checkpoint.prune(tmp_path, keep=1, keep_every=20)
    assert sorted(int(f.name[5:]) for f in tmp_path.iterdir()) == [20, 40]
    checkpoint.save(checkpoint.folder_of(tmp_path, 45), {"a": torch.ones(1)}, STATE)
    checkpoint.prune(tmp_path, keep=1, keep_every=20)
    assert sorted(int(f.name[5:]) for f in tmp_path.iterdir()) == [20, 40, 45]


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
    checkpoint.save(tmp_path / "step_00000001", {"a": torch.ones(2), "b": torch.ones(2)}, STATE)
    with pytest.raises(InputError, match=named):
        checkpoint.opened(tmp_path / "step_00000001").load(tensors)


def test_a_checkpoint_of_another_device_loads(tmp_path: Path) -> None:
    """A GPU's random state is saved where there is a GPU, and missed nowhere."""
    with_gpu = {"a": torch.ones(2), "random.cpu": torch.ones(3), "random.cuda": torch.ones(4)}
    without = {"a": torch.zeros(2), "random.cpu": torch.zeros(3)}
    checkpoint.save(tmp_path / "step_00000001", with_gpu, STATE)
    checkpoint.opened(tmp_path / "step_00000001").load(without)
    assert without["a"].sum() == 2
    checkpoint.save(tmp_path / "step_00000002", without, STATE)
    checkpoint.opened(tmp_path / "step_00000002").load(with_gpu)


def seal(folder: Path) -> None:
    """Checksums that fit what is there."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "checksums.json"]
    (folder / "checksums.json").write_text(json.dumps(checkpoint._checksums(folder, files)))


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"checksums\.json is absent"):
        checkpoint.opened(tmp_path)
    for content in ("{", "", "{}", "[]", '{"config": {}, "trainer": [], "counts": {}}', "[" * 200_000):
        (tmp_path / "state.json").write_text(content)
        seal(tmp_path)
        with pytest.raises(DamagedError, match=str(tmp_path)):
            checkpoint.opened(tmp_path)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints of several files."""
    root = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        tensors = {f"model.{i}": torch.randn(40, generator=torch.Generator().manual_seed(i)) for i in range(6)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("galore_pretrain.rundir.checkpoint._FILE_BYTES", 400)
            checkpoint.save(checkpoint.folder_of(root, step), tensors, STATE | {"step": step})
    return root


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_checkpoint_never_loads_silently_wrong(two: Path, data: st.DataObject) -> None:
    """Of cut, changed, grown, emptied, lost, added or exchanged files, none is read: the one before is taken."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "checkpoints"
        shutil.copytree(two, root)
        newest = root / "step_00000002"
        files = sorted(newest.iterdir())
        file = data.draw(st.sampled_from(files))
        content = file.read_bytes()
        place = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "grow", "zero", "remove", "add", "exchange"]))
        written = {
            "flip": content[:place]
            + bytes([content[place] ^ 1 << data.draw(st.integers(0, 7))])
            + content[place + 1 :],
            "cut": content[:place],
            "grow": content + content[place:],
            "zero": content[:place] + bytes(len(content) - place),
        }
        if how in written:
            file.write_bytes(written[how])
        elif how == "remove":
            file.unlink()
        elif how == "add":
            (newest / data.draw(st.sampled_from(["a.safetensors", "model-00001.safetensors"]))).write_bytes(content)
        else:
            other = data.draw(st.sampled_from(files))
            theirs = other.read_bytes()
            other.write_bytes(content)
            file.write_bytes(theirs)
        as_it_was = _contents(newest) == _contents(two / "step_00000002")
        found = checkpoint.newest(root, set_aside=True)
        assert found is not None
        assert found.state["step"] == (2 if as_it_was else 1)
        assert (root / "step_00000002.damaged").exists() != as_it_was
        checkpoint.prune(root, keep=1)
        assert checkpoint.newest(root, set_aside=True) == found
        tensors = {f"model.{i}": torch.zeros(40) for i in range(6)}
        found.load(tensors)
        for i in range(6):
            assert torch.equal(tensors[f"model.{i}"], torch.randn(40, generator=torch.Generator().manual_seed(i)))


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_damaged_checkpoint_is_set_aside_with_one_line(
    two: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(two, root)
    file = sorted((root / "step_00000002").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert checkpoint.newest(root, set_aside=False).folder.name == "step_00000001"  # type: ignore[union-attr]
    assert (root / "step_00000002").is_dir()
    caplog.clear()
    assert checkpoint.newest(root, set_aside=True).folder.name == "step_00000001"  # type: ignore[union-attr]
    assert [f.name for f in sorted(root.iterdir())] == ["step_00000001", "step_00000002.damaged"]
    (record,) = caplog.records
    for words in (str(root / "step_00000002"), file.name, " bytes, CRC-32 ", "going on from step_00000001"):
        assert words in record.message
    with pytest.raises(DamagedError, match="name another checkpoint"):
        checkpoint.opened(root / "step_00000002.damaged")


def test_without_a_sound_checkpoint_nothing_is_begun_anew(two: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(two, root)
    for folder in root.iterdir():
        (folder / "state.json").unlink()
    for _ in range(2):
        with pytest.raises(
            DamagedError, match=r"state.json is absent, and was .*there is no other; give another --out"
        ):
            checkpoint.newest(root, set_aside=True)
    assert len(list(root.iterdir())) == 2


def test_what_others_leave_in_a_checkpoint_is_no_damage(two: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(two, root)
    (root / "step_00000002" / ".DS_Store").write_bytes(b"Bud1")
    (root / "step_00000002" / ".cache").mkdir()
    assert checkpoint.newest(root, set_aside=True).state["step"] == 2  # type: ignore[union-attr]


def test_everything_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a loss of power could leave a name without its content."""
    done: list[tuple[str, str]] = []
    sync, replace = checkpoint.sync, os.replace
    monkeypatch.setattr(checkpoint, "sync", lambda path: (done.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("name", Path(b).name)), replace(a, b)))
    folder = checkpoint.folder_of(tmp_path / "checkpoints", 3)
    checkpoint.save(folder, {"a": torch.ones(2)}, STATE)
    named = done.index(("name", folder.name))
    before, after = {name for _, name in done[:named]}, {name for _, name in done[named:]}
    assert before >= {file.name for file in folder.iterdir()} | {folder.name + ".partial", tmp_path.name}
    assert "checkpoints" in after


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 2 bytes")])
def test_no_memory_to_load_is_no_fault_of_the_checkpoint(
    error: Exception, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint.HuggingFaceStorageReader, "read_data", fail)
    with pytest.raises(type(error)) as raised:
        checkpoint.opened(two / "step_00000002").load({f"model.{i}": torch.zeros(40) for i in range(6)})
    assert ran_out(raised.value)


def test_what_cannot_be_read_now_is_not_called_damaged(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(two, root)

    def stale(folder: Path, files: Any) -> dict[str, str]:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_checksums", stale)
        with pytest.raises(InputError, match=r"cannot be read \(Stale file handle\); try again, or rename it") as error:
            checkpoint.newest(root, set_aside=True)
    assert not isinstance(error.value, DamagedError)
    assert checkpoint.newest(root, set_aside=True).state["step"] == 2  # type: ignore[union-attr]


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(os.environ["BOMB"]),))


def test_a_pickle_is_never_executed(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a loader may look for tensors or metadata, with checksums that fit."""
    exploded = tmp_path / "exploded"
    monkeypatch.setenv("BOMB", str(exploded))
    pickles = [pickle.dumps(_Bomb()), pickle.dumps({"model.0": _Bomb()})]
    (buffer := io.BytesIO(), torch.save({"model.0": _Bomb()}, buffer))
    assert pickle.loads(pickles[0]) is None
    assert exploded.exists(), "the bomb works"
    exploded.unlink()
    for content in (*pickles, buffer.getvalue()):
        for name in (".metadata", "pytorch_model.bin", "__0_0.distcp", "state.json", "tensors"):
            folder = tmp_path / "checkpoints" / "step_00000002"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(two / "step_00000002", folder)
            file = sorted(folder.glob("*.safetensors"))[0] if name == "tensors" else folder / name
            file.write_bytes(content)
            seal(folder)
            tensors = {f"model.{i}": torch.zeros(40) for i in range(6)}
            with contextlib.suppress(InputError):
                checkpoint.opened(folder).load(tensors)
            assert not exploded.exists()


def test_what_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """A limit on the size of files, which Python turns into an OSError, as a full disk does."""
    script = """
import resource, sys, torch
from pathlib import Path
from galore_pretrain.rundir import checkpoint
from galore_pretrain.rundir.checkpoint import DamagedError
root = Path(sys.argv[1])
checkpoint.save(root / "step_00000001", {"a": torch.ones(10)}, dict(config={}, trainer={}, counts={}))
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
try:
    checkpoint.save(root / "step_00000002", {"a": torch.ones(5000)}, {})
except checkpoint.NotWrittenError as error:
    print(error)
"""
    done = python(script, str(tmp_path))
    assert done.stdout.strip() == "File too large", done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.opened(tmp_path / "step_00000001")
