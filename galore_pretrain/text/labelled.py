"""Labelled texts to batches: token ids as the model's own tokenizer makes them, and updates in a seeded order."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from galore_pretrain.errors import InputError
from galore_pretrain.text.batches import IGNORE, Batch
from galore_pretrain.text.glue import Examples, Labels
from galore_pretrain.text.hub import first_line
from galore_pretrain.text.tokenizer import Ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TOKENIZE = 4096  # examples a call to the tokenizer
_SHOWN = 60  # characters of a text that an error shows


# -- tokens -----------------------------------------------------------------------------------------------------------


def load_pair_tokenizer(folder: Path, name: str) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a model's folder, with the template by which it joins two texts. No code of it is run.

    transformers takes its class from ``tokenizer_config.json``, or else from the model's ``config.json``. ``name`` is
    what messages call the folder. Raises InputError where it has no fast tokenizer, or none with a padding token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a folder of somebody else's JSON raises whatever it raises
        raise InputError(f"{name}: its tokenizer cannot be loaded ({first_line(error)})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{name}: has no fast tokenizer (tokenizer.json)")
    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    if len(ordinary) < 2:  # what transformers builds, silently, where it finds no vocabulary
        raise InputError(f"{name}: its tokenizer has no tokens but special ones; is tokenizer.json missing?")
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"{name}: its tokenizer has no padding token; name one in tokenizer_config.json, as in "
            '{"pad_token": "<pad>"}'
        )
    return tokenizer


def encode(examples: Examples, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> list[Ids]:
    """Return the token ids of each example as a call of the tokenizer makes them: RoBERTa's ``<s> a </s></s> b </s>``.

    Of two texts that are longer than ``max_length`` together, the longer one is cut first. Raises InputError where a
    text cannot be written, or has the padding token in it, by which padding is told from text.
    """
    is_pair = len(examples.texts[0]) > 1
    markers = tokenizer.num_special_tokens_to_add(pair=is_pair)
    if max_length <= markers:
        raise InputError(f"--max-length {max_length}: leaves no room for text beside {markers} markers; give more")
    encoded: list[Ids] = []
    for start in range(0, len(examples), _TOKENIZE):
        group = examples.texts[start : start + _TOKENIZE]
        columns = [list(column) for column in zip(*group, strict=True)]
        try:
            made = tokenizer(
                *columns,
                truncation=True,
                max_length=max_length,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
        except Exception as error:  # the library has no class of its own
            raise InputError(
                f"--model: its tokenizer cannot write a text ({first_line(error)}); use a model whose tokenizer knows "
                "all characters, or has an unknown token"
            ) from error
        encoded += [np.array(ids, np.int32) for ids in made["input_ids"]]
    for texts, ids in zip(examples.texts, encoded, strict=True):
        if tokenizer.pad_token_id in ids:
            raise InputError(
                f"--model: its tokenizer writes {repr(texts)[:_SHOWN]}… with its padding token, "
                f"{tokenizer.pad_token!r}; take it out of the text, or use a model whose padding token is no other's"
            )
    return encoded


# -- batches ----------------------------------------------------------------------------------------------------------


class ExampleBatches:
    """An endless iterable of shuffled updates of labelled texts, starting after the loaded state if there is one.

    ``encoded`` has the token ids of each example, and ``labels`` its label. ``sequences`` are the rows of an update, of
    which process ``rank`` of ``size`` gets its part; the last update of an epoch has what is left. Padding is
    ``pad_id``. It stands in for `TrainingData`.
    """

    # An epoch's order follows from (seed, epoch), so a position is two numbers: the epoch, and how many of its rows
    # were taken. Of an update's rows the first process takes the first part, the second the next, and so on, as of any
    # other text. All parts of an update have as many rows and are as long, whatever is left of an epoch: processes that
    # share weights have to make as many micro-batches. What a process lacks is filled with a row whose label is IGNORE,
    # which neither the loss nor a number counts. Its ids are those of a real row: a row of padding alone would have
    # nothing to attend to, and come out as NaN.

    def __init__(
        self,
        encoded: Sequence[Ids],
        labels: Labels,
        sequences: int,
        seed: int,
        pad_id: int,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        assert len(encoded) == len(labels) > 0
        self._encoded = encoded
        self._labels = labels
        self._sequences = sequences
        self._seed = seed
        self._pad_id = pad_id
        self._rank = rank
        self._size = size
        self._epoch = 0
        self._taken = 0

    @property
    def updates_an_epoch(self) -> int:
        """Return how many updates an epoch has, the last one included."""
        return -(-len(self._encoded) // self._sequences)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that carried ``state``."""
        self._epoch = state["epoch"]
        self._taken = state["taken"]

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's batches without end."""
        epoch, taken = self._epoch, self._taken
        while True:
            rng = np.random.default_rng([self._seed, epoch])
            order = rng.permutation(len(self._encoded))
            while taken < len(order):
                numbers = order[taken : taken + self._sequences]
                taken += len(numbers)
                yield self._update(numbers, {"epoch": epoch, "taken": taken})
            epoch += 1
            taken = 0

    def _update(self, numbers: NDArray[np.int64], state: dict[str, Any]) -> Batch:
        """Return this process's part of an update of the examples with these ``numbers``."""
        length = max(len(self._encoded[i]) for i in numbers)
        part = -(-len(numbers) // self._size)
        first = self._rank * part
        own = numbers[first : first + part]
        rows = [self._encoded[i] for i in own]
        labels = np.full(part, IGNORE, self._labels.dtype)
        labels[: len(own)] = self._labels[own]
        tokens = sum(len(row) for row in rows)
        rows += [self._encoded[numbers[0]]] * (part - len(own))
        check = 0
        if self._size > 1:
            for i in numbers:
                check = zlib.crc32(self._encoded[i].tobytes() + self._labels[i].tobytes(), check)
        return _padded(rows, labels, length, self._pad_id, tokens, state, check)


def validation_batches(encoded: Sequence[Ids], labels: Labels, batch_size: int, pad_id: int) -> list[Batch]:
    """Return all examples in their order, ``batch_size`` a batch, the last of which has what is left."""
    batches: list[Batch] = []
    for start in range(0, len(encoded), batch_size):
        rows = encoded[start : start + batch_size]
        lengths = [len(row) for row in rows]
        batches.append(_padded(rows, labels[start : start + batch_size], max(lengths), pad_id, sum(lengths), {}))
    return batches


def _padded(
    rows: Sequence[Ids],
    labels: Labels,
    length: int,
    pad_id: int,
    tokens: int,
    state: dict[str, Any],
    check: int = 0,
) -> Batch:
    """Return rows as one batch of ``length`` ids each, padded at their ends."""
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    for padded, row in zip(input_ids, rows, strict=True):
        padded[: len(row)] = row
    return Batch(torch.from_numpy(input_ids), torch.tensor(labels), tokens, state, check)
