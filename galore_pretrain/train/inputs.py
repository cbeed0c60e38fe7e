"""What a run reads, opened and found to fit together before any weight exists."""

import json
from dataclasses import dataclass

from transformers import LlamaConfig

from galore_pretrain.config.options import RunConfig
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.text.batches import TokenRows, validation_rows
from galore_pretrain.text.sources import DocumentSource, HubDataset, open_source
from galore_pretrain.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Inputs:
    """The model's architecture, both splits of the text, and the rows of tokens that they become."""

    model: LlamaConfig
    training: DocumentSource
    validation: DocumentSource
    tokenizer: Tokenizer
    rows: TokenRows

    @property
    def revision(self) -> str | None:
        """The commit of a text on the hub."""
        return self.training.revision if isinstance(self.training, HubDataset) else None

    def fingerprints(self) -> dict[str, str]:
        """Return what must be the same when the run goes on: the same flags can name other files."""
        return {
            "model": json.dumps(self.model.to_diff_dict(), sort_keys=True),
            "training text": self.training.fingerprint,
            "validation text": self.validation.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
        }


def open_inputs(config: RunConfig, revision: str | None = None) -> Inputs:
    """Open everything that a run reads, of a text on the hub that ``revision``, by default the newest; InputError where
    something is not there or does not fit the rest."""
    data, bad = config.data, config.bad_data
    training, validation = (
        open_source(data, split, config.eval_data, bad, revision) for split in ("train", "validation")
    )
    tokenizer = load_tokenizer(config.tokenizer)
    model = architecture_for(config, tokenizer)
    rows = TokenRows(tokenizer, config.layout, config.max_length)
    validation_rows(validation, rows, tokens=1)  # a first one, to know that there are any
    return Inputs(model, training, validation, tokenizer, rows)


def architecture_for(config: RunConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """The model's architecture with the tokenizer's control tokens; InputError where the two do not fit."""
    model = load_model_config(config.model)
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"--tokenizer {tokenizer.name} produces ids up to {tokenizer.vocab_size - 1}, but --model {config.model} "
            f"has a vocabulary of {model.vocab_size}; use another of the two"
        )
    if config.max_length > model.max_position_embeddings:
        raise InputError(
            f"--max-length {config.max_length} exceeds the {model.max_position_embeddings} positions of "
            f"--model {config.model}"
        )
    model.eos_token_id = tokenizer.eos_id
    model.bos_token_id = None  # no row begins with one
    return model
