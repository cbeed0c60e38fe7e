"""Open what fine-tuning on a task of GLUE reads: an encoder, its tokenizer, and examples with their labels."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.tasks import GLUE_DATA
from galore_pretrain.errors import InputError
from galore_pretrain.model.architecture import architecture_of_run
from galore_pretrain.model.encoder import positions_of_encoder
from galore_pretrain.model.families import Architecture
from galore_pretrain.optim import method
from galore_pretrain.text.glue import TASKS, Examples, Task, read_examples
from galore_pretrain.text.labelled import ExampleBatches, encode, load_pair_tokenizer
from galore_pretrain.text.tokenizer import Ids, download_hub_tokenizer, find_tokenizer


class PairTokenizer:
    """The tokenizer that an encoder came with, by which one text or two become a row. ``form`` is transformers' own."""

    def __init__(self, place: str) -> None:
        self.name = place
        folder = find_tokenizer(place) or download_hub_tokenizer(place)
        self.form = load_pair_tokenizer(folder, f"--tokenizer {place}")
        self.pad_id: int = self.form.pad_token_id
        self.vocab_size = max(self.form.get_vocab().values()) + 1
        content = json.loads(self.form.backend_tokenizer.to_str())
        content["padding"] = content["truncation"] = None  # which each call sets
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """Return the files, by name, of which transformers makes this tokenizer again: a checkpoint holds them."""
        with tempfile.TemporaryDirectory() as name:
            self.form.save_pretrained(name)
            return {file.name: file.read_bytes() for file in sorted(Path(name).iterdir())}

    def save(self, folder: Path, model_max_length: int, vocabulary: int) -> None:
        """Write what ``AutoTokenizer.from_pretrained(folder)`` needs."""
        self.form.save_pretrained(folder)


@dataclass(frozen=True)
class EncodedExamples:
    """Holds the examples of one split, and the token ids of each."""

    examples: Examples
    ids: Sequence[Ids]


@dataclass(frozen=True)
class ExampleInputs:
    """Holds the encoder's architecture, and the examples of a task by split, as tokens.

    ``method`` is the digest of the file of a method from outside the package; None of any other method.
    """

    model: Architecture
    tokenizer: PairTokenizer
    task: Task
    training: EncodedExamples
    validation: Mapping[str, EncodedExamples]
    method: str | None = None

    @property
    def revision(self) -> str | None:
        """Return the commit of examples on the hub; None for any others."""
        return self.training.examples.revision

    @property
    def splits(self) -> Mapping[str, EncodedExamples]:
        """Return all splits by their names."""
        return {"train": self.training, **self.validation}

    def batches(self, config: RunConfig) -> ExampleBatches:
        """Return the training examples in batches, one an update."""
        labels = self.training.examples.labels
        return ExampleBatches(self.training.ids, labels, config.total_batch_size, config.seed, self.tokenizer.pad_id)

    def updates_an_epoch(self, sequences: int) -> int:
        """Return how many updates of so many sequences take each training example once; the last may have fewer."""
        return -(-len(self.training.ids) // sequences)

    def fingerprints(self, format_number: int | None = None) -> dict[str, str]:
        """Return what must not change before the run is resumed: the same flags can name other files by then."""
        fingerprints = {
            "model": json.dumps(self.model.to_diff_dict(), sort_keys=True),
            "training text": self.training.examples.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
        }
        for split, encoded in self.validation.items():
            fingerprints[f"{split} text"] = encoded.examples.fingerprint
        if self.method is not None:
            fingerprints["method"] = self.method
        return fingerprints

    def as_json(self) -> dict[str, int]:
        """Return the number of examples of each split."""
        return {split: len(encoded.ids) for split, encoded in self.splits.items()}


def open_examples(config: RunConfig, revision: str | None = None) -> ExampleInputs:
    """Open everything that a run on a task reads. Of examples on the hub, ``revision`` is read: by default the newest.

    Raises InputError where something is missing or does not fit the rest.
    """
    assert config.task is not None
    assert isinstance(config.data, str)
    task = TASKS[config.task]
    folder = None if config.data == GLUE_DATA else config.data
    architecture = architecture_of_run(config)
    tokenizer = PairTokenizer(config.tokenizer)
    _fit_together(config, architecture, tokenizer)
    encoded = {}
    for split in ("train", *task.validation):
        examples = read_examples(task, folder, split, revision)
        revision = examples.revision  # all splits are of one commit
        encoded[split] = EncodedExamples(examples, encode(examples, tokenizer.form, config.max_length))
    training = encoded.pop("train")
    return ExampleInputs(architecture, tokenizer, task, training, encoded, method(config.optim).digest)


def _fit_together(config: RunConfig, architecture: Architecture, tokenizer: PairTokenizer) -> None:
    """Raise InputError where the encoder has no embedding for a token, or no position for one."""
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"--tokenizer {config.tokenizer} produces ids up to {tokenizer.vocab_size - 1}, but --model "
            f"{config.model} has a vocabulary of {architecture.vocab_size}; use another of the two"
        )
    if tokenizer.pad_id != architecture.pad_token_id:
        raise InputError(
            f"--tokenizer {config.tokenizer} pads with {tokenizer.pad_id}, and --model {config.model} with "
            f"{architecture.pad_token_id}; use the tokenizer that the model came with"
        )
    positions = positions_of_encoder(architecture)
    if config.max_length > positions:
        raise InputError(
            f"--max-length {config.max_length} exceeds the {positions} positions of --model {config.model}; "
            f"give --max-length {positions}, or less"
        )
