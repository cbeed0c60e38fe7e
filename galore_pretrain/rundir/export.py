"""Write a run's model as a plain Hugging Face folder."""

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from galore_pretrain.dist import ALONE, World
from galore_pretrain.errors import InputError
from galore_pretrain.model.families import Architecture
from galore_pretrain.model.lowrank import dense_state
from galore_pretrain.rundir.checkpoint import sync
from galore_pretrain.rundir.directory import write_json
from galore_pretrain.tensors.coded import Coded, codes_of
from galore_pretrain.text.hub import first_line
from galore_pretrain.text.tokenizer import PROBES, Tokenizer

_SHARD_SIZE = "1GB"
"""Size of an exported model's files. It bounds the host memory that exporting from a GPU takes."""
_SHOWN = 60  # characters of a text that a warning shows, at most
_SHOWN_IDS = 8  # ids that come behind them

log = logging.getLogger(__name__)


class Saveable(Protocol):
    """A tokenizer, of texts or of their pairs."""

    def save(self, folder: Path, model_max_length: int, vocabulary: int) -> None:
        """Write what ``AutoTokenizer.from_pretrained(folder)`` needs."""
        ...


def export(folder: Path, model: Any, tokenizer: Saveable, world: World = ALONE) -> None:
    """Write ``model`` and ``tokenizer`` to ``folder``: transformers loads it without this package.

    Factored matrices are written as dense ones. One process writes, to which the others give their parts of the
    weights; all call this together.
    """
    state = dense_state(model, keep=world.is_main)
    world.on_rank_zero(lambda: _write_model(folder, model, state, tokenizer))


# As a checkpoint, the folder is whole or absent: it is written aside, forced to disk, and then renamed.
def _write_model(folder: Path, model: Any, state: Mapping[str, Tensor], tokenizer: Saveable) -> None:
    """Write the weights ``state``, the model's config and the tokenizer to ``folder``."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    transformers.utils.logging.disable_progress_bar()
    codes: dict[str, Coded] = {}
    for name, p in model.named_parameters():
        coded = codes_of(p)
        if coded is not None:
            codes[name] = coded
    if codes:
        _write_read(aside, model, state, codes)
    else:
        # A shard's tensors are copied to the host together, and let go before the next shard's.
        model.save_pretrained(aside, state_dict=state, max_shard_size=_SHARD_SIZE)
    _save_tokenizer(aside, model.config, tokenizer)
    for name in ("config.json", "generation_config.json"):
        if (aside / name).exists():  # an encoder generates nothing
            _amend(aside / name, {"use_cache": True})  # training has no use for a cache, generation has
    # safetensors makes its files private to the user. They get the mode of every other file instead.
    mode = (aside / "config.json").stat().st_mode
    for file in aside.glob("*.safetensors"):
        file.chmod(mode)
    for file in aside.rglob("*"):
        sync(file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


# transformers wants all weights at once, and codes take half the memory of what they stand for.
def _write_read(folder: Path, model: Any, state: Mapping[str, Tensor], codes: Mapping[str, Coded]) -> None:
    """Write a model's config and weights as transformers does, what ``codes`` stand for a shard at a time."""
    architecture = copy.deepcopy(model.config)
    architecture.architectures = [type(model).__name__]
    architecture.dtype = str(model.dtype).removeprefix("torch.")
    architecture.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tied = set()
    if architecture.tie_word_embeddings:
        tied.add("lm_head.weight")
    kept = {name: value for name, value in state.items() if name not in tied}
    split = split_torch_state_dict_into_shards(kept, max_shard_size=_SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            value = codes[name].read(kept[name].dtype) if name in codes else kept[name]
            shard[name] = value.cpu().contiguous()
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


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
    if any("bos_token" in template.read_text() for template in file.parent.rglob("*.jinja")):  # which would write it
        return
    if settings.get("bos_token") is None and settings.get("eos_token") is not None:
        _amend(file, {"bos_token": settings["eos_token"], "add_bos_token": False})


def _save_tokenizer(folder: Path, architecture: Architecture, tokenizer: Saveable) -> None:
    """Write the tokenizer's files for a model of this architecture."""
    tokenizer.save(folder, architecture.max_position_embeddings, architecture.vocab_size)
    _name_beginning(folder / "tokenizer_config.json")


# What a user of the exported model gets is what AutoTokenizer makes of its folder. No rule says what that is for every
# tokenizer, so it is tried: with texts that are known to be treated in different ways, with the spelling of the special
# tokens, and with the beginning of the run's own text. It is tried before training, when another tokenizer can be had.
def try_export(architecture: Architecture, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Warn where ``AutoTokenizer`` will not give the exported model the ids of training, of ``texts`` among others."""
    try:
        exported = _exported(architecture, tokenizer)
    except OSError as error:
        log.warning("whether transformers takes --tokenizer %s cannot be tried: %s", tokenizer.name, first_line(error))
        return
    except _NoLikeError as error:
        log.warning(
            "AutoTokenizer will not take the exported folder of --tokenizer %s (%s); to publish the model, use another "
            "tokenizer",
            tokenizer.name,
            error,
        )
        return
    special: list[str] = []
    if exported.split_special_tokens:  # where there is a chat template, they are for prompts to write
        special = [token.content for token in exported.added_tokens_decoder.values()]
    samples = [*PROBES, *special, *(f"a {token} b" for token in special), *texts]
    differing: list[str] = []
    for sample in samples:
        try:
            ours = tokenizer.encode([sample])[0].tolist()
        except InputError:  # it lacks a character, and the run may never need it
            continue
        theirs = exported(sample, verbose=False)["input_ids"]
        is_lone_marker = not ours and theirs == [tokenizer.bos_id]  # a text without tokens is no row in training
        if theirs != ours and not is_lone_marker:
            differing.append(sample)
    if differing:
        first = differing[0]
        theirs = exported(first, verbose=False)["input_ids"]
        ours = tokenizer.encode([first])[0].tolist()
        at = _first_difference(theirs, ours)
        log.warning(
            "AutoTokenizer will give %d of %d texts other ids in model/ than training with --tokenizer %s does; the "
            "first: behind %r come %s, in training %s",
            len(differing),
            len(samples),
            tokenizer.name,
            tokenizer.decode(ours[:at])[-_SHOWN:],
            exported.convert_ids_to_tokens(theirs[at : at + _SHOWN_IDS]),
            exported.convert_ids_to_tokens(ours[at : at + _SHOWN_IDS]),
        )


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the index of the first element that two sequences do not share."""
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


class _NoLikeError(Exception):
    """Raised where transformers cannot load an exported tokenizer. The message is its reason."""


def _exported(architecture: Architecture, tokenizer: Tokenizer) -> Any:
    """Return what ``AutoTokenizer`` makes of the tokenizer in an exported folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        architecture.save_pretrained(folder)
        _save_tokenizer(folder, architecture, tokenizer)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # whatever a class raises at files that are not its own
            raise _NoLikeError(first_line(error)) from error
