"""Checkpoints of safetensors and JSON: complete or absent, and nothing that is loaded can execute code.

``checkpoints/step_00000100/`` holds the tensors in torch.distributed.checkpoint's Hugging Face format, which also knows
the shards of several processes; ``state.json`` with everything that is not a tensor, the model's architecture among it;
the files of the tokenizer, in ``tokenizer/``; and ``checksums.json`` with the size and CRC-32 of every other file:
against bytes that go wrong, not against somebody who would change them. So a checkpoint needs no other file to be read.

A checkpoint under its name is whole. It is written aside, as ``step_00000100.partial``; every file is forced to disk;
only then is the folder renamed, which a file system does at once or not at all. A process that is killed at any moment
leaves the checkpoints of before and at most one ``.partial``. What is damaged later, by a disk or by hand, is found by
its checksums, and left out in favour of the one before.

``state.json`` names its `FORMAT` and the version that wrote it; one that names none is of format 1, which 0.1 wrote. Up
to format 2, a Hugging Face tokenizer was known again by its vocabulary, and its files were elsewhere; from 3 on, by all
that decides on its ids.
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
from galore_pretrain.optim import saved_state, take_saved_state
from galore_pretrain.tensors.coded import codes_of

if TYPE_CHECKING:
    from galore_pretrain.optim import RuleOptimizer

FORMAT = 3
"""The format of the checkpoints, and of the config.json, that this version writes."""
OLD_NAMES: dict[str, str] = {}
"""Maps the name that an older format has for a tensor of an optimizer's state to the name it has now. Both are the last
part of ``optimizer.PARAMETER.NAME``. A rule's ``settings`` need no entry: no checkpoint holds them."""
_FILE_BYTES = 1 << 28  # a file is serialized in memory as a whole: bounds what saving adds to the peak
TOKENIZER = "tokenizer"
"""The folder of a checkpoint that holds the tokenizer's files, from format 3 on."""
_STATE = "state.json"
_CHECKSUMS = "checksums.json"
_PARTS = ("config", "trainer", "counts")  # what state.json has to hold, each an object
_NAME = re.compile(r"step_\d{8,}")
_AGAIN = "try again, or rename it, and the one before it is taken"
_Kind = tuple[tuple[int, ...], torch.dtype]  # a tensor's shape and dtype, which loading does not change

log = logging.getLogger(__name__)


class DamagedError(InputError):
    """Raised for a checkpoint that is not as it was written."""


class NotWrittenError(Exception):
    """Raised where a checkpoint could not be written. The message is the system's reason."""


