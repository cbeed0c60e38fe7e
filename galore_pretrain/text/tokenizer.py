"""Text to token ids: SentencePiece itself for a ``.model``, a Hugging Face fast tokenizer for anything else.

SentencePiece is called directly and in batches: measured 8 times as fast as the same model behind transformers'
wrapper.
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
import threading
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from galore_pretrain.errors import InputError, did_you_mean
from galore_pretrain.text.hub import T5, download, download_tokenizer, first_line, is_hub_id
from galore_pretrain.text.pieces import OF_NO_PIECE, SPACE, cut_apart, fast_form

if TYPE_CHECKING:
    import tokenizers

Ids = NDArray[np.int32]
"""Token ids of one text."""
Ends = NDArray[np.int64]
"""Where the text of each token ends, in bytes of UTF-8 from the beginning of the whole text."""
PROBES = (
    "The quick brown fox, 1984: it's here.",
    "Zürich — naïve café",
    "",
    " a  b\n\nc\td\r\ne\u00a0f \n",
    "「日本語」の文章。 Ünïcödé ½ ﬁ ™ 🙂",
    "▁a ▁",
)
"""Texts on which two tokenizers are compared. The first two have what any text has; the others, what is treated in
different ways: white space, other scripts, characters of compatibility."""
_PLAIN = 2  # the first so many
_CHARACTERS = 6  # of a text that are tried for each token wanted: English has some 4.5 a token of T5's
_MODEL_FILES = ("spiece.model", "tokenizer.model")  # as T5's and LLaMA's classes of transformers look for them
_OTHER_FILES = ("tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt")  # of which transformers makes one
_HUB_FILES = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "tiktoken.model",
    "tokenizer.json",
)
"""What transformers makes a tokenizer of. The last one is in all but old repositories: where it is there, all are."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # what a vocabulary with bytes to fall back on calls them
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks answers in a chat template, for transformers too
_RENDERING = threading.Lock()  # what is marked, transformers notes in an object that all users of a template share

log = logging.getLogger(__name__)


def _way_out(path: Path) -> str:
    """Return what to give in place of a file that is no SentencePiece model."""
    if path.suffix == ".json":
        return f"give its folder, {path.parent}"
    return "give a .model file or a folder"


