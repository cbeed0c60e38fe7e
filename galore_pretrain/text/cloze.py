"""Makes a cloze test of a text: contexts, each with its true continuation among those of other documents."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from galore_pretrain.errors import InputError

CHOICES = 4
"""Continuations of an item, one of them the true one."""
_CONTEXT = (60, 500)  # characters of a context, at least and at most
_CONTINUATION = (20, 150)  # of a continuation
_POOL = 8  # places that are looked for, for each item wanted
_NEAREST = 12  # continuations of other documents, next to the true one in length, of which three are drawn
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s|$)|[。！？]+[」』”）]*")


@dataclass(frozen=True)
class Place:
    """Says where in a text an item can stand: a ``context`` of whole sentences, and the sentence that follows it.

    ``space`` is the white space between. ``document`` counts the text's documents.
    """

    document: int
    context: str
    space: str
    continuation: str


@dataclass(frozen=True)
class Item:
    """A ``context``, and four ``choices`` of how it goes on, white space first; number ``answer`` is the true one."""

    context: str
    choices: tuple[str, ...]
    answer: int


# The items follow from the text and the seed alone, whatever the tokenizer and the model are: lengths are counted in
# characters. Places are gathered from the beginning of the text, in its order. Of them, as many as are wanted are drawn
# for items. The three wrong continuations of one are drawn from the twelve that are next to the true one in length,
# of other documents, so that length tells nothing, nor does the white space, which is the true one's for all four.
def cloze_items(documents: Iterable[str], count: int, seed: int) -> list[Item]:
    """Return ``count`` items of a text, or as many as it has places for.

    Raises InputError where that is less than two: a share of one item has no error.
    """
    places: list[Place] = []
    for number, text in enumerate(documents):
        places += _places(number, text)
        if len(places) >= _POOL * count:
            break
    places.sort(key=lambda place: len(place.continuation.encode()))  # stable, so the order of the text decides ties
    rng = np.random.default_rng(seed)
    items: list[Item] = []
    for chosen in rng.permutation(len(places)).tolist():
        if len(items) == count:
            break
        others = _neighbours(places, chosen)
        if len(others) < CHOICES - 1:
            continue
        place = places[chosen]
        choices = [others[i] for i in rng.choice(len(others), CHOICES - 1, replace=False)]
        answer = int(rng.integers(CHOICES))
        choices.insert(answer, place.continuation)
        items.append(Item(place.context, tuple(place.space + choice for choice in choices), answer))
    if len(items) < 2:
        raise InputError(
            f"--cloze {count}: the validation text has {len(places)} sentences that continue others, and needs some of "
            f"{CHOICES} documents; name a longer text with --eval-data"
        )
    return items


def _places(document: int, text: str) -> Iterator[Place]:
    """Yield the places of a document, of which no two share a sentence."""
    sentences = _sentences(text)
    first = 0  # sentence of the context
    for number in range(1, len(sentences)):
        context_end = sentences[number - 1][1]
        while first < number and context_end - sentences[first][0] > _CONTEXT[1]:
            first += 1
        start, stop = sentences[number]
        has_context = first < number and context_end - sentences[first][0] >= _CONTEXT[0]
        fits = _CONTINUATION[0] <= stop - start <= _CONTINUATION[1] and "\n" not in text[start:stop]
        if has_context and fits:
            yield Place(document, text[sentences[first][0] : context_end], text[context_end:start], text[start:stop])
            first = number + 1


def _sentences(text: str) -> list[tuple[int, int]]:
    """Return where each sentence of a text begins and ends, without the white space around it.

    An end is a mark of punctuation before white space; an abbreviation is taken for one.
    """
    sentences: list[tuple[int, int]] = []
    start = 0
    for end in _SENTENCE_END.finditer(text):
        while text[start].isspace():
            start += 1
        sentences.append((start, end.end()))
        start = end.end()
    return sentences


def _neighbours(places: Sequence[Place], chosen: int) -> list[str]:
    """Return the continuations next to that of a place, among places by length, of other documents and other words."""
    place = places[chosen]
    found: dict[str, None] = {}
    for distance in range(1, len(places)):
        for other in (chosen - distance, chosen + distance):
            if not 0 <= other < len(places):
                continue
            is_other = places[other].document != place.document
            if is_other and places[other].continuation != place.continuation:
                found[places[other].continuation] = None
        if len(found) >= _NEAREST:
            break
    return list(found)[:_NEAREST]
