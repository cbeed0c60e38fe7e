"""How much of a text cannot be used: measured by one rule, told, and refused beyond a bound, before weights exist."""

import gzip
import json
import math
import shutil
import subprocess
import unicodedata
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from families import HUGGING_FACE, SENTENCEPIECE, make
from galore_pretrain.cli import cli
from galore_pretrain.config.options import parse_share
from galore_pretrain.errors import InputError
from galore_pretrain.text.batches import IGNORE, Position, TokenRows
from galore_pretrain.text.sources import NOTHING_READ, LocalFiles, first_documents
from galore_pretrain.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from galore_pretrain.text.usable import measure
from runs import COMMAND_LINE, command, lines, python

ENGLISH = "The state of the union is, as before, a matter for the people and their representatives to judge."
CHINESE = "从前有一个人住在河边的小村子里"
FRAGMENTS = ["the union ", "of", " ", "1984", "\n", "\t", "\f", "\r", CHINESE, "日本", "🙂", "é"]
FRAGMENTS += ["\0", "\x0b", "\x1b[0m", "\x7f", "\x85", "u\0n\0i\0o\0n\0"]
TEXTS = st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), max_size=8)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def mixed(chinese: int, whole: int = 120) -> list[str]:
    """So many documents, some of them Chinese; no two alike, so that some are held out for validation."""
    return [f"{i} {CHINESE if i % whole < chinese else ENGLISH}" for i in range(whole)]


# -- the rule ---------------------------------------------------------------------------------------------------------


@given(
    texts=TEXTS,
    layout=st.sampled_from(["pad", "pack"]),
    max_length=st.integers(2, 20),
    bound=st.sampled_from([0.0, 0.05, 0.3, 0.5, 1.0]),
)
def test_the_shares_are_those_of_a_count_by_hand(texts: list[str], layout: str, max_length: int, bound: float) -> None:
    tokenizer = load_tokenizer("sample")
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(resources.files("galore_pretrain") / "tokenizers" / "sample.model")
    )
    ids = [model.encode(text) for text in texts]
    tokens = sum(len(of_text) for of_text in ids)
    unknown = sum(model.is_unknown(i) for of_text in ids for i in of_text)
    characters = "".join(texts)
    control = sum(unicodedata.category(c) == "Cc" and c not in "\t\n\f\r" for c in characters)
    cut = 0
    if layout == "pad":
        cut = sum(max(0, len(of_text) + 1 - max_length) for of_text in ids)  # the end marker takes a place

    shares = measure(texts, tokenizer, TokenRows(tokenizer, layout, max_length).kept)
    assert shares.as_json() == {
        "unknown": unknown / max(1, tokens),
        "control": control / max(1, len(characters)),
        "cut": cut / max(1, tokens),
        "tokens": tokens,
    }
    fault = shares.fault(bound)
    assert (fault is None) == (shares.unknown <= bound and shares.control <= bound)
    if fault is not None:
        shown = shares.control_example if shares.control > bound else shares.unknown_example
        assert shown
        assert any(text.startswith(shown) for text in texts)
        assert repr(shown) in fault.what


@given(texts=TEXTS, max_length=st.integers(2, 20))
def test_what_is_not_cut_is_in_the_rows(texts: list[str], max_length: int) -> None:
    tokenizer = load_tokenizer("sample")
    texts = [*(text for text in texts if text and not text.isspace()), ENGLISH]
    rows = TokenRows(tokenizer, "pad", max_length)
    shares = measure(texts, tokenizer, rows.kept)
    documents = ((Position(), text, Position()) for text in texts)
    labels = sum(int((row.labels != IGNORE).sum()) for row in rows(documents))
    # A row's labels are the tokens that it has but for the first, and the end marker.
    assert labels == round(shares.tokens * (1 - shares.cut))


@pytest.mark.parametrize("family", [*SENTENCEPIECE, *HUGGING_FACE])
def test_the_unknown_token_is_the_published_one(family: str, tmp_path: Path) -> None:
    """None where it is a marker too, as GPT-2's, or where there is none."""
    place = make(family, tmp_path)
    tokenizer = load_tokenizer(str(place))
    if isinstance(tokenizer, SentencePieceTokenizer):
        expected = sentencepiece.SentencePieceProcessor(model_file=str(place)).piece_to_id("<unk>")
    else:
        theirs = AutoTokenizer.from_pretrained(place)
        expected = theirs.unk_token_id if theirs.unk_token != theirs.eos_token else None
    assert tokenizer.unknown_id == expected
    shares = measure([CHINESE], tokenizer, None)
    writes_all = "bytes" in family or family in ("BPE of LLaMA", "GPT-2", "Llama-3")
    assert (shares.unknown == 0) == writes_all


@given(share=st.floats(0, 1))
def test_a_share_is_read_as_a_number_or_in_percent(share: float) -> None:
    assert parse_share(str(share)) == share
    assert math.isclose(parse_share(f" {100 * share}%"), share, abs_tol=1e-300)


