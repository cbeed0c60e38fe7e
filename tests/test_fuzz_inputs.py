"""Random folders, tokenizers and published-looking configs are read as an independent reading has them, or refused.

Each test is of one seed, which its name shows: with ``FUZZ_FROM=217 FUZZ=1``, pytest tries that one again.
``make fuzz`` tries 300 of each.
"""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from families import CORPUS
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.rundir.export import export, try_export
from galore_pretrain.text.sources import describe_text, open_source
from galore_pretrain.text.tokenizer import load_tokenizer

FIRST = int(os.environ.get("FUZZ_FROM", "0"))
each_seed = pytest.mark.parametrize("seed", range(FIRST, FIRST + int(os.environ.get("FUZZ", "15"))))

# -- an independent reading of a folder --------------------------------------------------------------------------------

SAYS = {"train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev", "eval"}, "test": {"test"}}
PACKED = {"gz": gzip.decompress, "bz2": lambda data: bz2.BZ2File(io.BytesIO(data)).read(), "xz": lzma.decompress}
PACKED |= dict.fromkeys(("zst", "zstd"), lambda data: pyarrow.CompressedInputStream(io.BytesIO(data), "zstd").read())
KINDS = ("json", "jsonl", "ndjson", "csv", "parquet", "pq", "txt")


def entries_below(folder: Path) -> Iterator[Path]:
    """Yield every file, and every link and hidden folder as one: what they lead to is read by its own name, or not."""
    for path in folder.iterdir():
        if path.is_symlink() or path.name.startswith(".") or not path.is_dir():
            yield path
        else:
            yield from entries_below(path)


def role_of(names: tuple[str, ...]) -> str:
    """Return what the nearest name that says something says."""
    for name in reversed(names):
        words = set(re.findall(r"[^\W\d_]+", name.lower()))
        said = [role for role, spelled in SAYS.items() if words & spelled]
        if said:
            return "+".join(said)
    return "train"


def documents_of(path: Path) -> list[str]:
    """Read the documents of a file by Python's own modules. Raises whatever these raise at what is no text."""
    kind, data = path.name.lower().split(".")[-1], path.read_bytes()
    if kind in PACKED:
        kind, data = path.name.lower().split(".")[-2], PACKED[kind](data)
    if kind in ("parquet", "pq"):
        return list(map(str, pyarrow.parquet.read_table(io.BytesIO(data))["text"].to_pylist()))
    text = data.decode("utf-8-sig")
    if kind == "csv":
        header, *rows = [*csv.reader(io.StringIO(text, newline=""), strict=True)] or [["text"]]
        column = header.index("text")
        return [row[column] for row in rows if row]
    if kind == "txt":
        assert "\0" not in text
        return [text.strip()] * bool(text.strip())
    return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]


def independent_reading(root: Path) -> tuple[dict[str, str], list[str]]:
    """Return what each document of a folder is for, and why the folder must be refused, if it must."""
    documents: dict[str, str] = {}
    roles: set[str] = set()
    refusals: list[str] = []
    for path in entries_below(root):
        kind = ["", *(word for word in path.name.lower().split(".") if word not in PACKED)][-1]
        if path.is_symlink() or kind not in KINDS or path.name.startswith("."):
            continue
        role = role_of(path.relative_to(root).parts)
        roles.add(role)
        if "+" in role:
            refusals.append(f"{path} says {role}")
            continue
        try:
            documents |= dict.fromkeys(documents_of(path), role)
        except Exception as error:
            refusals += [f"{path}: {error!r}"] * (role != "test")
    if "train" not in roles:
        refusals.append("nothing to train on")
    return documents, refusals


# -- random folders ----------------------------------------------------------------------------------------------------

WORDS = ("train", "training", "validation", "valid", "val", "dev", "eval", "test")
NAMES = (*WORDS, "part", "00000-of-00002", "x", "en", "validated", "evaluation", "latest", "contest", "trainer")
NAMES += ("détest", "tests", "subtrain", "evals")
TWO = ("dev-clean", "val_part1", "train-part", "x.eval")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-8", "utf-8", "utf-16", "utf-16-le", "utf-16-be", "latin-1")
CASES: tuple[Callable[[str], str], ...] = (str, str, str, str.upper, str.title)
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
PACK |= dict.fromkeys(("zst", "zstd"), lambda data: pyarrow.compress(data, "zstd", asbytes=True))
UNKNOWN = ("README.md", "train.zip", "a.jsonl.bak", "notes", "train.jsonl~", "gz", "._train.jsonl", ".hidden.txt")


