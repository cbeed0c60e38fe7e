"""Scores a model on a cloze test: which of four continuations it takes for the likeliest."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from galore_pretrain.errors import InputError
from galore_pretrain.model.head import token_losses
from galore_pretrain.text.batches import IGNORE
from galore_pretrain.text.cloze import CHOICES, Item
from galore_pretrain.text.tokenizer import Begun, Ids, Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClozeScore:
    """Holds the share of the ``items`` that were right, and its standard error.

    ``acc_norm`` is the field's name for a choice by log-probability over bytes.
    """

    acc_norm: float
    acc_norm_stderr: float
    items: int

    def metrics(self) -> dict[str, float]:
        """Return the values under their keys, as ``eval --json`` prints them."""
        return {f"cloze_{name}": value for name, value in vars(self).items()}


@dataclass(frozen=True)
class _Choice:
    """The token ids of a context and a continuation, which are the last ``scored`` of them and have so many bytes."""

    ids: Ids
    scored: int
    size: int


# A model's answer is the continuation with the largest log-probability a byte: a sum over tokens favours short ones,
# and a mean over tokens depends on the tokenizer.
@torch.no_grad()
def score_cloze(
    model: Any,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    max_length: int,
    batch_size: int,
    device: torch.device,
) -> ClozeScore:
    """Score ``model`` (in eval mode) on ``items``, ``batch_size`` continuations at a time.

    Contexts are cut at their beginning where ``max_length`` tokens do not hold them. Raises InputError where these do
    not hold a continuation.
    """
    choices = _tokenized(tokenizer, items)
    longest = max(choice.scored for choice in choices)
    if longest > max_length:
        raise InputError(
            f"--cloze: a continuation has {longest} tokens, and --max-length is {max_length}; give at least {longest}"
        )
    cut = sum(len(choice.ids) > max_length + 1 for choice in choices)
    if cut:
        log.warning("--cloze: %d of %d contexts are cut to --max-length %d", cut, len(choices), max_length)
    by_byte: list[float] = []
    for start in range(0, len(choices), batch_size):
        batch = choices[start : start + batch_size]
        input_ids, labels = _stacked(batch, max_length, tokenizer.eos_id)
        losses = token_losses(model, input_ids.to(device), labels.to(device))
        sums = losses.double().sum(1).cpu().tolist()
        for choice, loss in zip(batch, sums, strict=True):
            by_byte.append(-loss / choice.size)
    answers = np.array(by_byte).reshape(-1, CHOICES).argmax(1)
    right = [int(answer) == item.answer for answer, item in zip(answers, items, strict=True)]
    share = sum(right) / len(items)
    error = math.sqrt(share * (1 - share) / (len(items) - 1))
    return ClozeScore(share, error, len(items))


# Context and continuation are tokenized as one text, as the model has seen text. Where its first tokens are those of
# the context alone, the rest is the continuation. Where a token goes across the place between them, or the continuation
# changes how the context is tokenized, the two are tokenized apart.
def _tokenized(tokenizer: Tokenizer, items: Sequence[Item]) -> list[_Choice]:
    """Return the choices of all items in their order."""
    contexts = tokenizer.encode([item.context for item in items])
    texts: list[str] = []
    whole_texts: list[str] = []
    for item in items:
        texts += item.choices
        whole_texts += [item.context + choice for choice in item.choices]
    wholes = tokenizer.encode(whole_texts)
    apart = tokenizer.encode(texts)
    marker = int(isinstance(tokenizer, Begun))  # of a beginning, which a continuation has not
    choices: list[_Choice] = []
    for number, (text, whole) in enumerate(zip(texts, wholes, strict=True)):
        context = contexts[number // CHOICES]
        ids = whole
        is_split = len(whole) > len(context) and np.array_equal(whole[: len(context)], context)
        if not is_split:
            ids = np.concatenate([context, apart[number][marker:]])
        choices.append(_Choice(ids, len(ids) - len(context), len(text.encode())))
    return choices


def _stacked(choices: Sequence[_Choice], max_length: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return choices as input ids and labels (choices × tokens, int64), with labels at continuations alone."""
    all_ids = [choice.ids[-max_length - 1 :] for choice in choices]
    length = max(map(len, all_ids)) - 1
    input_ids = torch.full((len(choices), length), padding)
    labels = torch.full((len(choices), length), IGNORE)
    for row, (choice, ids) in enumerate(zip(choices, all_ids, strict=True)):
        end = len(ids) - 1
        row_ids = torch.from_numpy(ids.astype(np.int64))
        input_ids[row, :end] = row_ids[:-1]
        labels[row, end - choice.scored : end] = row_ids[len(ids) - choice.scored :]
    return input_ids, labels