@pytest.mark.parametrize("text", ["5", "-0.1", "101%", "nan", "inf", "", "%", "a tenth", "1e400"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a share; write 0\.05 or 5%"):
        parse_share(text)


# -- what is looked at ------------------------------------------------------------------------------------------------


def test_the_first_documents_are_of_all_parts_of_a_text(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i:02d}.jsonl", [f"{i} {j}" for j in range(100)]) for i in range(40)]
    texts = first_documents(LocalFiles(files))
    assert len(texts) == 512
    shards = sorted({int(text.split()[0]) for text in texts})
    assert shards == [i * 40 // 16 for i in range(16)]
    assert {text.split()[1] for text in texts} == {str(j) for j in range(32)}
    assert first_documents(LocalFiles(files)) == texts
    assert first_documents(LocalFiles(files[:1])) == [f"0 {j}" for j in range(100)]


def test_long_documents_are_looked_at_in_part(tmp_path: Path) -> None:
    texts = ["a" * 300_000, "b" * 300_000, "c"]
    first, second = first_documents(LocalFiles([write(tmp_path / "a.jsonl", texts)]))
    assert (first, second) == (texts[0], "b" * (2**19 - 300_000))


def test_what_cannot_be_read_is_not_counted_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor is it refused here: a run may never come to it."""
    path = write(tmp_path / "a.jsonl", ["good", "good"])
    path.write_text(path.read_text() + "no JSON\n" + path.read_text())
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(gzip.compress(path.read_bytes())[:-9])
    source = LocalFiles([path, broken])
    assert first_documents(source)[:4] == ["good"] * 4
    assert source.bad_data.tally == NOTHING_READ
    assert not caplog.messages
    with pytest.raises(ValueError, match="line 3 is not JSON"):
        list(source.read(0, 0))


# -- the command line -------------------------------------------------------------------------------------------------


def words_of(model: str, output: Path, data: Path, *flags: str) -> list[str]:
    words = command(model, output, "--tokenizer", "sample", *flags)
    words[words.index("--data") + 1] = str(data)
    return words


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return python(COMMAND_LINE, *words_of(*arguments)[3:])


def shares_of(output: Path) -> dict[str, float]:
    shares: dict[str, float] = json.loads((output / "config.json").read_text())["text"]
    return shares


def test_text_that_the_tokenizer_cannot_write_is_refused(tiny_config: str, tmp_path: Path) -> None:
    path = write(tmp_path / "chinese.jsonl", mixed(120))
    refused = CliRunner().invoke(cli, words_of(tiny_config, tmp_path / "run", path)[3:])
    error = str(refused.exception)
    assert isinstance(refused.exception, InputError)  # which `main` makes one line of, and exit code 2
    assert error.startswith(f"--data {path}: ")
    assert "of its first tokens are unknown to --tokenizer sample, more than --max-unknown 5%, as in '" in error
    assert CHINESE in error
    assert error.endswith("; use another tokenizer, or give --max-unknown 1 to train on it all the same")
    assert not (tmp_path / "run").exists()


def test_utf_16_that_became_text_is_refused(tiny_config: str, tmp_path: Path) -> None:
    """As a careless writer would make of it; a .txt with NULs is none to begin with."""
    path = write(tmp_path / "text.jsonl", [text.encode("utf-16-le").decode("latin-1") for text in mixed(0, 4000)])
    refused = run(tiny_config, tmp_path / "run", path, "--max-unknown", "10%")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"Error: --data {path}: 50% of its first characters are NUL and other control")
    assert "more than --max-unknown 10%" in refused.stderr
    assert "write it as UTF-8, or give --max-unknown 1" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_may_use_any_text_says_what_it_loses(tiny_config: str, tmp_path: Path) -> None:
    """It goes on with a smaller bound as well, with a warning."""
    path = write(tmp_path / "mixed.jsonl", mixed(100))
    output = tmp_path / "run"
    done = run(tiny_config, output, path, "--max-length", "16", "--max-unknown", "1")
    assert done.returncode == 0, done.stderr
    shares = shares_of(output)
    source = LocalFiles([path])
    tokenizer = load_tokenizer("sample")
    assert set(shares) == {"unknown", "control", "cut", "tokens"}
    whole = measure([text for _, text in source.read(0, 0)], tokenizer, 15).as_json()
    assert shares["unknown"] == pytest.approx(whole["unknown"], rel=0.2)  # of which some is held out
    assert shares["cut"] == pytest.approx(whole["cut"], rel=0.2)
    assert 0.05 < shares["unknown"] < 0.2
    assert 0.1 < shares["cut"] < 0.4
    assert shares["control"] == 0
    told = (
        f"of {shares['tokens']:,} tokens at the beginning of the text, {100 * shares['unknown']:.3g}% are unknown to "
        f"--tokenizer sample, and --layout pad cuts {100 * shares['cut']:.3g}% away; 0% of its characters are control"
    )
    assert done.stderr.count(told) == 1

    shutil.rmtree(output / "checkpoints" / "step_00000012")
    (output / "summary.json").unlink()
    before = lines(output)
    again = run(tiny_config, output, path, "--max-length", "16")
    assert again.returncode == 0, again.stderr
    assert "more than --max-unknown 5%" in again.stderr
    assert lines(output) == before
    assert shares_of(output) == shares


def test_eval_warns_of_a_text_that_the_model_cannot_read(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chinese = write(tmp_path / "chinese.jsonl", mixed(120))
    english = write(tmp_path / "english.jsonl", mixed(0))
    words = ["eval", str(finished), "--eval-tokens", "100", "--eval-data"]
    for path, warnings in ((chinese, 1), (english, 0)):
        caplog.clear()
        done = CliRunner().invoke(cli, [*words, str(path)], catch_exceptions=False)
        assert done.exit_code == 0
        told = [message for message in caplog.messages if "unknown to --tokenizer sample" in message]
        assert len(told) == warnings
    assert shares_of(finished)["unknown"] == 0
