"""Open everything that a run reads, and check that it fits together, before any weight exists."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from galore_pretrain.config.options import RunConfig, texts_of
from galore_pretrain.config.tasks import CHAT
from galore_pretrain.errors import InputError
from galore_pretrain.model.families import Architecture, window_of
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import method
from galore_pretrain.text.batches import TokenRows, count_rows, shard_order, validation_rows
from galore_pretrain.text.chat import ChatRows
from galore_pretrain.text.readers import Record
from galore_pretrain.text.sources import (
    DocumentSource,
    HubDataset,
    first_documents,
    in_turn,
    open_source,
    parts_without_text,
)
from galore_pretrain.text.tokenizer import Begun, Tokenizer, begun, load_tokenizer
from galore_pretrain.text.usable import TextShares, measure

VALIDATION_TEXT = "validation text"
"""What a checkpoint calls the fingerprint of the text that a run is evaluated on."""
_TRIED_TEXTS = 16
_TRIED_CHARACTERS = 4000  # of each

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Holds the model's architecture, both splits of the text, and how they become rows of tokens.

    ``method`` is the digest of the file of a method from outside the package; None of any other method. ``further`` are
    the texts that are evaluated beside the validation text, by their names.
    """

    model: Architecture
    training: DocumentSource
    validation: DocumentSource
    tokenizer: Tokenizer
    rows: TokenRows | ChatRows
    method: str | None = None
    further: Mapping[str, DocumentSource] = field(default_factory=dict)

    @property
    def bos(self) -> str:
        """Return whether documents begin with a marker, as ``--bos`` says it: yes or no."""
        return "yes" if isinstance(self.tokenizer, Begun) else "no"

    @property
    def revision(self) -> str | None:
        """Return the commit of a text on the hub; None for any other text."""
        if isinstance(self.training, HubDataset):
            return self.training.revision
        return None

    def updates_an_epoch(self, sequences: int) -> int:
        """Return how many updates of so many sequences the training text fills, by its rows in their first order."""
        rows = count_rows(self.training, self.rows)
        if rows < sequences:
            log.warning(
                "an update of %d rows takes the text's %d rows more than once; --total-batch-size %d does not",
                sequences,
                rows,
                rows,
            )
        return max(1, rows // sequences)

    def first_texts(self) -> list[str]:
        """Return the beginnings of a few documents, on which the exported tokenizer is tried."""
        validation = self.validation
        with validation.bad_data.trial():
            return [text[:_TRIED_CHARACTERS] for _, _, text in islice(in_turn(validation), _TRIED_TEXTS)]

    def fingerprints(self, format_number: int | None = None) -> dict[str, str]:
        """Return what must not change before the run is resumed: the same flags can name other files by then.

        With a ``format_number``, they are as a checkpoint of this format holds them: up to 2, a tokenizer's is of its
        vocabulary alone.
        """
        tokenizer = self.tokenizer.fingerprint
        if format_number is not None and format_number <= 2:
            tokenizer = self.tokenizer.vocabulary_fingerprint
        fingerprints = {
            "model": json.dumps(self.model.to_diff_dict(), sort_keys=True),
            "training text": self.training.fingerprint,
            VALIDATION_TEXT: self.validation.fingerprint,
            "tokenizer": tokenizer,
        }
        for name, source in self.further.items():
            fingerprints[further_key(name)] = source.fingerprint
        if isinstance(self.rows, ChatRows):
            fingerprints["chat template"] = self.rows.fingerprint
        if self.method is not None:
            fingerprints["method"] = self.method
        return fingerprints


def open_inputs(config: RunConfig, revision: str | None = None) -> Inputs:
    """Open everything that a run reads. Of a text on the hub, ``revision`` is read: by default the newest.

    Raises InputError where something is missing or does not fit the rest.
    """
    bos = config.bos
    if bos == "auto" and config.init is None:  # new weights learn what they see, and the published runs have no marker
        bos = "no"
    tokenizer = begun(load_tokenizer(config.tokenizer, with_template=config.task == CHAT), bos)
    rows = rows_for(config, tokenizer)
    eval_paths = [text.path for text in config.eval_texts]
    training = open_source(config.data, "train", eval_paths, config.bad_data, revision, key_of(config, rows))
    validation, further = open_validation(config, rows, revision)
    architecture = architecture_for(config, tokenizer)
    # Reading one row fails now, not hours later at the first evaluation, where there is no validation text.
    validation_rows(validation, rows, tokens=1)
    for name, source in further.items():
        validation_rows(source, rows, tokens=1, flag=f"--eval-data {name}")
    for number in parts_without_text(validation):
        raise InputError(
            f"--data {texts_of(config.data)[number]}: no validation document can be read there, and the others are not "
            "to stand for it; mend its validation files, or give --eval-data"
        )
    return Inputs(architecture, training, validation, tokenizer, rows, method(config.optim).digest, further)


def open_validation(
    config: RunConfig, rows: TokenRows | ChatRows, revision: str | None
) -> tuple[DocumentSource, dict[str, DocumentSource]]:
    """Open the validation text, and the further ones that ``--eval-data`` names, by their names."""
    key = key_of(config, rows)

    def opened(eval_path: str | None) -> DocumentSource:
        return open_source(config.data, "validation", eval_path, config.bad_data, revision, key)

    if not config.eval_texts:
        return opened(None), {}
    first, *others = config.eval_texts
    return opened(first.path), {text.name: opened(text.path) for text in others}


def further_key(name: str) -> str:
    """Return what a checkpoint calls the fingerprint of a text that is evaluated beside the validation text."""
    return f"{VALIDATION_TEXT} {name}"


# A run that goes on is not refused: its weights have seen the text, and an older version may have begun it.
def check_text(config: RunConfig, inputs: Inputs, *, is_new: bool) -> TextShares:
    """Measure how much of the training text cannot be used, and return it.

    Raises InputError where that is beyond ``--max-unknown`` and the run is new; of one that goes on, a warning tells.
    """
    first_shard = shard_order(inputs.training, config.seed)[0]
    shares = measured(first_documents(inputs.training, first_shard), inputs.tokenizer, inputs.rows)
    fault = shares.fault(config.max_unknown)
    if fault is None:
        return shares
    told = f"--data {' + '.join(texts_of(config.data))}: {fault.what}"
    if is_new:
        raise InputError(f"{told}; {fault.way_out}, or give --max-unknown 1 to train on it all the same")
    log.warning(told)
    return shares


def architecture_for(config: RunConfig, tokenizer: Tokenizer) -> Architecture:
    """Return the model's architecture with the tokenizer's control tokens; InputError where the two do not fit."""
    architecture = load_model_config(config.model)
    fit_together(config, architecture, tokenizer)
    return architecture


def fit_together(config: RunConfig, architecture: Architecture, tokenizer: Tokenizer) -> None:
    """Give an architecture the tokenizer's control tokens; InputError where the two, or the rows, do not fit."""
    rows = rows_for(config, tokenizer)
    check_vocabulary(config, architecture, tokenizer, rows.vocab_size if isinstance(rows, ChatRows) else None)
    check_length(config, architecture)
    architecture.eos_token_id = tokenizer.eos_id
    if isinstance(rows, ChatRows) and len(rows.ends) > 1:  # an answer ends with the end of its turn
        architecture.eos_token_id = rows.ends
    architecture.bos_token_id = tokenizer.bos_id if isinstance(tokenizer, Begun) else None


def check_vocabulary(
    config: RunConfig, architecture: Architecture, tokenizer: Tokenizer, size: int | None = None
) -> None:
    """Raise InputError where the tokenizer, or a template with it, produces an id that the model has no embedding for.

    ``size`` is one more than the largest id; by default that of the tokenizer alone.
    """
    vocabulary = architecture.vocab_size
    produced = tokenizer.vocab_size if size is None else size
    if produced > vocabulary:
        raise InputError(
            f"--tokenizer {tokenizer.name} produces ids up to {produced - 1}, but --model {config.model} "
            f"has a vocabulary of {vocabulary}; use another of the two"
        )


def rows_for(config: RunConfig, tokenizer: Tokenizer) -> TokenRows | ChatRows:
    """Return how text, or conversations, become rows of tokens."""
    is_separate = config.documents == "separate"
    if config.task == CHAT:
        return ChatRows(tokenizer, config.layout, config.max_length, separate=is_separate)
    return TokenRows(tokenizer, config.layout, config.max_length, separate=is_separate)


def key_of(config: RunConfig, rows: TokenRows | ChatRows) -> str | Record:
    """Return the key of a document's text in an object or a row of ``--data``, or what makes it of the whole."""
    return rows.record if isinstance(rows, ChatRows) else config.text_key


def measured(documents: Sequence[str], tokenizer: Tokenizer, rows: TokenRows | ChatRows) -> TextShares:
    """Measure how much of some documents cannot be used."""
    if isinstance(rows, ChatRows):
        return rows.measure(documents)
    return measure(documents, tokenizer, rows.kept)


def check_length(config: RunConfig, architecture: Architecture) -> None:
    """Raise InputError where rows are longer than the model has positions."""
    positions = architecture.max_position_embeddings
    if config.max_length > positions:
        raise InputError(
            f"--max-length {config.max_length} exceeds the {positions} positions of --model {config.model}: "
            f"name a copy of its JSON with max_position_embeddings {config.max_length} (and for weights "
            "that were trained with fewer, with a rope_theta or rope_scaling that reaches so far), or "
            f"give --max-length {positions}, or less"
        )
    window = window_of(architecture)
    if window is not None and config.max_length > window:
        raise InputError(
            f"--max-length {config.max_length} exceeds the window of {window} positions in which layers of --model "
            f"{config.model} attend, and longer rows are not built here; give --max-length {window}, or less"
        )
    if config.documents == "separate":
        _check_turning(config, architecture)


# Heads that turn by longrope turn all tokens of a micro-batch by the longest text in it. Rows of joined documents are
# all as long. Of separate ones, what a document is turned by would follow from its neighbours.
def _check_turning(config: RunConfig, architecture: Architecture) -> None:
    """Raise InputError where the heads of a document would turn by the length of another one."""
    rope = architecture.rope_parameters or {}
    short = rope.get("original_max_position_embeddings", architecture.max_position_embeddings)
    if rope.get("rope_type") == "longrope" and config.max_length > short:
        raise InputError(
            f"--documents separate: the heads of --model {config.model} turn by the longest text of a batch (longrope, "
            f"beyond {short} tokens), so a document by what is beside it; give --max-length {short}, or less, or leave "
            "it out"
        )
