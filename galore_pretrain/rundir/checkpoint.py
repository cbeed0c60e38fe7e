"""Checkpoints of safetensors and JSON: complete or absent, and nothing that is loaded can execute code.

``checkpoints/step_00000100/`` holds the tensors in torch.distributed.checkpoint's Hugging Face format (which later also
holds the shards of several processes), ``state.json`` with everything that is not a tensor, and ``checksums.json`` with
the size and CRC-32 of every other file: against bytes that go wrong, not against somebody who would change them.

``state.json`` names its `FORMAT` and the version that wrote it; one that names none is of format 1, which 0.1 wrote.
Older formats are read: their weights always, and a run goes on from them bit for bit, or is refused with a line that
says what differs. A newer format is refused with the version that wrote it. The number goes up with every change that
an older program would misread.
"""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from galore_pretrain import __version__
from galore_pretrain.dist import ALONE, World
from galore_pretrain.errors import InputError
from galore_pretrain.meters import ran_out

if TYPE_CHECKING:
    from galore_pretrain.optim import RuleOptimizer

FORMAT = 2
"""The format of the checkpoints, and of the config.json, that this version writes."""
OLD_NAMES: dict[str, str] = {}
"""What the tensors of an optimizer's state are called now, by the names that older formats have for them: the last part
of ``optimizer.PARAMETER.NAME``. A rule's ``settings`` need no entry: no checkpoint holds them."""
_FILE_BYTES = 1 << 28  # a file is serialized in memory as a whole: bounds what saving adds to the peak
_STATE, _CHECKSUMS = "state.json", "checksums.json"
_PARTS = ("config", "trainer", "counts")
_NAME = re.compile(r"step_\d{8,}")
_AGAIN = "try again, or rename it, and the one before it is taken"

log = logging.getLogger(__name__)


class DamagedError(InputError):
    """A checkpoint that is not as it was written."""


class NotWrittenError(Exception):
    """A checkpoint that could not be written. The message is the system's reason."""


def named_tensors(model: torch.nn.Module, optimizer: "RuleOptimizer", *, load: bool = False) -> dict[str, Tensor]:
    """Every tensor of the run under its name, as a live reference: weights, optimizer state, torch's random state. A
    matrix that lies column by column is there as its transpose, since files hold rows.

    Where processes share them, what is kept in blocks is no reference: to ``load``, `take_loaded` must follow.
    """
    tensors = model_tensors(model)
    for name, p in _named(optimizer):
        for key, value in optimizer.saved_state(p, load=load).items():
            tensors[f"optimizer.{name}.{key}"] = value if value.is_contiguous() else value.T
    tensors["random.cpu"] = torch.get_rng_state()
    if (device := next(model.parameters()).device).type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights, each once: embeddings that are tied to the head have one name. No model here has other tensors that
    are not computed."""
    return {f"model.{name}": value.detach() for name, value in model.named_parameters()}


def take_loaded(optimizer: "RuleOptimizer", tensors: Mapping[str, Tensor]) -> None:
    """Make what was loaded into `named_tensors` the optimizer's."""
    for name, p in _named(optimizer):
        prefix = f"optimizer.{name}."
        optimizer.take_saved(p, {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)})


