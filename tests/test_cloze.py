"""The cloze test: what its items are made of, and what models come to of which the answer is known."""

import json
import logging
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_pretrain.cli import cli
from galore_pretrain.errors import InputError
from galore_pretrain.text.cloze import Item, _sentences, cloze_items
from galore_pretrain.text.sources import in_turn, open_source
from galore_pretrain.text.tokenizer import Begun, load_tokenizer
from galore_pretrain.train.cloze import ClozeScore, _tokenized, score_cloze
from test_bits import Bytes, Pairs, Uniform

MEMORY = 8  # tokens before a label by which a text is known again


@cache
def sample() -> list[str]:
    return [text for _, _, text in in_turn(open_source("sample", "validation"))]


class Oracle(torch.nn.Module):
    """A model that has learned documents by heart: its loss is 0 where it knows how they go on, else 1.

    A contrary one has a loss where it knows all.
    """

    def __init__(self, tokenizer: Any, documents: list[str], *, memory: int = MEMORY, contrary: bool = False) -> None:
        super().__init__()
        self._memory, self._contrary = memory, contrary
        self._known: set[tuple[int, ...]] = set()
        for ids in tokenizer.encode(documents):
            words = ids.tolist()
            self._known |= {tuple(words[i : i + memory + 1]) for i in range(len(words))}

    def _token_losses(self, input_ids: torch.Tensor, labels: torch.Tensor, *more: Any) -> torch.Tensor:
        is_unknown = torch.zeros(labels.shape)
        for row, (ids, targets) in enumerate(zip(input_ids.tolist(), labels.tolist(), strict=True)):
            for place, target in enumerate(targets):
                if target >= 0:
                    window = (*ids[place + 1 - self._memory : place + 1], target)
                    is_unknown[row, place] = float(window not in self._known)
        if self._contrary:
            knows_all = is_unknown.sum(1, keepdim=True) == 0
            return (labels >= 0) * knows_all.float()
        return is_unknown


def score(model: Any, tokenizer: Any, items: list[Item], max_length: int = 512) -> ClozeScore:
    cpu = torch.device("cpu")
    return score_cloze(model, tokenizer, items, max_length=max_length, batch_size=7, device=cpu)


# -- items ------------------------------------------------------------------------------------------------------------


def test_one_continuation_is_true_and_three_are_of_other_documents() -> None:
    items = cloze_items(sample(), 200, seed=0)
    assert len(items) == 200
    places = set()
    for item in items:
        assert len(set(item.choices)) == 4
        true = [text for text in sample() if item.context + item.choices[item.answer] in text]
        assert true
        for number, choice in enumerate(item.choices):
            assert choice[:1].isspace()
            assert not choice.lstrip()[:1].isspace()
            assert choice.strip()[-1] in ".!?…\"'”’)"
            if number != item.answer:
                assert not any(item.context + choice in text for text in sample())
        sizes = sorted(len(choice.encode()) for choice in item.choices)
        assert sizes[-1] - sizes[0] <= 12
        places.add((item.context, item.choices[item.answer]))
    assert len(places) == 200
    counts = np.bincount([item.answer for item in items], minlength=4)
    assert (counts > 25).all()  # 50 each, but for chance


def test_a_seed_gives_the_same_items() -> None:
    assert cloze_items(sample(), 50, seed=3) == cloze_items(iter(sample()), 50, seed=3)
    assert cloze_items(sample(), 50, seed=3) != cloze_items(sample(), 50, seed=4)


def test_a_text_that_is_too_short_has_fewer_items_or_none() -> None:
    text = "This is a sentence of some length, as many are. It is followed by another one. "
    documents = [f"{text}{word} it goes on in its own way, as documents do." for word in ("So", "Thus", "And", "Then")]
    assert 2 <= len(cloze_items(documents, 100, seed=0)) <= 8
    for few in (documents[:3], [], ["no sentence"] * 100, [" ".join(documents)]):
        with pytest.raises(InputError, match="needs some of 4 documents"):
            cloze_items(few, 100, seed=0)


def test_sentences_by_hand() -> None:
    text = '  A headline\n\nHe said: "Go!" She went (at 3.14).  「行く。」行った。 And so'
    assert [text[start:stop] for start, stop in _sentences(text)] == [
        'A headline\n\nHe said: "Go!"', "She went (at 3.14).", "「行く。」", "行った。",
    ]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.text("ab .!?\n\"'。」", max_size=60))
def test_sentences_lie_one_behind_another(text: str) -> None:
    before = 0
    for start, stop in _sentences(text):
        assert before <= start < stop <= len(text)
        assert not text[before:start].strip()
        assert not text[start].isspace()
        before = stop


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_contrary", [False, True])
def test_what_is_known_by_heart_is_all_right(is_contrary: bool) -> None:
    tokenizer = load_tokenizer("sample")
    items = cloze_items(sample(), 100, seed=1)
    oracle = Oracle(tokenizer, sample(), contrary=is_contrary)
    assert score(oracle, tokenizer, items) == ClozeScore(float(not is_contrary), 0.0, 100)