class Tokenizer(Protocol):
    """Gives what the data pipeline and the exported model need of a tokenizer."""

    name: str
    vocab_size: int
    """One more than the largest id that ``encode`` can return."""
    eos_id: int
    bos_id: int | None
    """What marks the beginning of a text; None where there is no such token."""
    adds_bos: bool
    """Whether transformers' own call begins each text with that: so the model that it came with was trained."""
    unknown_id: int | None
    """What stands in place of characters that the vocabulary cannot write; None where there is no such token."""
    fingerprint: str
    """SHA-256 of all that decides on the ids, so that a run can tell that it goes on with the same tokenizer."""

    @property
    def vocabulary_fingerprint(self) -> str:
        """Return what checkpoints up to format 2 hold in its place: of a Hugging Face tokenizer, the vocabulary's."""
        ...

    def encode(self, texts: list[str], first: int | None = None) -> list[Ids]:
        """Return the token ids of each text, without an end marker; with a beginning's where `Begun` adds it.

        No text can produce a control token. Where the ``first`` so many ids of each are enough, later ones may be
        missing.
        """
        ...

    def byte_ends(self, text: str, first: int | None = None) -> Ends:
        """Return where the text of each token that ``encode`` makes ends, in bytes of the text's UTF-8; never falling.

        What the tokenizer drops counts with the token behind it. A token that writes a part of a character ends inside
        the character. Where the ``first`` so many are enough, later ones may be missing.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens."""
        ...

    def files(self) -> dict[str, bytes]:
        """Return the files, by name, of which `load_folder` makes this tokenizer again: a checkpoint holds them."""
        ...

    def save(self, folder: Path, model_max_length: int, vocabulary: int) -> None:
        """Write what ``AutoTokenizer.from_pretrained(folder)`` needs; a prompt gets the ids of ``encode``.

        ``vocabulary`` is the size of the model's. A special token beyond it is left out.
        """
        ...


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file."""

    def __init__(self, path: Path, name: str) -> None:
        import sentencepiece

        try:
            # One thread: by default each call starts as many as the host has cores, in every process of a run.
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path), num_threads=1)
        except (RuntimeError, OSError) as error:
            raise InputError(f"--tokenizer {path}: not a SentencePiece model; {_way_out(path)}") from error
        self._path = path
        self.name = name
        self.vocab_size = int(self._processor.get_piece_size())
        self.eos_id = int(self._processor.eos_id())
        bos_id = int(self._processor.bos_id())
        self.bos_id: int | None = bos_id if bos_id >= 0 else None
        self.adds_bos = False  # the file does not say
        # Every model has an unknown piece. One that can write bytes never makes it.
        self.unknown_id: int | None = int(self._processor.unk_id())
        self.fingerprint = _sha256(path)
        pieces = self._processor.id_to_piece(list(range(self.vocab_size)))
        self._is_by_words = not any(SPACE in piece[1:] for piece in pieces)
        if self.eos_id < 0:
            raise InputError(f"--tokenizer {path}: has no end-of-sequence piece (</s>), which separates documents")

    @property
    def vocabulary_fingerprint(self) -> str:
        """Return the fingerprint, since the file holds nothing but the vocabulary."""
        return self.fingerprint

    def encode(self, texts: list[str], first: int | None = None) -> list[Ids]:
        """Return the token ids of each text, or at least its ``first`` ones."""
        # Where no piece goes across a space, what stands before one has the same ids, whatever follows. So a long text
        # is cut at a space, after as many characters as should hold the ids wanted. Where they do not, as in a text of
        # long words or of digits, the whole text is tokenized after all.
        if first is None or not self._is_by_words:
            return self._encode(texts)
        beginnings = [_beginning(text, _CHARACTERS * first) for text in texts]
        ids = self._encode(beginnings)
        short: list[int] = []
        for i, text in enumerate(texts):
            is_cut = len(beginnings[i]) < len(text)
            if is_cut and len(ids[i]) < first:
                short.append(i)
        if short:
            whole = self._encode([texts[i] for i in short])
            for i, whole_ids in zip(short, whole, strict=True):
                ids[i] = whole_ids
        return ids

    def _encode(self, texts: list[str]) -> list[Ids]:
        """Return all token ids of each text."""
        return self._processor.encode(texts, return_type="numpy")  # type: ignore[no-any-return]

    # An unknown token may go across spaces, where words are pieces. So the last token of a beginning may end later.
    def byte_ends(self, text: str, first: int | None = None) -> Ends:
        """Return where the text of each token ends, or at least that of the ``first`` ones."""
        if first is not None and self._is_by_words:
            beginning = _beginning(text, _CHARACTERS * first)
            ends = self._byte_ends(beginning)
            if len(ends) > first or len(beginning) == len(text):
                return ends
        return self._byte_ends(text)

    # Of a character that is written byte by byte, SentencePiece says that the last piece holds all of it, and those
    # before none: each of them ends where its byte does.
    def _byte_ends(self, text: str) -> Ends:
        """Return where the text of every token ends."""
        mapping = self._processor.encode(text.encode(), return_type="offset_mapping")
        offsets = np.array(mapping["offsets"], np.int64).reshape(-1, 2)
        begins, ends = offsets[:, 0], offsets[:, 1].copy()
        for i in np.flatnonzero(begins == ends):
            if self._processor.is_byte(mapping["ids"][i]):
                before = ends[i - 1] if i else 0
                ends[i] = max(begins[i], before) + 1
        return _never_falling(ends)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens."""
        text_ids = [i for i in ids if not self._processor.is_control(i)]
        return str(self._processor.decode(text_ids))

    def files(self) -> dict[str, bytes]:
        """Return the model's file alone: `load_folder` takes it by itself then."""
        return {"tokenizer.model": self._path.read_bytes()}

    def save(self, folder: Path, model_max_length: int, vocabulary: int) -> None:
        """Copy the model and, where transformers can give the same ids, write a tokenizer of its own."""
        try:
            form = fast_form(self._processor)
            for text in PROBES[:_PLAIN]:
                if form.encode(text).ids != self._processor.encode(text):
                    raise ValueError(f"of {text!r} it makes {form.encode(text).tokens}")
        except ValueError as error:
            log.warning("transformers has no like of %s: %s; a model folder has the file alone", self._path, error)
            shutil.copyfile(self._path, folder / _MODEL_FILES[0])
            return
        is_bpe = type(form.model).__name__ == "BPE"
        shutil.copyfile(self._path, folder / _MODEL_FILES[is_bpe])
        ids = {
            "bos_token": self._processor.bos_id(),
            "eos_token": self.eos_id,
            "unk_token": self._processor.unk_id(),
            "pad_token": self._processor.pad_id(),
        }
        roles = {role: self._processor.id_to_piece(number) for role, number in ids.items() if number >= 0}
        _save_plain(form, folder, model_max_length, roles)

    def pieces(self) -> dict[str, int]:
        """Return the id of each piece."""
        return {self._processor.id_to_piece(number): number for number in range(self.vocab_size)}