def random_text(rng: random.Random, number: int) -> str:
    """Make a document that no other is like."""
    words = ("the", "fox", "été", "日本", "🙂", 'a "b"', "c, d", "e\nf", "g\r\nh", "i\u2028j", "k\x85l")
    return " ".join([str(number), *rng.choices(words, k=rng.randint(0, 4)), str(number)])


def bytes_of(rng: random.Random, kind: str, texts: list[str], encodings: tuple[str, ...]) -> bytes:
    """Return the content of a file with these documents."""
    encoding = rng.choice(encodings)
    if kind in ("parquet", "pq"):
        types = (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
        column = pyarrow.array(texts, pyarrow.string()).cast(rng.choice(types))
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": column}), sink, row_group_size=2)
        return bytes(sink.getvalue().to_pybytes())
    if kind == "txt":
        content = "\n\n".join(texts)
    elif kind == "csv":
        lines = io.StringIO(newline="")
        writer = csv.writer(lines, lineterminator=rng.choice(("\n", "\r\n")))
        writer.writerows([["n", "text"], *enumerate(texts)])
        content = lines.getvalue()
    else:
        end = rng.choice(("\n", "\n", "\r\n", "\n\n"))
        content = "".join(json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5) + end for text in texts)
        if encoding != "utf-8":  # Python's json reads some UTF-16 by itself
            encoding = "utf-8-sig" if texts else "utf-8"
    return content.encode(encoding, errors="replace")


def random_name(rng: random.Random) -> str:
    """Make a name of a few words in any case, of which more than one seldom says what a file is for."""
    words = [rng.choice(NAMES + TWO), *rng.choices(NAMES[len(WORDS) :], k=rng.choice((0, 0, 1)))]
    if rng.random() < 0.05:
        words.append(rng.choice(WORDS))
    return rng.choice("-_. ").join(rng.choice(CASES)(word) for word in words)


