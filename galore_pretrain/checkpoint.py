"""Checkpoints of safetensors and JSON: complete or absent, and nothing that is loaded can execute code.

``checkpoints/step_00000100/`` holds the tensors in torch.distributed.checkpoint's Hugging Face format (which later also
holds the shards of several processes) and ``state.json`` with everything that is not a tensor.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from galore_pretrain.errors import InputError

_FILE_BYTES = 1 << 28  # a file is serialized in memory as a whole: bounds what saving adds to the peak
_STATE = "state.json"


def named_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the run under its name, as a live reference: weights, optimizer state, torch's random state."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, state in _named_state(optimizer):
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    tensors["random.cpu"] = torch.get_rng_state()
    if (device := next(model.parameters()).device).type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def named_counts(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """How many updates each parameter has had."""
    return {name: int(state["step"]) for name, state in _named_state(optimizer)}


def restore_counts(optimizer: torch.optim.Optimizer, counts: Mapping[str, int]) -> None:
    """The inverse of `named_counts`."""
    for name, state in _named_state(optimizer):
        state["step"] = counts[name]


def _named_state(optimizer: torch.optim.Optimizer) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, optimizer.state[p])
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]


def folder_of(root: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return root / f"step_{step:08d}"


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint aside, force it to disk, then give it its name."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    writer = HuggingFaceStorageWriter(str(aside), fqn_to_index_mapping=_files(tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells its own developers about deprecations here
        dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    (aside / _STATE).write_text(json.dumps(state))
    for file in aside.iterdir():
        _sync(file)
    _sync(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    _sync(folder.parent)


def load(folder: Path, tensors: Mapping[str, Tensor], part: str = "") -> dict[str, Any]:
    """Read a checkpoint, or what begins with ``part`` of it, into ``tensors``, in place; what else it remembers is
    returned.

    Raises InputError where it is no checkpoint, or one of another model or optimizer.
    """
    state = read_state(folder)
    reader = HuggingFaceStorageReader(str(folder))
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except Exception as error:  # whatever a cut or altered file raises
        raise InputError(f"{folder}: damaged ({error}); remove it to go on from the one before") from error
    saved = {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(part)
    }
    absent = [name for name in tensors if name.startswith("random.") and name not in saved]  # saved on another device
    tensors = {name: value for name, value in tensors.items() if name not in absent}
    saved = {name: entry for name, entry in saved.items() if name in tensors or not name.startswith("random.")}
    wanted = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    if different := [name for name in sorted(wanted) if saved.get(name) != wanted[name]] or sorted(
        saved.keys() - wanted.keys()
    ):
        name = different[0]
        raise InputError(
            f"{folder}: {name} is {saved.get(name, 'missing')}, this run's is {wanted.get(name, 'missing')}; "
            "the checkpoint is of another model or optimizer: give another --output"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The part of a checkpoint that is not tensors."""
    try:
        state: dict[str, Any] = json.loads((folder / _STATE).read_text())
        if not isinstance(state, dict) or "config" not in state:
            raise ValueError("no config in it")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a checkpoint ({error}); a checkpoint is a folder with {_STATE}") from error
    return state


def later_than(root: Path, folder: Path | None) -> list[str]:
    """Names of the checkpoints under ``root`` that going on from ``folder`` would leave in the future."""
    own = folder is not None and folder.resolve().parent == root.resolve()
    return [f.name for f in sorted(root.glob("step_*")) if folder is None or not own or f.name > folder.resolve().name]


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` is a complete one."""
    return (folder / _STATE).is_file()


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint under ``root``."""
    found = sorted(f for f in root.glob("step_*") if re.fullmatch(r"step_\d{8,}", f.name) and (f / _STATE).is_file())
    return found[-1] if found else None


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what an interrupted save left."""
    found = sorted(f for f in root.glob("step_*") if f.is_dir())
    partial = [f for f in found if f.name.endswith(".partial")]
    for folder in partial + [f for f in found if f not in partial][:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which file each tensor goes to, so that none grows much past `_FILE_BYTES`."""
    index, size = 1, 0
    files = {}
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > _FILE_BYTES:
            index, size = index + 1, 0
        files[name] = index
        size += tensor.nbytes
    return files


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