def _never_falling(ends: Ends) -> Ends:
    """Return ends of tokens, each lowered to the least of those behind it."""
    lowered: Ends = np.minimum.accumulate(ends[::-1])[::-1]
    return lowered


def _beginning(text: str, most: int) -> str:
    """Return ``text`` up to the last space among its first ``most`` characters, or all of it if there is no such."""
    if len(text) <= most:
        return text
    space = text.rfind(" ", 0, most)
    if space < 0:
        return text
    return text[:space]


def _byte_places(text: str) -> Ends:
    """Return where each character of a text begins in its UTF-8, and where the last one ends."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


# Special tokens that are looked for in normalized text are found whatever `encode_special_tokens` says.
def _not_normalized(form: str) -> str:
    """Return a tokenizer's JSON with special tokens that are looked for in the text as it is."""
    content = json.loads(form)
    for token in content["added_tokens"]:
        if token["special"]:
            token["normalized"] = False
    return json.dumps(content)


def _save_plain(form: "tokenizers.Tokenizer", folder: Path, model_max_length: int, settings: dict[str, Any]) -> None:
    """Save a tokenizer as a plain fast one of transformers, with ``settings``.

    It adds no marker to a text. It takes none from it either, unless they say so.
    """
    from transformers import PreTrainedTokenizerFast

    settings = {"split_special_tokens": True, **settings}
    plain = PreTrainedTokenizerFast(tokenizer_object=form, model_max_length=model_max_length, **settings)
    plain.save_pretrained(folder)


def _cut_off(form: "tokenizers.Tokenizer", vocabulary: int) -> "tokenizers.Tokenizer":
    """Return a copy of a plain tokenizer without the added tokens from the id ``vocabulary`` on."""
    from tokenizers import Tokenizer

    content = json.loads(form.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocabulary]
    cut = Tokenizer.from_str(json.dumps(content))
    cut.encode_special_tokens = True
    return cut