def random_folder(rng: random.Random, root: Path) -> None:
    """Write a tree of up to nine files, and links, hidden files, copies and what is no text beside them."""
    folders = [root]
    is_sound = rng.random() < 0.7
    encodings = ENCODINGS[: 2 if is_sound else None]
    for number in range(rng.randint(1, 9)):
        folder = rng.choice(folders)
        if rng.random() < 0.4 and len(folder.relative_to(root).parts) < 3:
            name = rng.choice(("", "", "", "", ".")) + random_name(rng) + rng.choice(("", "", "", ".jsonl"))
            folder = folder / name
            folder.mkdir(exist_ok=True)
            folders.append(folder)
        kind, packed = rng.choice(KINDS), rng.choice(("", "", "", *PACK))
        if kind in ("parquet", "pq"):
            packed = ""
        stem = rng.choice(NAMES[len(WORDS) :]) if number == 0 else random_name(rng)
        name = f"{stem}-{number}.{rng.choice(CASES)(kind)}"
        file = folder / (name + f".{rng.choice(CASES)(packed)}" * bool(packed))
        texts = [random_text(rng, 10 * number + i) for i in range(rng.choice((0, 1, 1, 2, 3, 5)))]
        data = bytes_of(rng, kind, texts, encodings)
        file.write_bytes(PACK[packed](data))
        if not is_sound and rng.random() < 0.2:
            file.write_bytes(rng.choice((b"", file.read_bytes()[: len(data) // 2], b"\0\1\2")))
        elif packed and rng.random() < 0.4:
            other = rng.choice(("", "bz2", "xz"))
            (folder / (name + f".{other}" * bool(other))).write_bytes(PACK[other](data))
        if rng.random() < 0.2:
            (folder / rng.choice(UNKNOWN)).write_bytes(rng.choice((data, b"", b"\0")))
        if rng.random() < 0.08:
            target = rng.choice((file, folder, rng.choice(folders), folder / "nothing"))
            link = rng.choice(folders) / (random_name(rng) + file.name.partition(f"-{number}")[2])
            is_hidden = any(part.startswith(".") for part in target.relative_to(root).parts)
            if not link.exists() and not is_hidden:
                link.symlink_to(target)


def told_files(told: str) -> int:
    """Count the files that a log line says are left out."""
    count = 0
    for names, more in re.findall(r"left out (.+?)(?: and (\d+) more)?: ", told):
        count += len(names.split(", ")) + int(more or 0)
    return count


@each_seed
def test_a_random_folder_is_read_as_written_or_refused(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    root = tmp_path / rng.choice(("data", "test", "val", "a [b] *", ".hidden", "train_test"))
    root.mkdir()
    random_folder(rng, root)
    documents, refusals = independent_reading(root)
    try:
        sources = [open_source(str(root), split) for split in ("train", "validation")]
        training, validation = (
            Counter(text for shard in range(len(source.shards)) for _, text in source.read(shard, 0))
            for source in sources
        )
    except InputError as error:
        message = str(error)
        assert refusals, message
        assert str(root) in message
        assert "\n" not in message
        return
    assert not refusals
    expected = {role: Counter(text for text in documents if documents[text] == role) for role in SAYS}
    if expected["validation"] or set(sources[0].shards) != set(sources[1].shards):
        assert (training, validation) == (expected["train"], expected["validation"])
    else:
        assert training + validation == expected["train"]
    read = {shard for source in sources for shard in source.shards}
    told = "".join(describe_text(str(root), None, *sources))
    assert len(read) + told_files(told) == len(list(entries_below(root))), told


# -- random tokenizers -------------------------------------------------------------------------------------------------

SPELLED = ["<s>", "</s>", "<unk>", "<pad>", "[CLS]", "[SEP]", "[UNK]", "<|endoftext|>", "<|eot_id|>", "<sep>"]
SPELLED += ["<tool>"]
# There is no run of one letter: two ways to cut it may be as good, and SentencePiece and transformers take either.
FRAGMENTS = ["the", "quick", "fox", "qu", "1984", "é", "日本", "한글", "🙂", "👍🏽", "▁", "ﬁ", "½", "Ａ", "ǅ", "İ", "ß"]
FRAGMENTS += ["’", "<", ">", "</", "|>", "<0x0A>", "##the", "Ġ", "Z", ".", "＜s＞", "</S>", "[sep]"]
FRAGMENTS += [" ", " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", " fox"]
CLASSES = {"byte-level BPE": "GPT2Tokenizer", "WordPiece": "BertTokenizer", "BPE with bytes": "LlamaTokenizer"}
"""The class of transformers that a family's folders name, beside the one of all."""


@dataclass
class Published:
    """Holds a tokenizer as somebody publishes it, a file or a folder, and what its own library says of it."""

    path: Path
    control: set[int]
    """Ids that no text may get."""
    special: list[str]
    """What those tokens are called."""
    encode: Callable[[str], list[int]]
    """The ids of a text in which no special token is spelled, without markers."""
    may_differ: bool = False
    """Whether what transformers makes of it may be told to give other ids."""


def random_line(rng: random.Random) -> str:
    """Make a text that may spell special tokens."""
    return "".join(rng.choice(rng.choice((FRAGMENTS, FRAGMENTS, SPELLED))) for _ in range(rng.randint(0, 12)))


def random_sentencepiece(rng: random.Random, folder: Path) -> Published:
    """Train a SentencePiece model with ids, normalization and pieces of any kind."""
    flags: dict[str, Any] = {"minloglevel": 2, "hard_vocab_limit": False}
    roles = ["unk_id", "eos_id", *rng.sample(("bos_id", "pad_id"), rng.randint(0, 2))]
    rng.shuffle(roles)
    flags |= {"bos_id": -1, "pad_id": -1} | {role: number for number, role in enumerate(roles)}
    for name in ("byte_fallback", "add_dummy_prefix", "remove_extra_whitespaces", "split_digits"):
        flags[name] = rng.random() < 0.6
    flags["split_by_whitespace"] = rng.random() < 0.8
    flags["treat_whitespace_as_suffix"] = rng.random() < 0.1
    flags["model_type"] = rng.choice(("unigram", "unigram", "bpe", "bpe", "char"))
    flags["normalization_rule_name"] = rng.choice(("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"))
    flags["user_defined_symbols"] = rng.sample(("<tool>", "qu", "1984", "\n"), rng.choice((0, 0, 1, 2)))
    flags["control_symbols"] = rng.sample(SPELLED[6:10], rng.randint(0, 2))
    flags["vocab_size"] = rng.randint(110, 160) + 260 * flags["byte_fallback"]
    lines = iter([*CORPUS, *(random_line(rng) for _ in range(30))])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(folder / "own"), **flags)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "own.model"))
    control = {number for number in range(processor.get_piece_size()) if processor.is_control(number)}
    # These rules make line ends spaces; transformers' like of them makes one space of \r\n, and of a piece \n.
    makes_spaces = flags["normalization_rule_name"].startswith("nmt")
    keeps_lines = "\n" in flags["user_defined_symbols"] or not flags["remove_extra_whitespaces"]
    may_differ = flags["treat_whitespace_as_suffix"] or (makes_spaces and keeps_lines)
    return Published(folder / "own.model", control, [], processor.encode, may_differ)


def random_pieces(rng: random.Random, words: list[str], beginning: str = "", inside: str = "") -> list[str]:
    """List all characters of words and some parts of them, marked by where in a word they stand."""
    spans = [(word, at, at + 1) for word in words for at in range(len(word))]
    for word in rng.choices(words, k=80):
        at = rng.randrange(len(word))
        spans.append((word, at, at + rng.randint(1, 6)))
    return list(dict.fromkeys((inside if at else beginning) + word[at:end] for word, at, end in spans))


def random_merges(rng: random.Random, words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return pieces and merges of byte pairs, as a trainer would find them, in any order."""
    parts = [list(word) for word in words]
    merges: dict[tuple[str, str], None] = {}
    for word in rng.choices(parts, k=80):
        if len(word) < 2:
            continue
        at = rng.randrange(len(word) - 1)
        pair = (word[at], word[at + 1])
        merges[pair] = None
        for other in parts:
            for place in range(len(other) - 2, -1, -1):
                if tuple(other[place : place + 2]) == pair:
                    other[place : place + 2] = ["".join(pair)]
    pieces = [*sorted(set("".join(words))), *map("".join, merges)]
    return list(dict.fromkeys(pieces)), list(merges)


# Trainers of the library are not used: what they give depends on more than their text.
def random_form(rng: random.Random, family: str, special: list[str]) -> tuple[Tokenizer, str]:
    """Make a tokenizer of the library, in whose vocabulary are some special tokens, and name its unknown token."""
    lines = [CORPUS[0], *(random_line(rng) for _ in range(30))]
    also = rng.sample(special, rng.randint(0, len(special)))
    words = sorted({word for line in lines for word in line.split()})
    normalizer = rng.choice((None, None, normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase()))
    if family == "byte-level BPE":
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=rng.random() < 0.3)
        digits = pre_tokenizers.Digits(individual_digits=True)
        mapped = sorted({word for line in lines for word, _ in byte_level.pre_tokenize_str(line)})
        pieces, merges = random_merges(rng, [*mapped, "".join(sorted(byte_level.alphabet()))])
        vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *also]))}
        form = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rng.random() < 0.5))
        form.pre_tokenizer = rng.choice((byte_level, pre_tokenizers.Sequence([digits, byte_level])))
        form.decoder = decoders.ByteLevel()
        unknown = ""
    elif family == "BPE with bytes":  # as Llama-2's
        pieces, merges = random_merges(rng, ["▁" + word for word in words])
        known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *also, *pieces]
        vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(known))}
        form = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        steps = [normalizers.Replace(" ", "▁")]
        normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * (rng.random() < 0.7) + steps)
        form.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        unknown = "<unk>"
    elif family == "WordPiece":
        pieces = random_pieces(rng, words, inside="##")
        vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "[UNK]", *also]))}
        form = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        normalizer = normalizers.BertNormalizer(lowercase=rng.random() < 0.5, strip_accents=rng.choice((None, True)))
        form.pre_tokenizer, form.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        unknown = "[UNK]"
    elif family == "Unigram":
        pieces = random_pieces(rng, ["▁" + line.replace(" ", "▁") for line in lines])
        known = dict.fromkeys([*rng.choices(pieces, k=len(pieces)), *also, "<unk>"])
        form = Tokenizer(models.Unigram([(piece, -10 * rng.random()) for piece in known], list(known).index("<unk>")))
        form.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=rng.choice(("always", "first", "never")))
        form.decoder = decoders.Metaspace()
        unknown = "<unk>"
    else:
        vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*words[::2], "<unk>", *also]))}
        form = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        form.pre_tokenizer = rng.choice((pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Whitespace()))
        unknown = "<unk>"
    if normalizer is not None:
        form.normalizer = normalizer
    return form, unknown


def random_tokenizer_folder(rng: random.Random, folder: Path) -> Published:
    """Write a folder with tokenizer.json, whose tokens, roles, template, truncation and padding are any."""
    family = rng.choice(("byte-level BPE", "byte-level BPE", "BPE with bytes", "WordPiece", "Unigram", "WordLevel"))
    special = rng.sample([token for token in SPELLED if token not in ("<unk>", "[UNK]")], rng.randint(1, 5))
    form, unknown = random_form(rng, family, special)
    for token in special:
        spaces = {side: rng.random() < 0.2 for side in ("lstrip", "rstrip")}
        form.add_special_tokens([AddedToken(token, normalized=rng.random() < 0.2, **spaces)])
    for token in rng.sample(("<own>", "qu", "the quick", "\n\n"), rng.randint(0, 2)):
        rules = {name: rng.random() < 0.3 for name in ("normalized", "single_word", "lstrip", "rstrip")}
        form.add_tokens([AddedToken(token, **rules)])
    roles = {"eos_token": special[0]}
    roles |= {role: rng.choice(special) for role in ("bos_token", "pad_token", "cls_token") if rng.random() < 0.4}
    if unknown:
        roles["unk_token"] = unknown
    elif rng.random() < 0.3:
        roles["unk_token"] = special[0]
    plain = Tokenizer.from_str(form.to_str())
    if rng.random() < 0.7:
        ends = [(token, form.token_to_id(token)) for token in dict.fromkeys((special[0], special[-1]))]
        template = f"{special[-1]} $A {special[0]}"
        form.post_processor = processors.TemplateProcessing(template, special_tokens=ends)
    if rng.random() < 0.4:
        form.enable_truncation(rng.randint(2, 8))
    if rng.random() < 0.4:
        form.enable_padding(length=rng.randint(2, 16), pad_id=form.token_to_id(special[0]), pad_token=special[0])
    form.save(str(folder / "tokenizer.json"))
    more = {"model_max_length": 8, "add_bos_token": True, "clean_up_tokenization_spaces": True, "legacy": False}
    plain_class = "PreTrainedTokenizerFast"
    settings: dict[str, Any] = {"tokenizer_class": plain_class, **roles}
    if rng.random() < 0.3:
        settings["tokenizer_class"] = CLASSES.get(family, plain_class)
    settings |= {key: value for key, value in more.items() if rng.random() < 0.3}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    control = {form.token_to_id(token) for token in special}
    names = [*special, *[unknown] * bool(unknown)]
    if settings["tokenizer_class"] != plain_class:  # transformers makes a tokenizer of its own, with more tokens
        whole = AutoTokenizer.from_pretrained(folder)
        plain = whole.backend_tokenizer
        plain.no_truncation()
        plain.no_padding()
        added = {token.content: number for number, token in whole.added_tokens_decoder.items() if token.special}
        names += added
        control |= {number for token, number in added.items() if token != unknown}
    return Published(folder, control, names, lambda text: plain.encode(text, add_special_tokens=False).ids)


def spells(text: str, tokens: list[str]) -> bool:
    """Return whether a text spells one of the tokens, once it is normalized in any way."""
    forms = (text, unicodedata.normalize("NFKC", text), unicodedata.normalize("NFKC", text).lower())
    return any(token in form or token.lower() in form for token in tokens for form in forms)


@each_seed
def test_a_random_tokenizer_is_obeyed_exported_or_told(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    published = rng.choice((random_sentencepiece, random_tokenizer_folder))(rng, tmp_path)
    tokenizer = load_tokenizer(str(published.path))
    vocabulary = rng.choice((tokenizer.vocab_size, 1000))
    architecture = LlamaConfig(
        vocab_size=vocabulary, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=64, eos_token_id=tokenizer.eos_id, bos_token_id=None,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        try_export(architecture, tokenizer, [])
    is_told = bool(caplog.records)
    assert published.may_differ or not is_told, caplog.text
    export(tmp_path / "model", build_model(architecture, dtype=torch.float32), tokenizer)
    if not is_told:
        exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    if not is_told and vocabulary > tokenizer.vocab_size:  # else some special tokens may be left out
        assert load_tokenizer(str(tmp_path / "model")).fingerprint == tokenizer.fingerprint
    for text in [random_line(rng) for _ in range(60)]:
        ids = tokenizer.encode([text])[0].tolist()
        assert published.control.isdisjoint(ids), text
        assert max(ids, default=0) < tokenizer.vocab_size, text
        if not spells(text, published.special):
            assert ids == published.encode(text), text
        if not is_told:
            assert exported(text, verbose=False)["input_ids"] == ids, text


# -- random published configs ------------------------------------------------------------------------------------------

LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
COMMON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True}
COMMON |= {"initializer_range": 0.02, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "LLaMA": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000,
        "max_sequence_length": 2048, "rms_norm_eps": 1e-06, "pad_token_id": -1, "torch_dtype": "float16",
        "transformers_version": "4.27.0.dev0", "_name_or_path": "llama-7b",
    },
    "Llama-2": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "pretraining_tp": 1, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000, "attention_bias": False,
    },
    "Llama-3.1": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256,
        "rope_scaling": {"factor": 8.0, **LLAMA_3, "rope_type": "llama3"}, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "pretraining_tp": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "Llama-3.2": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, **LLAMA_3, "rope_type": "llama3"}, "vocab_size": 128256,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
    },
    "SmolLM": {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "vocab_size": 49152,
        "tie_word_embeddings": True, "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None,
        "pad_token_id": 2, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "TinyLlama": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "vocab_size": 32000, "attention_bias": False, "pretraining_tp": 1,
    },
    "as transformers writes it today": {
        "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8,
        "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-06, "vocab_size": 1024, "dtype": "float32",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "mlp_bias": False, "pad_token_id": None,
    },
}  # fmt: skip
ANY = [None, True, False, 0, 1, -1, 2, 3, 0.5, 1.0, 1e-5, float("nan"), float("inf"), 10**400, "", "x", "2", "float32"]
ANY += [[], [1, 2], [None], {}, {"a": 1}]
FACTORS: tuple[Any, ...] = (1.0, 2.0, 8, 0.5, 0, -1.0, None, "2", True, [2.0], float("inf"), float("nan"))
SCALES: dict[str, Any] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "llama3": {"factor": 8.0, **LLAMA_3},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 1024, "short_factor": [1.0] * 64},
    "default": {},
}
SCALES["longrope"]["long_factor"] = [2.0] * 64  # one for each pair of a head that is 128 wide
FITTING: dict[str, list[Any]] = {
    "head_dim": [64, 128, 16, 7, None],
    "num_key_value_heads": [1, 2, 4, 8, None, 7],
    "num_attention_heads": [1, 4, 8, 32, 9],
    "hidden_size": [64, 96, 2048, 100],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "hidden_act": ["gelu", "relu", "silu", "gelu_new"],
    "rope_theta": [1e4, 500000, 1e6],
    "rms_norm_eps": [1e-5, 1e-6, 1],
    "eos_token_id": [2, [2, 3], None, [], [2, None]],
    "torch_dtype": ["bfloat16", "float32", "auto", None],
    "dtype": ["bfloat16", None],
    "initializer_range": [0.02, 0.006, 1, 2],
    "max_position_embeddings": [2048, 1, 10**6],
    "pretraining_tp": [1, 2, None],
    "attention_dropout": [0.0, 0, 0.1, None],
    "quantization_config": [None, {"bits": 4}],
    "auto_map": [{"AutoConfig": "configuration.Own"}],
    "sliding_window": [None, 4096],
    "temperature": [0.6],
    "num_experts": [8],
    "partial_rotary_factor": [1.0, 0.5, None],
    "layer_types": [["full_attention", "full_attention"]],
    "pad_token_id": [0, -1, 10**6, None],
    "output_attentions": [True, False],
    "return_dict": [False],
    "_attn_implementation": ["eager"],
    "rope_scaling": [],
    "rope_parameters": [],
}


def random_scale(rng: random.Random) -> Any:
    """Make a way to turn heads by position: one that is published, or changed."""
    kind = rng.choice(list(SCALES))
    scale = SCALES[kind] | {rng.choice(("type", "rope_type")): kind}
    if rng.random() < 0.3:
        scale["rope_theta"] = rng.choice((1e4, 5e5))
    if rng.random() < 0.4:
        key = rng.choice([*scale, "fator", "attention_factor", "beta_fast", "finetuned", "partial_rotary_factor"])
        scale[key] = rng.choice(FACTORS)
    if rng.random() < 0.1:
        del scale[rng.choice(list(scale))]
    return scale


def random_config(rng: random.Random) -> tuple[dict[str, Any], set[str]]:
    """Return a config, and the keys that were changed in it."""
    values = COMMON | rng.choice(list(CONFIGS.values()))
    changed = set()
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        key = rng.choice([*values, *FITTING, *FITTING, "rope_scaling", "rope_scaling"])
        changed.add(key)
        if key in ("rope_scaling", "rope_parameters") and rng.random() < 0.8:
            values[key] = random_scale(rng)
        elif rng.random() < 0.1:
            values.pop(key, None)
        elif FITTING.get(key) and rng.random() < 0.6:
            values[key] = rng.choice(FITTING[key])
        else:
            values[key] = rng.choice(ANY)
    if rng.random() < 0.1:
        longest = values.get("max_position_embeddings")
        changed.add("max_sequence_length")
        values["max_sequence_length"] = rng.choice((longest, 2048))
    return values, changed


def transformers_model(values: dict[str, Any]) -> LlamaForCausalLM:
    """Build what transformers makes of a config, without weights.

    Left aside are padding, which freezes a row, how it is computed, and nulls that it takes for numbers.
    """
    aside = ("pad_token_id", "dtype", "torch_dtype", "_attn_implementation", "max_sequence_length", "pretraining_tp")
    unset = ("attention_dropout", "partial_rotary_factor")
    given = {key: value for key, value in values.items() if key not in aside and (value or key not in unset)}
    if values.get("max_sequence_length") is not None:  # an early name
        given.setdefault("max_position_embeddings", values["max_sequence_length"])
    for key in ("rms_norm_eps", "initializer_range", "rope_theta"):
        if type(given.get(key)) is int:
            given[key] = float(given[key])
    for key in ("rope_scaling", "rope_parameters"):
        if given.get(key) and given[key].get("partial_rotary_factor", 1) is None:
            del given[key]["partial_rotary_factor"]
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig.from_dict(given))


def properties(model: LlamaForCausalLM) -> dict[str, Any]:
    """Return what of a model depends on its config: parameters, activations, and how heads are turned."""
    config = model.config
    rope = config.rope_parameters
    with torch.device("cpu"):
        rotary = LlamaRotaryEmbedding(config)
    layer = model.model.layers[0]
    return {
        "parameters": {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        "shared": model.lm_head.weight is model.model.embed_tokens.weight,
        "activation": type(layer.mlp.act_fn),
        "eps": (layer.input_layernorm.variance_epsilon, model.model.norm.variance_epsilon),
        "heads": (layer.self_attn.head_dim, layer.self_attn.num_key_value_groups, layer.self_attn.scaling),
        "dropout": layer.self_attn.attention_dropout,
        "frequencies": rotary.inv_freq.tolist(),
        "attention scaling": rotary.attention_scaling,
        "rope": {key: rope[key] for key in rope if key not in ("type", "finetuned", "partial_rotary_factor")},
        "positions": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "ends": (config.bos_token_id, config.eos_token_id),
    }


@each_seed
def test_a_random_config_is_the_model_of_transformers_or_refused_by_key(seed: int, tmp_path: Path) -> None:
    values, changed = random_config(random.Random(seed))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    try:
        config = load_model_config(str(path))
    except InputError as error:
        message = str(error)
        assert any(key in message for key in changed), message
        assert str(path) in message
        assert "\n" not in message
        return
    ours = properties(build_model(config, device="meta"))
    assert ours == properties(transformers_model(json.loads(path.read_text())))