def named_counts(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Returns the number of updates that each parameter has had."""
    return {name: int(optimizer.state[p]["step"]) for name, p in _named(optimizer)}


def restore_counts(optimizer: torch.optim.Optimizer, counts: Mapping[str, int]) -> None:
    """Put back what `named_counts` returned."""
    for name, p in _named(optimizer):
        optimizer.state[p]["step"] = counts[name]


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [
        (name, p)
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]


def folder_of(root: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return root / f"step_{step:08d}"


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], world: World = ALONE) -> None:
    """Write a checkpoint aside, force it to disk, then give it its name. NotWrittenError where that fails; nothing is
    left of it then, and what was there before still is. Each process of ``world`` writes its part of the tensors."""
    aside, several = folder.with_name(folder.name + ".partial"), world.size > 1
    try:
        world.on_rank_zero(lambda: _begin(aside))
        writer = HuggingFaceStorageWriter(str(aside), fqn_to_index_mapping=_files(tensors), save_distributed=several)
        dcp.save(dict(tensors), storage_writer=writer, no_dist=not several, process_group=world.group)
        world.on_rank_zero(lambda: _complete(aside, folder, state))
    except (OSError, CheckpointException, SafetensorError) as error:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise NotWrittenError(_reason(_cause(error))) from error


def _begin(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    sync(aside.parent.parent)  # where it may be new


def _complete(aside: Path, folder: Path, state: Mapping[str, Any]) -> None:
    """Write all that is in a checkpoint beside its tensors, and give it its name."""
    (aside / _STATE).write_text(json.dumps({"format": FORMAT, "version": __version__, **state}))
    (aside / _CHECKSUMS).write_text(json.dumps(_checksums(aside.iterdir()), indent=1))
    for file in aside.iterdir():
        sync(file)
    sync(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    sync(folder.parent)


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are as they were written. ``state``: everything in it that is not a tensor."""

    folder: Path
    state: dict[str, Any]

    @property
    def format(self) -> int:
        """The format that it was written in."""
        return _format(self.state)

    def load(self, tensors: Mapping[str, Tensor], part: str = "") -> None:
        """Read the tensors, or those whose names begin with ``part``, into ``tensors``, in place.

        Raises InputError where they are of another model or optimizer.
        """
        reader = HuggingFaceStorageReader(str(self.folder))
        try:
            metadata = reader.read_metadata().state_dict_metadata
        except Exception as error:  # whatever is raised by files that hold no tensors
            raise DamagedError(f"{self.folder}: no tensors can be read ({_reason(_cause(error))})") from error
        named = {self._name_now(name): name for name in metadata if name.startswith(part)}
        saved = {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, old in named.items()
            if isinstance(entry := metadata[old], TensorStorageMetadata)
        }
        absent = [name for name in tensors if name.startswith("random.") and name not in saved]  # of another device
        tensors = {name: value for name, value in tensors.items() if name not in absent}
        saved = {name: entry for name, entry in saved.items() if name in tensors or not name.startswith("random.")}
        wanted = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
        if different := [name for name in sorted(wanted) if saved.get(name) != wanted[name]] or sorted(
            saved.keys() - wanted.keys()
        ):
            name = different[0]
            raise InputError(
                f"{self.folder}: {name} is {saved.get(name, 'missing')}, this run's is {wanted.get(name, 'missing')}; "
                "the checkpoint is of another model or optimizer: give another --output"
            )
        try:
            dcp.load({named[name]: value for name, value in tensors.items()}, storage_reader=reader, no_dist=True)
        except (OSError, CheckpointException, SafetensorError) as error:
            if ran_out(cause := _cause(error)):
                raise cause from error
            raise InputError(f"{self.folder}: cannot be read ({_reason(cause)}); {_AGAIN}") from error

    def is_in(self, root: Path) -> bool:
        """Whether it is one of those under ``root``."""
        return self.folder.resolve().parent == root.resolve()

    def _name_now(self, name: str) -> str:
        """What a tensor that was saved as ``name`` is called now."""
        if self.format == FORMAT or not name.startswith("optimizer."):
            return name
        parameter, _, last = name.rpartition(".")
        return f"{parameter}.{OLD_NAMES.get(last, last)}"


def _format(state: Mapping[str, Any]) -> int:
    """The format of a checkpoint with this ``state``; ValueError where it is none."""
    number = state.get("format", 1)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{_STATE} names the format {number!r}")
    return number


def opened(folder: Path) -> Saved:
    """The checkpoint in ``folder``, every byte of it checked. DamagedError where it is not as it was written,
    InputError where that cannot be found out, or where it is of a newer format."""
    try:
        written = json.loads((folder / _CHECKSUMS).read_bytes())
        if not isinstance(written, dict):
            raise ValueError(f"{_CHECKSUMS} is no object")
        # Of what others leave there (.DS_Store, .cache), nothing is read.
        found = _checksums(f for f in folder.iterdir() if f.name in written or f.suffix == ".safetensors")
        if different := sorted(n for n in written.keys() | found.keys() if written.get(n) != found.get(n)):
            name = different[0]
            raise ValueError(f"{name} is {found.get(name, 'absent')}, and was {written.get(name, 'absent')}")
        state = json.loads((folder / _STATE).read_bytes())
        if not isinstance(state, dict):
            raise ValueError(f"{_STATE} is no object")
        is_newer = _format(state) > FORMAT  # what else is there, is then unknown
        if not is_newer and not all(isinstance(state.get(part), dict) for part in _PARTS):
            raise ValueError(f"{_STATE} lacks one of {', '.join(_PARTS)}")
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError) as error:
        why = f"{Path(error.filename).name} is absent" if isinstance(error, OSError) else error
        raise DamagedError(f"{folder}: damaged ({why}); name another checkpoint") from error
    except OSError as error:  # which may pass
        raise InputError(f"{folder}: cannot be read ({_reason(error)}); {_AGAIN}") from error
    if is_newer:
        raise InputError(
            f"{folder} is of format {state['format']}, written by galore-pretrain {state.get('version')}; this is "
            f"{__version__}, which reads formats up to {FORMAT}: install that version, or name another checkpoint"
        )
    return Saved(folder, state)