class HuggingFaceTokenizer:
    """A fast tokenizer of transformers: a folder with ``tokenizer.json``, or a repository of the hub."""

    # transformers' own call adds markers by a template, takes control tokens from text, and cuts or pads as its files
    # say. So a plain copy of what it wraps is used, here and in the exported folder.
    def __init__(self, where: str, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            # Code that comes with a tokenizer is not run, and nobody is asked whether it may.
            self._tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        except Exception as error:  # a folder of somebody else's JSON raises whatever it raises
            raise InputError(f"--tokenizer {name}: {first_line(error)}") from error
        if not getattr(self._tokenizer, "is_fast", False):
            raise InputError(f"--tokenizer {name}: has no fast tokenizer (tokenizer.json); give a .model file instead")
        if self._tokenizer.eos_token_id is None:
            raise InputError(
                f"--tokenizer {name}: has no end-of-sequence token, which separates documents; name it in "
                'tokenizer_config.json, as in {"eos_token": "</s>"}'
            )
        self.name = name
        self.eos_id = int(self._tokenizer.eos_token_id)
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.adds_bos = self.bos_id is not None and self._first_of_call() == self.bos_id
        self.unknown_id: int | None = self._tokenizer.unk_token_id
        if self.unknown_id in (self.eos_id, self._tokenizer.bos_token_id):  # a marker too, as GPT-2's is
            self.unknown_id = None
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        special = {number for number, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        special.update(self._tokenizer.all_special_ids)
        ordinary = set(self.vocabulary.values()) - special
        if len(ordinary) < 2:  # what transformers builds, silently, where it finds no vocabulary
            raise InputError(f"--tokenizer {name}: has no tokens but special ones; is tokenizer.json missing?")
        # The ids that no text may produce. The end marker is one of them, but the data pipeline adds it by itself.
        self._control = special - {self.unknown_id}
        usable = set(self.vocabulary.values()) - (self._control - {self.eos_id})
        self.vocab_size = max(usable) + 1
        self._plain = self._plain_form(special)
        self.fingerprint = self._behaviour()
        form = json.loads(self._plain.to_str())
        self._is_by_bytes = "'ByteLevel'" in str([form["normalizer"], form["pre_tokenizer"]])

    @cached_property
    def vocabulary_fingerprint(self) -> str:
        """Return the SHA-256 of the vocabulary."""
        content = repr(sorted(self.vocabulary.items()))
        return hashlib.sha256(content.encode()).hexdigest()

    def _first_of_call(self) -> int | None:
        """Return the first id that transformers' own call makes of a text; None where it makes none."""
        try:
            ids: list[int] = self._tokenizer("a")["input_ids"]
        except Exception:  # a vocabulary that lacks a character, and an unknown token for it
            return None
        return ids[0] if ids else None

    def _plain_form(self, special: set[int]) -> "tokenizers.Tokenizer":
        """Return a copy of the library's tokenizer that adds nothing to a text, cuts none, and spells special tokens.

        Raises InputError where it has parts in Python, which no file holds.
        """
        from tokenizers import Tokenizer, processors

        try:
            content = self._tokenizer.backend_tokenizer.to_str()
        except Exception as error:
            raise InputError(f"--tokenizer {self.name}: cannot be saved ({first_line(error)})") from error
        added = self._tokenizer.added_tokens_decoder.values()
        if any(token.special and token.normalized for token in added):
            content = _not_normalized(content)
        plain = Tokenizer.from_str(content)
        plain.post_processor = processors.Sequence([])
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True
        # The library passes over special tokens in text now. But one may be an ordinary piece of the vocabulary too:
        # all pieces of a Unigram model are, and a word's of one by words.
        made: dict[str, int] = {}
        for number in sorted(special):
            token = plain.id_to_token(number)
            if token is not None and _makes(plain, token, number == self._tokenizer.unk_token_id):
                made[token] = 1
        cut_apart(plain, made)
        return plain

    def _behaviour(self) -> str:
        """Return the SHA-256 of all that decides on the ids."""
        form = json.loads(self._plain.to_str())
        del form["decoder"]
        content = json.dumps([form, sorted(self._control), self.eos_id, self.unknown_id], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, texts: list[str], first: int | None = None) -> list[Ids]:
        """Return all token ids of each text. InputError for one that the vocabulary cannot write."""
        try:
            encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library has no class of its own
            raise InputError(
                f"--tokenizer {self.name}: a text cannot be written ({first_line(error)}); "
                "use one that knows all characters, or has an unknown token"
            ) from error
        return [np.array(self._without_control(encoding.ids), np.int32) for encoding in encodings]

    # The library tells the characters of each token. Where a token ends inside a character, the next one begins with
    # it too. Such a token ends as many bytes behind the last one as it writes, if it says how many these are.
    def byte_ends(self, text: str, first: int | None = None) -> Ends:
        """Return where the text of every token ends."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        ids = encoding.ids
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        begins, ends = _byte_places(text)[places].T
        is_shared = np.zeros(len(ids), bool)
        is_shared[:-1] = (begins[1:] < ends[:-1]) | (begins[:-1] == ends[:-1])
        for i in np.flatnonzero(is_shared):
            before = ends[i - 1] if i else 0
            ends[i] = max(begins[i], before) + self._bytes_of(ids[i])
        ends = _never_falling(ends)
        if self.unknown_id is None and not self._control.isdisjoint(ids):
            ends = ends[[i not in self._control for i in ids]]
        return ends

    def _bytes_of(self, token: int) -> int:
        """Return how many bytes a token writes; 0 where the vocabulary is not of bytes, and does not say."""
        piece = self._plain.id_to_token(token) or ""
        if _BYTE.fullmatch(piece):
            return 1
        return len(piece) if self._is_by_bytes else 0

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    @property
    def has_template(self) -> bool:
        """Return whether the tokenizer has a chat template."""
        return bool(self._tokenizer.chat_template)

    @property
    def template_fingerprint(self) -> str:
        """Return the SHA-256 of all that decides on what the chat template writes."""
        content = json.dumps([self._tokenizer.chat_template, self._tokenizer.special_tokens_map], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def added(self) -> dict[int, str]:
        """Return how each added token is written, those of markers among them, by its id."""
        return {number: token.content for number, token in self._tokenizer.added_tokens_decoder.items()}

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, asks: bool
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Return what the chat template writes of messages, and the spans of characters that it marks as generated.

        It is what ``apply_chat_template`` tokenizes. ``asks``: with what stands before an answer. The spans are None
        where the template marks none. Raises whatever the template does, and InputError where jinja2 is too old.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.get_chat_template(None, tools)
        marks = _GENERATION.search(template) is not None
        try:
            with _RENDERING:
                rendered, spans = render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=template,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=asks,
                    **self._tokenizer.special_tokens_map,
                )
        except ImportError as error:
            raise InputError(f"--tokenizer {self.name}: no chat template can be used ({first_line(error)})") from error
        return rendered[0], spans[0] if marks else None

    def encode_rendered(self, text: str) -> tuple[Ids, Ids]:
        """Return the ids of what a chat template wrote, and the first character of each token and the one behind it.

        Special tokens stand for themselves, whoever wrote them. Ids are (tokens), characters (tokens × 2).
        """
        encoding = self._rendered_form.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)

    @cached_property
    def _rendered_form(self) -> "tokenizers.Tokenizer":
        """Return the plain form that takes special tokens from a text."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self._plain.to_str())

    def _without_control(self, ids: list[int]) -> list[int]:
        """Return ids with the unknown token, if there is one, in place of each control token."""
        # The last guard: a control token of one character (``!`` for padding) cannot be spelled by others.
        if self._control.isdisjoint(ids):
            return ids
        harmless: list[int] = []
        for i in ids:
            if i not in self._control:
                harmless.append(i)
            elif self.unknown_id is not None:
                harmless.append(self.unknown_id)
        return harmless

    def files(self) -> dict[str, bytes]:
        """Return what transformers saves. InputError where that is not this tokenizer, or cannot be saved."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                self._tokenizer.save_pretrained(folder)
                again = load_folder(folder, self.name)
            except Exception as error:  # of a class of somebody else's
                raise InputError(f"--tokenizer {self.name}: cannot be saved ({first_line(error)})") from error
            if again.fingerprint != self.fingerprint:
                raise InputError(
                    f"--tokenizer {self.name}: what transformers saves of it is another tokenizer, so no checkpoint "
                    "could hold it; name a folder to which it was saved with save_pretrained"
                )
            files: dict[str, bytes] = {}
            for file in folder.rglob("*"):
                if file.is_file():
                    files[file.relative_to(folder).as_posix()] = file.read_bytes()
            return files

    def save(self, folder: Path, model_max_length: int, vocabulary: int) -> None:
        """Write the tokenizer that ``encode`` uses, with the roles of its special tokens."""
        form = self._plain
        if any(number >= vocabulary for number in self._tokenizer.added_tokens_decoder):
            form = _cut_off(form, vocabulary)
        settings = {
            "clean_up_tokenization_spaces": self._tokenizer.clean_up_tokenization_spaces,
            "padding_side": self._tokenizer.padding_side,
        }
        for role, token in self._tokenizer.special_tokens_map.items():
            if isinstance(token, str) and self.vocabulary.get(token, vocabulary) < vocabulary:
                settings[role] = token
        if self.has_template:  # which writes special tokens into what is tokenized
            settings["chat_template"] = self._tokenizer.chat_template
            settings["split_special_tokens"] = False
        _save_plain(form, folder, model_max_length, settings)

    def added_words(self) -> list[str]:
        """List the added tokens that text may spell."""
        added = self._tokenizer.added_tokens_decoder
        return [token.content for number, token in added.items() if number not in self._control]


class Begun:
    """Another tokenizer, with the marker of a beginning before each text that has any token."""

    def __init__(self, plain: Tokenizer) -> None:
        if plain.bos_id is None:
            raise InputError(f"--bos yes: --tokenizer {plain.name} has no token for a beginning; leave it out")
        self.plain = plain
        self._marker = np.array([plain.bos_id], np.int32)
        self.name = plain.name
        self.vocab_size = max(plain.vocab_size, plain.bos_id + 1)
        self.eos_id = plain.eos_id
        self.bos_id: int | None = plain.bos_id
        self.adds_bos = True
        self.unknown_id = plain.unknown_id
        self.fingerprint = plain.fingerprint  # the marker is a setting of the run: --bos

    @property
    def vocabulary_fingerprint(self) -> str:
        """Return the other tokenizer's."""
        return self.plain.vocabulary_fingerprint

    def encode(self, texts: list[str], first: int | None = None) -> list[Ids]:
        """Return the marker and the token ids of each text."""
        all_ids = self.plain.encode(texts, first)
        return [np.concatenate([self._marker, ids]) if len(ids) else ids for ids in all_ids]

    def byte_ends(self, text: str, first: int | None = None) -> Ends:
        """Return where the marker ends, which is at once, and where the text of each token does."""
        ends = self.plain.byte_ends(text, first)
        return np.concatenate([[0], ends]) if len(ends) else ends

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens."""
        return self.plain.decode(ids)

    def files(self) -> dict[str, bytes]:
        """Return the other tokenizer's files."""
        return self.plain.files()

    def save(self, folder: Path, model_max_length: int, vocabulary: int) -> None:
        """Write what ``AutoTokenizer`` needs to begin each text with the marker too."""
        from tokenizers import Tokenizer as Form
        from tokenizers import processors

        self.plain.save(folder, model_max_length, vocabulary)
        file = folder / "tokenizer.json"
        if not file.is_file():  # a SentencePiece model that transformers has no like of
            return
        form = Form.from_file(str(file))
        marker = form.id_to_token(int(self._marker[0]))
        form.post_processor = processors.TemplateProcessing(
            single=[marker, "$A"],
            pair=[marker, "$A", marker, "$B:1"],
            special_tokens=[(marker, int(self._marker[0]))],
        )
        form.save(str(file))


def begun(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """Return ``tokenizer`` as ``--bos`` wants it: ``auto`` begins texts where transformers' own call does.

    Raises InputError where it has no marker and is to have one.
    """
    if bos == "yes" or (bos == "auto" and tokenizer.adds_bos):
        return Begun(tokenizer)
    return tokenizer


# What stands beside a token may take its ends: `▁<` or `>.` may be pieces. So it is tried beside a character that is in
# no piece, too, and beside itself where such a character cannot be written. Of the unknown token, the id alone does not
# tell that it is made, since a part of it may be unknown: it must stand for all of the token's characters.
def _makes(form: "tokenizers.Tokenizer", token: str, is_unknown: bool) -> bool:
    """Return whether a text that spells ``token`` gets its id. ``is_unknown``: unknown characters get it as well."""
    number = form.token_to_id(token)
    for before, behind in (("", ""), ("a ", " b"), (OF_NO_PIECE, OF_NO_PIECE), ("", token)):
        try:
            encoding = form.encode(before + token + behind, add_special_tokens=False)
        except Exception:  # a vocabulary that lacks a character, and an unknown token for it
            continue
        whole = (len(before), len(before) + len(token))
        for made, span in zip(encoding.ids, encoding.offsets, strict=True):
            if made == number and (span == whole or not is_unknown):
                return True
    return False


def load_tokenizer(name: str, *, with_template: bool = False) -> Tokenizer:
    """Load ``t5`` (from the hub), ``sample`` (shipped), a ``.model`` file, or a folder's, a run's or a repository's.

    ``with_template``: where it has a chat template, by what knows it. Raises InputError for what is none of these, and
    where the hub is needed and cannot be reached.
    """
    path = find_tokenizer(name)
    if name == "t5":
        return SentencePieceTokenizer(download(*T5), name)
    if path is None:
        return HuggingFaceTokenizer(str(download_hub_tokenizer(name)), name)
    if path.is_file():
        return SentencePieceTokenizer(path, name)
    return load_folder(path, name, with_template=with_template)


def download_hub_tokenizer(repository: str) -> Path:
    """Return a folder with the tokenizer of a repository of the hub. Raises InputError where it cannot be fetched."""
    return download_tokenizer(repository, _HUB_FILES)


# A folder may hold a SentencePiece model and what transformers makes of it. What transformers gives is what the folder
# is known by: it has the tokens that were added, and a file named tokenizer.model may be of another kind (tiktoken's).
# SentencePiece's own is the faster one. So it is used where both are the same.
def load_folder(folder: Path, name: str, *, with_template: bool = False) -> Tokenizer:
    """Load the tokenizer that transformers finds in a folder, by SentencePiece itself where that gives the same ids.

    ``name`` is what messages call it. ``with_template``: SentencePiece, which knows no chat template, is not used where
    there is one. Raises InputError where the folder holds none that can be used.
    """
    models = [folder / file for file in _MODEL_FILES if (folder / file).is_file()]
    has_json = (folder / "tokenizer.json").is_file()
    if not models and not has_json and not any((folder / file).is_file() for file in _OTHER_FILES):
        raise InputError(
            f"--tokenizer {name}: the folder has no tokenizer (tokenizer.json, or a SentencePiece model); name another"
        )
    if not models:
        return HuggingFaceTokenizer(str(folder), name)
    if not has_json and not (folder / "tokenizer_config.json").is_file():
        return SentencePieceTokenizer(models[0], name)
    try:
        whole = HuggingFaceTokenizer(str(folder), name)
    except InputError as error:
        if has_json:
            raise
        log.warning("%s; %s is used by itself, without what tokenizer_config.json says", error, models[0])
        return SentencePieceTokenizer(models[0], name)
    if with_template and whole.has_template:
        return whole
    return _faster(models[0], whole)


def _faster(model: Path, whole: HuggingFaceTokenizer) -> Tokenizer:
    """Return SentencePiece itself where it gives the ids of ``whole``, the tokenizer of its folder; or else that."""
    try:
        direct = SentencePieceTokenizer(model, whole.name)
    except InputError:
        return whole
    if _are_alike(direct, whole):
        direct.adds_bos = whole.adds_bos
        return direct
    log.warning("%s gives other ids than transformers gives its folder: those of transformers are used", model)
    return whole


def _are_alike(direct: SentencePieceTokenizer, whole: HuggingFaceTokenizer) -> bool:
    """Return whether the two have the same ids, on texts that hold every piece and every added token."""
    pieces = direct.pieces()
    if direct.eos_id != whole.eos_id or (whole.adds_bos and direct.bos_id != whole.bos_id):
        return False
    if not pieces.items() <= whole.vocabulary.items():
        return False
    spelled = [piece.replace(SPACE, " ") for piece in pieces]
    texts = [*PROBES, *(f"a {word} b" for word in whole.added_words())]
    for start in range(0, len(spelled), 64):
        texts.append("".join(spelled[start : start + 64]))
    return all(np.array_equal(*both) for both in zip(direct.encode(texts), whole.encode(texts), strict=True))


def find_tokenizer(name: str) -> Path | None:
    """Return the file or folder that ``--tokenizer`` means, or None for one of the hub. InputError if it is neither."""
    path = Path(name)
    if name == "sample":
        shipped = resources.files("galore_pretrain") / "tokenizers" / "sample.model"
        return Path(str(shipped))
    if path.is_file():
        return path
    if path.is_dir():
        return _kept_by_run(path) or path
    if name == "t5" or is_hub_id(name):
        return None
    raise InputError(
        f"--tokenizer {name}: no such file or folder; {did_you_mean(name, ('t5', 'sample'))}"
        "choose t5, sample, a .model file, a folder or a hub id"
    )


def _kept_by_run(folder: Path) -> Path | None:
    """Return where a checkpoint, or the newest one of a run, keeps its tokenizer; None where ``folder`` is neither."""
    kept = sorted((folder / "checkpoints").glob("step_*/tokenizer"))
    if (folder / "state.json").is_file():
        kept = [folder / "tokenizer"]
    whole = [place for place in kept if place.parent.suffix == "" and place.is_dir()]
    return whole[-1] if whole else None


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
