"""Write a run's model as a plain Hugging Face folder."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from galore_pretrain.dist import ALONE, World
from galore_pretrain.model.lowrank import dense_state
from galore_pretrain.rundir.checkpoint import sync
from galore_pretrain.rundir.directory import write_json
from galore_pretrain.text.tokenizer import Tokenizer

_SHARD_SIZE = "1GB"
"""Size of an exported model's files. It bounds the host memory that exporting from a GPU takes."""


def export(folder: Path, model: Any, tokenizer: Tokenizer, world: World = ALONE) -> None:
    """Write ``model`` and ``tokenizer`` to ``folder``: transformers loads it without this package.

    Factored matrices are written as dense ones. One process writes, to which the others give their parts of the
    weights; all call this together.
    """
    state = dense_state(model, keep=world.is_main)
    world.on_rank_zero(lambda: _write_model(folder, model, state, tokenizer))


# As a checkpoint, the folder is whole or absent: it is written aside, forced to disk, and then renamed.
def _write_model(folder: Path, model: Any, state: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write the weights ``state``, the model's config and the tokenizer to ``folder``."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    transformers.utils.logging.disable_progress_bar()
    # A shard's tensors are copied to the host together, and let go before the next shard's.
    model.save_pretrained(aside, state_dict=state, max_shard_size=_SHARD_SIZE)
    tokenizer.save(aside, model_max_length=model.config.max_position_embeddings)
    for name in ("config.json", "generation_config.json"):
        _amend(aside / name, {"use_cache": True})  # training has no use for a cache, generation has
    _name_beginning(aside / "tokenizer_config.json")
    # safetensors makes its files private to the user. They get the mode of every other file instead.
    mode = (aside / "config.json").stat().st_mode
    for file in aside.glob("*.safetensors"):
        file.chmod(mode)
    for file in aside.iterdir():
        sync(file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


def _amend(file: Path, changes: Mapping[str, Any]) -> None:
    """Change values of a JSON file."""
    write_json(file, json.loads(file.read_text()) | changes)


# In training, the end of a document stands before the next one, as in GPT-2. Programs that ask for a beginning by name,
# such as CTranslate2's converter, get that: without any, the files that it makes cannot be loaded.
def _name_beginning(file: Path) -> None:
    """Name the end marker as the beginning of a text where a tokenizer has none. No text gets one by that."""
    if not file.exists():  # a SentencePiece model alone
        return
    settings = json.loads(file.read_text())
    if settings.get("bos_token") is None and settings.get("eos_token") is not None:
        _amend(file, {"bos_token": settings["eos_token"], "add_bos_token": False})
