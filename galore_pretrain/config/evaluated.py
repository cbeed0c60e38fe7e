"""The texts of ``--eval-data``, and the names that the metrics of each have."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from galore_pretrain.errors import InputError
from galore_pretrain.text import readers

_TAKEN = "reference"
"""No name of a text: ``eval_reference_perplexity`` is of the first."""


@dataclass(frozen=True)
class EvalText:
    """A text that is evaluated: its ``name``, and the ``path`` of its files."""

    name: str
    path: str


def parse_eval_text(text: str) -> str:
    """Return ``PATH`` or ``NAME=PATH`` as it is, but for a ``~`` at the beginning of the path."""
    name, path = name_and_path(text)
    return named_path(name, os.path.expanduser(path))


# Before texts had names, a path may have had a "=", as folders by keys do (lang=de/valid.jsonl).
def name_and_path(text: str) -> tuple[str | None, str]:
    """Return the name and the path of ``NAME=PATH``; the name is None of a path alone, and of one that is there."""
    match = re.fullmatch(r"(\w[\w-]*)=(.+)", text)
    if match is None or glob(text):
        return None, text
    return match[1], match[2]


def named_path(name: str | None, path: str) -> str:
    """Return what `name_and_path` was called on."""
    return path if name is None else f"{name}={path}"


def eval_texts(eval_data: str | Sequence[str] | None) -> tuple[EvalText, ...]:
    """Return the texts that ``--eval-data`` names, given never, once or several times.

    Where several are named, one without a name of its own is called as its file or folder is, without suffixes. Raises
    InputError where two have one name, and where one has none.
    """
    given = (eval_data,) if isinstance(eval_data, str) else tuple(eval_data or ())
    texts: dict[str, EvalText] = {}
    for text in given:
        name, path = name_and_path(text)
        if name is None:
            name = _name_of(path)
        if len(given) > 1:
            _check_name(name, text, texts)
        texts[name] = EvalText(name, path)
    return tuple(texts.values())


def _name_of(path: str) -> str:
    """Return the name of a file or a folder, without suffixes of text, as a key of metrics may have it; '' of none."""
    last = readers.without_compression(Path(path).name)
    if readers.is_known(last):
        last = Path(last).stem
    return re.sub(r"\W+", "_", last).strip("_")


def _check_name(name: str, text: str, texts: Iterable[str]) -> None:
    """Raise InputError where a text cannot be called so, beside the other ``texts``."""
    if not name:
        raise InputError(f"--eval-data {text}: gives its metrics no name; write NAME={text}")
    if name == _TAKEN:
        raise InputError(f"--eval-data {text}: {_TAKEN} is a name of other metrics; write NAME=PATH with another")
    if name in texts:
        raise InputError(f"--eval-data: two texts have the name {name}; write NAME=PATH with another for {text}")


def further_texts(metrics: Iterable[str]) -> list[str]:
    """Return the names of the texts beside the first, by the keys of an evaluation's metrics."""
    names: list[str] = []
    for key in metrics:
        match = re.fullmatch(r"eval_(.+)_perplexity", key)
        if match is not None and match[1] != _TAKEN:
            names.append(match[1])
    return names