def newest(root: Path, *, set_aside: bool) -> Saved | None:
    """The newest checkpoint under ``root`` that is as it was written; None where there is none at all.

    Newer ones that are not are left out with a warning, and renamed if they are to be ``set_aside``. DamagedError where
    no other is left.
    """
    damaged: list[tuple[Path, DamagedError]] = []
    for folder in reversed(_folders(root)):
        try:
            found = opened(folder)
        except DamagedError as error:
            damaged.append((folder, error))
            continue
        for bad, damage in damaged:
            aside = bad.with_name(bad.name + ".damaged")
            if set_aside:
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(bad, aside)
            why = str(damage).removeprefix(f"{bad}: ").rpartition("; ")[0]
            what = f"set aside as {aside.name}" if set_aside else "left out"
            log.warning("%s is %s: %s; going on from %s", bad, why, what, folder.name)
        return found
    if damaged:
        text, _, _ = str(damaged[0][1]).rpartition("; ")
        raise DamagedError(f"{text}, and there is no other; give another --output, or remove {root} to start anew")
    return None


def later_than(root: Path, folder: Path | None) -> list[str]:
    """Names of the checkpoints under ``root`` that going on from ``folder`` would leave in the future."""
    own = folder is not None and folder.resolve().parent == root.resolve()
    return [f.name for f in _folders(root) if folder is None or not own or f.name > folder.resolve().name]


def present(root: Path) -> int:
    """Number of checkpoints under ``root``."""
    return len(_folders(root))


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` was meant to be one."""
    return (folder / _STATE).is_file() or (folder / _CHECKSUMS).is_file()


def prune(root: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove what an interrupted save left, all damaged checkpoints but the newest, and all others but the newest
    ``keep`` and those of every ``keep_every`` updates."""
    old = [f for f in _folders(root)[:-keep] if not keep_every or int(f.name.removeprefix("step_")) % keep_every]
    damaged = sorted(root.glob("step_*.damaged"))[:-1]
    for folder in [*root.glob("step_*.partial"), *damaged, *old]:
        shutil.rmtree(folder, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    """Those that are named as checkpoints are, the oldest first."""
    return sorted(f for f in root.glob("step_*") if _NAME.fullmatch(f.name) and f.is_dir())


def _checksums(files: Iterable[Path]) -> dict[str, str]:
    """Returns size and CRC-32 of each file."""
    found = {}
    for file in sorted(files):
        crc = 0
        with file.open("rb") as stream:
            while part := stream.read(1 << 24):
                crc = zlib.crc32(part, crc)
        found[file.name] = f"{file.stat().st_size} bytes, CRC-32 {crc:08x}"
    return found


def _cause(error: BaseException) -> BaseException:
    """The error of the system or of a file, which torch may have wrapped into one of its own."""
    return next((inner for inner, _ in getattr(error, "failures", {}).values()), error)


def _reason(error: BaseException) -> str:
    """An error in words: in the system's, if it is the system's."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the number of the file that each tensor goes to, so that none grows much past `_FILE_BYTES`."""
    index, size = 1, 0
    files = {}
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > _FILE_BYTES:
            index, size = index + 1, 0
        files[name] = index
        size += tensor.nbytes
    return files


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
