"""Weights that a run begins from: checked by name and shape before the model exists, then read tensor by tensor."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from galore_pretrain.errors import InputError
from galore_pretrain.model.families import Architecture, family_of
from galore_pretrain.model.lowrank import Factors, layers
from galore_pretrain.tensors.coded import codes_of
from galore_pretrain.tensors.place import is_cpu
from galore_pretrain.tensors.shards import Shard, local, shard_of

_FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes by their names in safetensors
INDEX = "model.safetensors.index.json"
"""What transformers calls the file that names a folder's shards."""
WHOLE = "model.safetensors"
"""What it calls a folder's only file of weights."""
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_OF_CONFIG = ".rotary_emb.inv_freq"
"""How names end of tables that older versions of transformers saved, and that follow from the config."""


class InitialWeights(Protocol):
    """Gives the weights of a model, by the names of transformers' class, from where a run begins."""

    place: str
    """What messages call it."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        ...

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        """Return a tensor on the CPU in the dtype that it was saved in, or the part of it that ``shard`` is."""
        ...


class FolderWeights:
    """The safetensors of a Hugging Face folder: ``model.safetensors``, or shards with their index.

    Their headers are read at once, and their bytes when they are asked for: no tensor is held here.
    """

    def __init__(self, folder: Path, place: str) -> None:
        self.place = place
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}  # of each tensor
        for file, names in _files_of(folder, place).items():
            self._open(folder / file, names)

    def _open(self, path: Path, wanted: Iterable[str] | None) -> None:
        """Take the names, shapes and dtypes of one file; all of them, or those ``wanted`` that it was said to have."""
        try:
            with safe_open(path, framework="pt") as file:
                present = set(file.keys())
                for name in sorted(present if wanted is None else present.intersection(wanted)):
                    view = file.get_slice(name)
                    if view.get_dtype() not in _FLOATS:
                        raise InputError(
                            f"--init {self.place}: {name} is {view.get_dtype()}; quantized weights are not read: give "
                            "the model in bfloat16, float16 or float32"
                        )
                    self._shapes[name] = tuple(view.get_shape())
                    self._files[name] = path
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"--init {self.place}: {path.name} cannot be read ({_reason(error)}); copy it anew"
            ) from error

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        return self._shapes

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        """Return a tensor, or the part of it that ``shard`` is. Of a part, no other bytes are read."""
        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                if shard is None:
                    whole: Tensor = file.get_tensor(name)
                    return whole
                view = file.get_slice(name)
                if shard.start == shard.stop:
                    return torch.empty(shard.part_shape)
                if shard.dim == 0:
                    rows: Tensor = view[shard.start : shard.stop]
                    return rows
                columns: Tensor = view[:, shard.start : shard.stop]
                return columns
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"--init {self.place}: {name} cannot be read from {path.name} ({_reason(error)}); copy it anew"
            ) from error


def _files_of(folder: Path, place: str) -> Mapping[str, list[str] | None]:
    """Return the files of a folder's weights, each with the tensors that the index says it has; None without index.

    Raises InputError where there are none, or none that can be read without executing what they hold.
    """
    if (folder / INDEX).is_file():
        files = shards_of(folder, place)
        for file in files:
            if not (folder / file).is_file():
                raise InputError(f"--init {place}: {INDEX} names {file}, which is not there; copy it anew")
        return files
    if (folder / WHOLE).is_file():
        return {WHOLE: None}
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5"))
    if others:
        raise InputError(
            f"--init {place}: has {others[0]}, and only safetensors are read: save the model once more, by "
            "transformers' save_pretrained"
        )
    raise InputError(
        f"--init {place}: has no {WHOLE} and no {INDEX}; name a folder with a model's weights, or give --model "
        "alone to begin with new ones"
    )


def shards_of(folder: Path, place: str) -> dict[str, list[str]]:
    """Return the files that a folder's index names, each with its tensors. InputError where it is no such index."""
    files: dict[str, list[str]] = {}
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"it names {file}, which is no file beside it")
            files.setdefault(file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--init {place}: {INDEX} is no index of weights ({_reason(error)})") from error
    return files


def _reason(error: BaseException) -> str:
    """Return an error in words on one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


# Names and shapes are compared with those of transformers' own class, which exists on meta alone.
def check_weights(weights: InitialWeights, architecture: Architecture) -> None:
    """Raise InputError that names what is missing, surplus or misshapen among ``weights`` for this architecture."""
    with torch.device("meta"):
        model = family_of(architecture).model_class(architecture)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    given = {name: shape for name, shape in weights.shapes().items() if not name.endswith(_OF_CONFIG)}
    if architecture.tie_word_embeddings and _HEAD in given:
        _check_tied(weights)
        del given[_HEAD]
    hint = ""
    if expected.keys() - given.keys() == {_HEAD}:
        hint = "; where it is the embedding, config.json must say tie_word_embeddings true"
    check_shapes(weights.place, given, expected, f"the {type(model).__name__} of its config.json", hint)


def check_shapes(
    place: str,
    given: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    what: str,
    hint: str = "",
) -> None:
    """Raise InputError that names what is missing, surplus or misshapen among the tensors of ``place``.

    ``what`` has the ``expected`` ones. ``hint`` is told where some are missing.
    """
    missing = sorted(expected.keys() - given.keys())
    surplus = sorted(given.keys() - expected.keys())
    if missing:
        raise InputError(f"--init {place}: lacks {_first_of(missing)} of {what}{hint}")
    if surplus:
        raise InputError(f"--init {place}: has {_first_of(surplus)}, which {what} has not; name its own config")
    for name, shape in expected.items():
        if given[name] != shape:
            raise InputError(
                f"--init {place}: {name} is {_times(given[name])}, and {_times(shape)} in {what}; name its own config"
            )


def _check_tied(weights: InitialWeights) -> None:
    """Raise InputError where a head that is to be the embedding is saved as another one."""
    shapes = weights.shapes()
    is_same = shapes[_HEAD] == shapes.get(_EMBEDDING) and torch.equal(weights.read(_HEAD), weights.read(_EMBEDDING))
    if not is_same:
        raise InputError(
            f"--init {weights.place}: {_HEAD} is another matrix than {_EMBEDDING}, and config.json says "
            "tie_word_embeddings true; correct that to false to train both"
        )


def _first_of(names: list[str]) -> str:
    """Return the first of some names, and how many there are besides."""
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {len(names) - 1} more tensors"


def _times(shape: tuple[int, ...]) -> str:
    """Return a shape as it is read: 2 × 3."""
    return " × ".join(map(str, shape)) or "a number"


# One tensor of the files is in memory at a time, besides the model. Where processes share the weights out, each reads
# its part of it.
@torch.no_grad()
def take_weights(model: Any, weights: InitialWeights, factors: Factors | None) -> None:
    """Read ``weights``, which were checked, into a ``model`` whose memory is allocated.

    Matrices in 8 bits get the nearest codes. Where ``factors`` stand for the matrices, W₀ is what is read, and BA
    begins at zero; without W₀, BA is the best approximation of its rank.
    """
    of_factors: set[str] = set()
    for name, _ in layers(model):
        of_factors |= {f"{name}.A.weight", f"{name}.B.weight"}
    for name, parameter in model.named_parameters():
        if name not in of_factors:
            take(parameter, weights, name)
    if factors is not None:
        factors.initialize(model, lambda name, dense: dense.copy_(weights.read(name)))


def take(parameter: Tensor, weights: InitialWeights, name: str) -> None:
    """Read one tensor into a parameter, in the parameter's dtype, or as codes."""
    coded = codes_of(parameter)
    if coded is not None:
        coded.write(weights.read(name).to(parameter.device))
        return
    target = local(parameter)
    part = weights.read(name, shard_of(parameter))
    if not is_cpu(target.device):  # rounded here, so that a device never holds it in another dtype
        part = part.to(target.dtype)
    target.copy_(part)