def test_a_marker_stands_before_a_context_alone() -> None:
    items = cloze_items(sample(), 30, seed=1)
    begun: Any = Begun(Bytes())  # type: ignore[arg-type]
    assert score(Oracle(Bytes(), sample(), memory=32), begun, items, max_length=1024).acc_norm == 1.0
    assert {int(choice.ids[0]) for choice in _tokenized(begun, items)} == {begun.bos_id}
    assert not any((choice.ids[1:] == begun.bos_id).any() for choice in _tokenized(begun, items))


@pytest.mark.parametrize("tokenizer", [load_tokenizer("sample"), Bytes()], ids=["pieces", "bytes"])
def test_a_model_that_knows_nothing_is_right_by_chance(tokenizer: Any) -> None:
    """Of bytes, all four are as likely, and the first one is taken."""
    found = score(Uniform(1000), tokenizer, cloze_items(sample(), 400, seed=2))
    assert found.items == 400
    assert found.acc_norm_stderr == pytest.approx(math.sqrt(found.acc_norm * (1 - found.acc_norm) / 399))
    assert abs(found.acc_norm - 0.25) < 3 * found.acc_norm_stderr


def test_the_batch_and_the_padding_do_not_matter(build_tiny: Any) -> None:
    model, tokenizer = build_tiny().eval(), load_tokenizer("sample")
    items = [Item("The law of the Union is as it was.", (" It is.", " They are not so.", " No!", " We are."), 0)] * 3
    losses = []
    for choice in items[0].choices:
        whole = tokenizer.encode([items[0].context + choice])[0].tolist()
        start = len(tokenizer.encode([items[0].context])[0])
        logits = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
        loss = -sum(logits[place - 1, whole[place]].item() for place in range(start, len(whole)))
        losses.append(loss / len(choice.encode()))
    best = int(np.argmin(losses))
    for answer in range(4):
        made = [Item(items[0].context, items[0].choices, answer)] * 5
        assert score(model, tokenizer, made).acc_norm == float(answer == best)


def test_a_token_across_the_end_of_the_context_is_none() -> None:
    """Two characters a token: of an odd context, the whole has other tokens than the context, which then stay."""
    for context in ("abcd", "abcde"):
        choices = _tokenized(Words(), [Item(context, (" xyz", " y", " zz", " q"), 0)])  # type: ignore[arg-type]
        expected = [context[i : i + 2] for i in range(0, len(context), 2)]
        first = choices[0]
        assert [WORDS[i] for i in first.ids] == [*expected, " x", "yz"]
        assert (first.scored, first.size) == (2, 4)
    begun: Any = Begun(Words())  # type: ignore[arg-type]
    apart = _tokenized(begun, [Item("abcde", (" xyz", " y", " zz", " q"), 0)])[0]
    assert [WORDS[i] for i in apart.ids] == ["<s>", "ab", "cd", "e", " x", "yz"]


WORDS: list[str] = ["<s>"]


class Words(Pairs):
    """A tokenizer of two characters a token, each pair a token of its own."""

    bos_id = 0

    def encode(self, texts: list[str], first: int | None = None) -> Any:
        encoded = []
        for text in texts:
            parts = [text[i : i + 2] for i in range(0, len(text), 2)]
            WORDS.extend(part for part in dict.fromkeys(parts) if part not in WORDS)
            encoded.append(np.array([WORDS.index(part) for part in parts], np.int32))
        return encoded


def test_what_is_longer_than_a_row_is_cut_and_told(caplog: pytest.LogCaptureFixture) -> None:
    items = cloze_items(sample(), 20, seed=0)
    with caplog.at_level(logging.WARNING):
        short = score(Oracle(Bytes(), sample(), memory=32), Bytes(), items, max_length=200)
    assert short.acc_norm == 1.0
    assert re.search(r"\d+ of 80 contexts are cut to --max-length 200", caplog.text)
    with pytest.raises(InputError, match=r"a continuation has \d+ tokens, and --max-length is 20; give at least \d+"):
        score(Uniform(2), Bytes(), items, max_length=20)


# -- the command ------------------------------------------------------------------------------------------------------


def test_eval_makes_it_of_the_validation_text(finished: Path, tmp_path: Path) -> None:
    def told(*words: object) -> str:
        arguments = ["eval", str(finished), "--eval-tokens", "500", "--max-length", "64", *map(str, words)]
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    plain = json.loads(told("--json"))
    one, again, other = (json.loads(told("--cloze", 60, "--seed", seed, "--json")) for seed in (0, 0, 1))
    assert one == again
    assert {key: one[key] for key in plain} == plain
    assert one.keys() - plain.keys() == {"cloze_acc_norm", "cloze_acc_norm_stderr", "cloze_items"}
    assert (one["cloze_items"], other["cloze_items"]) == (60, 60)
    assert 0 < one["cloze_acc_norm"] < 1
    line = f"cloze, 60 items of four: acc_norm {one['cloze_acc_norm']:.4f} ± {one['cloze_acc_norm_stderr']:.4f}"
    assert line in told("--cloze", 60)
    (tmp_path / "short.txt").write_text("A word.\n")
    with pytest.raises(InputError, match="--cloze 60: the validation text has 0 sentences"):
        told("--cloze", 60, "--eval-data", tmp_path / "short.txt")