def named_tensors(model: torch.nn.Module, optimizer: "RuleOptimizer", *, load: bool = False) -> dict[str, Tensor]:
    """Return every tensor of the run by name, as a live reference: weights, optimizer state, torch's random state.

    A matrix that lies column by column in memory is returned as its transpose, since files hold rows. Where processes
    share the tensors, state that is kept in blocks is no reference: to ``load`` it, `take_loaded` must follow.
    """
    tensors = model_tensors(model)
    for name, p in _named_parameters(optimizer):
        for key, value in saved_state(optimizer, p, load=load).items():
            tensors[f"optimizer.{name}.{key}"] = value if value.is_contiguous() else value.T
    tensors["random.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights by name, each once: embeddings that are tied to the head have one name.

    Buffers are left out: those of the models here are computed from the config.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in model.named_parameters():
        coded = codes_of(value)
        if coded is not None:
            tensors[f"model.{name}.codes"] = coded.codes
            tensors[f"model.{name}.scales"] = coded.scales
        else:
            tensors[f"model.{name}"] = value.detach()
    return tensors


def take_loaded(optimizer: "RuleOptimizer", tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state that was loaded into `named_tensors`."""
    for name, p in _named_parameters(optimizer):
        prefix = f"optimizer.{name}."
        state = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                state[key.removeprefix(prefix)] = value
        take_saved_state(optimizer, p, state)


def named_counts(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the number of updates that each parameter has had, by the parameter's name."""
    return {name: int(optimizer.state[p]["step"]) for name, p in _named_parameters(optimizer)}


def restore_counts(optimizer: torch.optim.Optimizer, counts: Mapping[str, int]) -> None:
    """Put back what `named_counts` returned."""
    for name, p in _named_parameters(optimizer):
        optimizer.state[p]["step"] = counts[name]


def _named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """List the optimizer's parameters with their names."""
    named: list[tuple[str, Tensor]] = []
    for group in optimizer.param_groups:
        named += zip(group["param_names"], group["params"], strict=True)
    return named


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` updates, whether it is there or not."""
    return root / f"step_{step:08d}"


# A checkpoint is whole or absent:
# 1. The main process makes an empty folder aside. What an earlier attempt left there is removed.
# 2. Every process writes the shards that it has, in files of its own.
# 3. The main process adds state.json, then the checksums of all files, and forces each file and the folder to disk.
# 4. It renames the folder. A checkpoint of the same step, written before, is removed just before that.
# 5. It forces the entry of the parent folder to disk. Only then may `prune` remove an older checkpoint.
# All processes wait for each of these steps, and fail together.
def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    world: World = ALONE,
    tokenizer: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint aside, force it to disk, then give it its name. Each process writes its part of the tensors.

    ``tokenizer`` are the tokenizer's files, by name; the main process's are written. ``state`` is everything else, in
    plain JSON values. Raises NotWrittenError where that fails: nothing is left of the checkpoint then, and those before
    it are still there.
    """
    aside = folder.with_name(folder.name + ".partial")
    several = world.size > 1
    try:
        world.on_rank_zero(lambda: _begin(aside))
        writer = HuggingFaceStorageWriter(
            str(aside),
            fqn_to_index_mapping=_file_numbers(tensors),
            save_distributed=several,
        )
        dcp.save(dict(tensors), storage_writer=writer, no_dist=not several, process_group=world.group)
        world.on_rank_zero(lambda: _complete(aside, folder, state, tokenizer or {}))
    except (OSError, CheckpointException, SafetensorError) as error:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        reason = _reason(_cause(error))
        raise NotWrittenError(reason) from error


def _begin(aside: Path) -> None:
    """Make the empty folder that a checkpoint is written into."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    sync(aside.parent.parent)  # the run's folder, in which that of the checkpoints may be new


def _complete(aside: Path, folder: Path, state: Mapping[str, Any], tokenizer: Mapping[str, bytes]) -> None:
    """Write what a checkpoint holds beside its tensors, force all of it to disk, and give it its name."""
    document = {"format": FORMAT, "version": __version__, **state}
    (aside / _STATE).write_text(json.dumps(document))
    for name, content in tokenizer.items():
        file = aside / TOKENIZER / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    checksums = _checksums(aside, _files(aside))
    (aside / _CHECKSUMS).write_text(json.dumps(checksums, indent=1))
    for path in aside.rglob("*"):
        sync(path)
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
        """Return the format that the checkpoint was written in."""
        return _format(self.state)

    # Names, shapes and dtypes are compared before anything is read, so a run is refused before a tensor of it changes.
    # An old format's names are translated first. The random state of a device is the one tensor that may differ: a run
    # that goes on with a GPU, or without one, neither finds nor needs what the other device had.
    def load(self, tensors: Mapping[str, Tensor], part: str = "") -> None:
        """Read the tensors, or those whose names begin with ``part``, into ``tensors``, in place.

        Raises InputError where they are of another model or optimizer.
        """
        reader = HuggingFaceStorageReader(str(self.folder))
        metadata = self._read_metadata(reader)
        saved_names = {self._name_now(name): name for name in metadata if name.startswith(part)}
        saved: dict[str, _Kind] = {}
        for name, saved_name in saved_names.items():
            entry = metadata[saved_name]
            if not isinstance(entry, TensorStorageMetadata):
                continue
            if name in tensors or not name.startswith("random."):
                saved[name] = (tuple(entry.size), entry.properties.dtype)
        expected: dict[str, _Kind] = {}
        targets = {}
        for name, tensor in tensors.items():
            if name in saved or not name.startswith("random."):
                expected[name] = (tuple(tensor.shape), tensor.dtype)
                targets[saved_names.get(name, name)] = tensor
        self._check_alike(saved, expected)
        self._read_into(targets, reader)

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors whose names begin with ``part``, by the rest of their names."""
        metadata = self._read_metadata(HuggingFaceStorageReader(str(self.folder)))
        shapes = {}
        for name, entry in metadata.items():
            if name.startswith(part) and isinstance(entry, TensorStorageMetadata):
                shapes[name.removeprefix(part)] = tuple(entry.size)
        return shapes

    def read(self, name: str) -> Tensor:
        """Return one tensor, whole, on the CPU, by the name that it was saved under."""
        reader = HuggingFaceStorageReader(str(self.folder))
        entry = self._read_metadata(reader)[name]
        assert isinstance(entry, TensorStorageMetadata)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        self._read_into({name: tensor}, reader)
        return tensor

    def _read_into(self, targets: dict[str, Tensor], reader: HuggingFaceStorageReader) -> None:
        """Read tensors in place; InputError where the files cannot be read."""
        try:
            dcp.load(targets, storage_reader=reader, no_dist=True)
        except (OSError, CheckpointException, SafetensorError) as error:
            cause = _cause(error)
            if ran_out(cause):
                raise cause from error
            raise InputError(f"{self.folder}: cannot be read ({_reason(cause)}); {_AGAIN}") from error

    def _read_metadata(self, reader: HuggingFaceStorageReader) -> Mapping[str, Any]:
        """Return what the files say of each tensor, by the name that it was saved under."""
        try:
            return reader.read_metadata().state_dict_metadata
        except Exception as error:  # files that hold no tensors raise errors of many kinds
            reason = _reason(_cause(error))
            raise DamagedError(f"{self.folder}: no tensors can be read ({reason})") from error

    def _check_alike(self, saved: Mapping[str, _Kind], expected: Mapping[str, _Kind]) -> None:
        """InputError that names the first tensor which is not the same in the checkpoint and in the run."""
        different = [name for name in sorted(expected) if saved.get(name) != expected[name]]
        different += sorted(saved.keys() - expected.keys())
        if different:
            name = different[0]
            raise InputError(
                f"{self.folder}: {name} is {saved.get(name, 'missing')}, "
                f"this run's is {expected.get(name, 'missing')}; "
                "the checkpoint is of another model or optimizer: give another --output"
            )

    def is_in(self, root: Path) -> bool:
        """Return whether the checkpoint is one of those under ``root``."""
        return self.folder.resolve().parent == root.resolve()

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the tokenizer's files by name; none where the format is 2 or less. InputError if unreadable."""
        prefix = f"{TOKENIZER}/"
        files: dict[str, bytes] = {}
        try:
            for name in _read_object(self.folder / _CHECKSUMS):
                if name.startswith(prefix):
                    files[name.removeprefix(prefix)] = (self.folder / name).read_bytes()
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be read ({_reason(error)}); {_AGAIN}") from error
        return files

    # Old formats are kept readable by one table. A change of a state tensor's name adds an entry to `OLD_NAMES` and
    # raises `FORMAT`. The current format is never translated: a name of today may be an old name of another tensor.
    def _name_now(self, name: str) -> str:
        """Return what a tensor that was saved as ``name`` is called now."""
        if self.format == FORMAT or not name.startswith("optimizer."):
            return name
        parameter, _, last = name.rpartition(".")
        return f"{parameter}.{OLD_NAMES.get(last, last)}"


def _format(state: Mapping[str, Any]) -> int:
    """Return the format of a checkpoint with this ``state``; ValueError where it is none."""
    number = state.get("format", 1)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{_STATE} names the format {number!r}")
    return number


def opened(folder: Path) -> Saved:
    """Open the checkpoint in ``folder`` and check every byte of it.

    Raises DamagedError where it is not as it was written, InputError where that cannot be found out, or where it is of
    a newer format.
    """
    try:
        _check_files(folder)
        state = _read_state(folder)
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{Path(error.filename).name} is absent"
        raise DamagedError(f"{folder}: damaged ({reason}); name another checkpoint") from error
    except OSError as error:  # any other may pass: the files need not be damaged
        raise InputError(f"{folder}: cannot be read ({_reason(error)}); {_AGAIN}") from error
    if _format(state) > FORMAT:
        raise InputError(
            f"{folder} is of format {state['format']}, written by galore-pretrain {state.get('version')}; this is "
            f"{__version__}, which reads formats up to {FORMAT}: install that version, or name another checkpoint"
        )
    return Saved(folder, state)


def _check_files(folder: Path) -> None:
    """ValueError where a file of the checkpoint does not have the checksum that was written down for it."""
    expected = _read_object(folder / _CHECKSUMS)
    # Files that others leave in the folder (.DS_Store, .cache) are not read.
    known = {folder / name for name in expected}
    files = [file for file in _files(folder) if file in known or file.suffix == ".safetensors"]
    actual = _checksums(folder, files)
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise ValueError(f"{name} is {actual.get(name, 'absent')}, and was {expected.get(name, 'absent')}")


def _read_state(folder: Path) -> dict[str, Any]:
    """Read state.json; ValueError where it is not what a checkpoint of its format holds."""
    state = _read_object(folder / _STATE)
    if _format(state) > FORMAT:
        return state  # what else a newer format holds is unknown
    for part in _PARTS:
        if not isinstance(state.get(part), dict):
            raise ValueError(f"{_STATE} lacks one of {', '.join(_PARTS)}")
    return state


def _read_object(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; ValueError where it holds something else."""
    value = json.loads(file.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} is no object")
    return value


# A checkpoint that is damaged must not end a run that has an older one. The newest is tried first; whatever cannot be
# opened as it was written is remembered, and told of only when an older one takes its place. A damaged one is renamed,
# not removed: the run will soon write that step anew, and somebody may want to look at it.
def newest(root: Path, *, set_aside: bool) -> Saved | None:
    """Open the newest checkpoint under ``root`` that is as it was written; None where there is none at all.

    Newer ones that are damaged are left out with a warning, and renamed if they are to be ``set_aside``. Raises
    DamagedError where all are damaged.
    """
    damaged: list[tuple[Path, DamagedError]] = []
    for folder in reversed(_folders(root)):
        try:
            checkpoint = opened(folder)
        except DamagedError as error:
            damaged.append((folder, error))
            continue
        for damaged_folder, damage in damaged:
            _leave_out(damaged_folder, damage, folder, set_aside=set_aside)
        return checkpoint
    if damaged:
        _, damage = damaged[0]
        text, _, _ = str(damage).rpartition("; ")
        raise DamagedError(f"{text}, and there is no other; give another --output, or remove {root} to start anew")
    return None


def _leave_out(folder: Path, error: DamagedError, older: Path, *, set_aside: bool) -> None:
    """Warn that a damaged checkpoint is not used, but an ``older`` one; rename it if it is to be ``set_aside``."""
    outcome = "left out"
    if set_aside:
        aside = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        outcome = f"set aside as {aside.name}"
    reason, _, _ = str(error).removeprefix(f"{folder}: ").rpartition("; ")
    log.warning("%s is %s: %s; going on from %s", folder, reason, outcome, older.name)


def later_than(root: Path, folder: Path | None) -> list[str]:
    """Return the names of the checkpoints under ``root`` that a run which goes on from ``folder`` would overtake.

    These are the later ones where ``folder`` is under ``root``, and all of them where it is not, or is None.
    """
    names = [checkpoint.name for checkpoint in _folders(root)]
    if folder is None or folder.resolve().parent != root.resolve():
        return names
    start = folder.resolve().name
    return [name for name in names if name > start]


def present(root: Path) -> int:
    """Return the number of checkpoints under ``root``."""
    return len(_folders(root))


def is_checkpoint(folder: Path) -> bool:
    """Return whether ``folder`` was meant to be a checkpoint, damaged or not."""
    return (folder / _STATE).is_file() or (folder / _CHECKSUMS).is_file()


def prune(root: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove what a run does not need any more from ``root``.

    Kept are the newest ``keep`` checkpoints, those of every ``keep_every`` updates, and the newest damaged one. What an
    interrupted save left is removed.
    """
    unneeded = list(root.glob("step_*.partial"))
    unneeded += sorted(root.glob("step_*.damaged"))[:-1]
    for folder in _folders(root)[:-keep]:
        step = int(folder.name.removeprefix("step_"))
        if not keep_every or step % keep_every:
            unneeded.append(folder)
    for folder in unneeded:
        shutil.rmtree(folder, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    """List the folders under ``root`` that are named as checkpoints are, the oldest first."""
    return sorted(folder for folder in root.glob("step_*") if _NAME.fullmatch(folder.name) and folder.is_dir())


def _files(folder: Path) -> list[Path]:
    """List the files in a folder, and in the folders in it."""
    return [path for path in folder.rglob("*") if path.is_file()]


def _checksums(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the size and CRC-32 of each file, as text, by its path in ``folder``."""
    checksums = {}
    for file in sorted(files):
        crc = 0
        with file.open("rb") as stream:
            while part := stream.read(1 << 24):
                crc = zlib.crc32(part, crc)
        name = file.relative_to(folder).as_posix()
        checksums[name] = f"{file.stat().st_size} bytes, CRC-32 {crc:08x}"
    return checksums


def _cause(error: BaseException) -> BaseException:
    """Return the error of the system or of a file, which torch may have wrapped in one of its own."""
    # A CheckpointException has `failures`: the error and its traceback of each process that failed, by rank.
    failures = getattr(error, "failures", None)
    if not failures:
        return error
    first: tuple[BaseException, Any] = next(iter(failures.values()))
    return first[0]


def _reason(error: BaseException) -> str:
    """Return an error in words on one line: in the system's, if it is the system's."""
    message = " ".join(str(error).split())
    return getattr(error, "strerror", None) or message or type(error).__name__


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number, from 1, of the file that each tensor goes to, so that none grows much past `_FILE_BYTES`."""
    number = 1
    size = 0
    numbers = {}
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > _FILE_BYTES:
            number += 1
            size = 0
        numbers[name] = number
        size += tensor.nbytes
    return numbers


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
