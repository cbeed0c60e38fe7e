"""Where the weights of a run that begins from others are: a folder, a checkpoint of ours, or the hub."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from galore_pretrain.config.options import RunConfig, state_of
from galore_pretrain.errors import InputError
from galore_pretrain.model.initial import INDEX, WHOLE, FolderWeights, InitialWeights, shards_of
from galore_pretrain.model.lowrank import dense_matrix
from galore_pretrain.rundir import checkpoint
from galore_pretrain.rundir.checkpoint import Saved
from galore_pretrain.tensors.coded import Coded
from galore_pretrain.tensors.shards import Shard
from galore_pretrain.text.hub import AbsentError, download_model, is_hub_id
from galore_pretrain.train.build import factors_of

_A, _B = ".A.weight", ".B.weight"
_CODES, _SCALES = ".codes", ".scales"


def open_weights(place: str) -> InitialWeights:
    """Open what ``--init`` names: a model's folder, a run's newest checkpoint, a checkpoint, or the hub's repository.

    Of the hub, its safetensors are downloaded. Raises InputError where there are none.
    """
    folder = Path(place)
    if state_of(folder) is not None:
        saved = checkpoint.opened(folder) if checkpoint.is_checkpoint(folder) else None
        saved = saved or checkpoint.newest(folder / "checkpoints", set_aside=False)
        assert saved is not None
        return CheckpointWeights(saved, place)
    if is_hub_id(place):
        folder = _downloaded(place)
    return FolderWeights(folder, place)


class CheckpointWeights:
    """The weights of a run of ours, as a dense model has them, whatever its method kept them as.

    Factors are multiplied out and codes read, each matrix when it is asked for.
    """

    def __init__(self, saved: Saved, place: str) -> None:
        self.place = place
        self._saved = saved
        self._config = RunConfig.of(saved.state["config"])
        self._parts = saved.shapes("model.")

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each tensor of the dense model."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self._parts.items():
            if name.endswith(_B):
                module = name.removesuffix(_B)
                shapes[f"{module}.weight"] = (shape[0], self._parts[module + _A][1])
            elif name.endswith(_CODES):
                shapes[name.removesuffix(_CODES)] = shape
            elif not name.endswith((_A, _SCALES)):
                shapes[name] = shape
        return shapes

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        """Return a tensor of the dense model, or the part of it that ``shard`` is."""
        whole = self._whole(name)
        return whole if shard is None else shard.of(whole)

    def _whole(self, name: str) -> Tensor:
        """Return a tensor of the dense model."""
        if name + _CODES in self._parts:
            codes, scales = self._part(name + _CODES), self._part(name + _SCALES)
            group = self._config.weight_group
            columns = codes.shape[1]
            return Coded(codes, scales, columns if group == "row" else min(int(group), columns)).read()
        module = name.removesuffix(".weight")
        if module + _B in self._parts:
            factors = factors_of(self._config)
            assert factors is not None
            base = self._part(name) if name in self._parts else None
            return dense_matrix(base, self._part(module + _A), self._part(module + _B), factors.scale)
        return self._part(name)

    def _part(self, name: str) -> Tensor:
        return self._saved.read(f"model.{name}")


# All files are of one commit: that of config.json, which the model is built by.
def _downloaded(repository: str) -> Path:
    """Download the safetensors of a repository of the hub; return the folder that holds them."""
    folder = download_model(repository, "config.json").parent

    def fetch(file: str) -> bool:
        try:
            download_model(repository, file, goes_on=True)
        except AbsentError:
            return False
        return True

    if not fetch(INDEX):
        if not fetch(WHOLE):
            raise InputError(
                f"--init {repository}: the hub's repository has neither {WHOLE} nor {INDEX}; only safetensors are read"
            )
        return folder
    for file in shards_of(folder, repository):
        if not fetch(file):
            raise InputError(f"--init {repository}: {INDEX} names {file}, which the hub's repository has not")
    return folder
