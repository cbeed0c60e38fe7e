"""Measure how much of a text cannot be used: unknown tokens, characters that are no text, tokens that rows cut away.

All of these train without an error. Unknown tokens stand for characters that the model never sees. Control characters
are what text in another encoding becomes: every other character of UTF-16 that is read as UTF-8 is a NUL.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from galore_pretrain.text.tokenizer import Ids, Tokenizer

# All characters of Unicode's class Cc, but tab, newline, form feed and carriage return.
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_SHOWN = 40  # characters of a text that an error shows


@dataclass(frozen=True)
class Fault:
    """Says ``what`` is wrong with a text, in words that may follow its name, and the ``way_out``."""

    what: str
    way_out: str


@dataclass(frozen=True)
class TextShares:
    """Holds how much of a text cannot be used, in shares from 0 to 1.

    ``unknown``: of its ``tokens``, those that are the unknown one of the ``tokenizer``, which is its name. ``cut``:
    those that have no place in a row. ``control``: of its characters, those that no text has. The examples are the
    beginnings of the documents that have most of them.
    """

    unknown: float
    control: float
    cut: float
    tokens: int
    tokenizer: str
    unknown_example: str
    control_example: str

    def as_json(self) -> dict[str, float]:
        """Return what ``config.json`` holds: the shares, and the number of tokens that were looked at."""
        return {"unknown": self.unknown, "control": self.control, "cut": self.cut, "tokens": self.tokens}

    def fault(self, bound: float) -> Fault | None:
        """Return what is wrong where a share is beyond ``bound``; None where none is. What is cut is never wrong."""
        if self.control > bound:
            return Fault(
                f"{percent(self.control)} of its first characters are NUL and other control characters, more than "
                f"--max-unknown {percent(bound)}, as in {self.control_example!r}; it may be UTF-16, or no text",
                "write it as UTF-8",
            )
        if self.unknown > bound:
            return Fault(
                f"{percent(self.unknown)} of its first tokens are unknown to --tokenizer {self.tokenizer}, more than "
                f"--max-unknown {percent(bound)}, as in {self.unknown_example!r}",
                "use another tokenizer",
            )
        return None


def measure(texts: Sequence[str], tokenizer: Tokenizer, kept: int | None) -> TextShares:
    """Measure how much of ``texts`` cannot be used.

    ``kept`` tokens of each have a place in a row; None where all have. What a tokenizer drops without an unknown token,
    or puts together in one, is not seen.
    """
    return shares(texts, tokenizer.encode(list(texts)), tokenizer, kept)


def shares(texts: Sequence[str], encoded: Sequence[Ids], tokenizer: Tokenizer, kept: int | None) -> TextShares:
    """Measure the same of texts whose token ids are known."""
    unknown: list[int] = []
    control: list[int] = []
    cut = 0
    tokens = 0
    for text, ids in zip(texts, encoded, strict=True):
        tokens += len(ids)
        if kept is not None:
            cut += len(ids[kept:])
        unknown.append(0)
        if tokenizer.unknown_id is not None:
            unknown[-1] = int((ids == tokenizer.unknown_id).sum())
        control.append(len(_CONTROL.findall(text)))
    return TextShares(
        unknown=_share(sum(unknown), tokens),
        control=_share(sum(control), sum(map(len, texts))),
        cut=_share(cut, tokens),
        tokens=tokens,
        tokenizer=tokenizer.name,
        unknown_example=_example(texts, unknown),
        control_example=_example(texts, control),
    )


def percent(share: float) -> str:
    """Return a share in percent, with three digits."""
    return f"{100 * share:.3g}%"


def _share(part: int, whole: int) -> float:
    """Return the share of a part; 0 where there is nothing at all."""
    if not whole:
        return 0.0
    return part / whole


def _example(texts: Sequence[str], counts: Sequence[int]) -> str:
    """Return the beginning of the text with the largest count; of no texts, an empty one."""
    largest = max(counts, default=0)
    for text, count in zip(texts, counts, strict=True):
        if count == largest:
            return text[:_SHOWN]
    return ""
