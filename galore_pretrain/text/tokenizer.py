"""Text to token ids: SentencePiece itself for a ``.model``, a Hugging Face fast tokenizer for anything else.

SentencePiece is called directly and in batches: measured 8 times as fast as the same model behind transformers'
wrapper.
"""

import hashlib
import logging
import shutil
import threading
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from galore_pretrain.errors import InputError
from galore_pretrain.text.hub import T5, download, first_line, is_hub_id

Ids = NDArray[np.int32]
"""Token ids of one text."""
_PROBES = ["The quick brown fox, 1984: it's here.", "Zürich — naïve café", "a  b\n\nc\td"]
_SPACE = "\u2581"  # what SentencePiece writes for it in a piece
_CHARACTERS = 6  # of a text that are tried for each token wanted: English has some 4.5 a token of T5's
_MODEL_FILES = ("spiece.model", "tokenizer.model")  # as T5's and LLaMA's classes of transformers look for them

log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """Gives what the data pipeline and the exported model need of a tokenizer."""

    name: str
    vocab_size: int
    """One more than the largest id that ``encode`` can return."""
    eos_id: int
    fingerprint: str
    """SHA-256 of the vocabulary, so that a run can tell that it goes on with the same one."""

    def encode(self, texts: list[str], first: int | None = None) -> list[Ids]:
        """Return the token ids of each text, without a beginning or end marker.

        No text can produce a control token. Where the ``first`` so many ids of each are enough, later ones may be
        missing.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens."""
        ...

    def save(self, folder: Path, model_max_length: int) -> None:
        """Write what ``AutoTokenizer.from_pretrained(folder)`` needs; a prompt gets the ids of ``encode``."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file."""

    def __init__(self, path: Path, name: str) -> None:
        import sentencepiece

        try:
            # One thread: by default each call starts as many as the host has cores, in every process of a run.
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path), num_threads=1)
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"--tokenizer {path}: not a SentencePiece model; give a .model file or a folder"
            ) from error
        self._path = path
        self.name = name
        self.vocab_size = int(self._processor.get_piece_size())
        self.eos_id = int(self._processor.eos_id())
        self.fingerprint = _sha256(path)
        pieces = self._processor.id_to_piece(list(range(self.vocab_size)))
        self._is_by_words = not any(_SPACE in piece[1:] for piece in pieces)
        if self.eos_id < 0:
            raise InputError(f"--tokenizer {path}: has no end-of-sequence piece (</s>), which separates documents")

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

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens."""
        text_ids = [i for i in ids if not self._processor.is_control(i)]
        return str(self._processor.decode(text_ids))

    def save(self, folder: Path, model_max_length: int) -> None:
        """Copy the model, and convert it with transformers' own classes if the ids come out the same."""
        # A .model does not say which class of transformers treats text as it does. So each one is tried with a few
        # texts, with the file under the name that it looks for. The last of them has runs of white space, which a
        # class may treat differently and yet be the right one.
        from transformers import LlamaTokenizer, T5Tokenizer

        expected = [ids.tolist() for ids in self.encode(_PROBES)]
        for file, loader in zip(_MODEL_FILES, (T5Tokenizer, LlamaTokenizer), strict=True):
            kwargs: dict[str, Any] = {}
            if loader is T5Tokenizer:
                kwargs["extra_ids"] = 0
            shutil.copyfile(self._path, folder / file)
            try:
                converted = loader.from_pretrained(folder, **kwargs)
                ids = converted(_PROBES, add_special_tokens=False)["input_ids"]
            except Exception as error:  # whatever a class raises at a model that is not its own
                log.debug("%s does not take %s: %s", loader.__name__, self._path, error)
                ids = []
            if ids[:2] == expected[:2]:
                if ids != expected:
                    log.warning("transformers' form of %s treats runs of white space differently", self._path)
                _save_converted(converted, folder, model_max_length)
                return
            (folder / file).unlink()
        shutil.copyfile(self._path, folder / _MODEL_FILES[0])
        log.warning(
            "no transformers class gives the ids of %s; the model folder has the .model file alone",
            self._path,
        )


def _beginning(text: str, most: int) -> str:
    """Return ``text`` up to the last space among its first ``most`` characters, or all of it if there is no such."""
    if len(text) <= most:
        return text
    space = text.rfind(" ", 0, most)
    if space < 0:
        return text
    return text[:space]


def _save_converted(tokenizer: Any, folder: Path, model_max_length: int) -> None:
    """Save a tokenizer of transformers as a plain fast one, which adds no marker to a text."""
    from tokenizers.processors import Sequence
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    backend.post_processor = Sequence([])  # T5's ends every text, a prompt too, with </s>
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"model_max_length": model_max_length, **tokenizer.special_tokens_map},
    )
    plain.save_pretrained(folder)


class HuggingFaceTokenizer:
    """A fast tokenizer of transformers: a folder with ``tokenizer.json``, or a repository of the hub."""

    def __init__(self, where: str, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(where)
        except Exception as error:  # a folder of somebody else's JSON raises whatever it raises
            raise InputError(f"--tokenizer {where}: {first_line(error)}") from error
        if not getattr(self._tokenizer, "is_fast", False):
            raise InputError(f"--tokenizer {where}: has no fast tokenizer (tokenizer.json); give a .model file instead")
        if self._tokenizer.eos_token_id is None:
            raise InputError(f"--tokenizer {where}: has no end-of-sequence token, which separates documents")
        vocabulary = self._tokenizer.get_vocab()
        if len(vocabulary) < 100:  # what transformers builds, silently, from a file it did not understand
            raise InputError(f"--tokenizer {where}: only {len(vocabulary)} tokens; is tokenizer.json missing?")
        self.name = name
        self.eos_id = int(self._tokenizer.eos_token_id)
        self._lock = threading.Lock()
        # The ids that no text may produce. The end marker is one of them, but the data pipeline adds it by itself.
        self._control = frozenset(self._tokenizer.all_special_ids) - {self._tokenizer.unk_token_id}
        usable = set(vocabulary.values()) - (self._control - {self.eos_id})
        self.vocab_size = max(usable) + 1
        content = repr(sorted(vocabulary.items()))
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, texts: list[str], first: int | None = None) -> list[Ids]:
        """Return all token ids of each text."""
        if not texts:  # which the library does not take
            return []
        with self._lock:  # the library's own tokenizer is one thread's
            encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [np.array(self._without_control(ids), np.int32) for ids in encoded]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _without_control(self, ids: list[int]) -> list[int]:
        """Return ids with the unknown token, if there is one, in place of each control token."""
        # A text that spells a control token (``</s>``) must not act as one.
        if self._control.isdisjoint(ids):
            return ids
        unknown = self._tokenizer.unk_token_id
        harmless: list[int] = []
        for i in ids:
            if i not in self._control:
                harmless.append(i)
            elif unknown is not None:
                harmless.append(unknown)
        return harmless

    def save(self, folder: Path, model_max_length: int) -> None:
        """Write the tokenizer's files, with ``model_max_length`` among its settings."""
        self._tokenizer.model_max_length = model_max_length
        self._tokenizer.save_pretrained(folder)


def load_tokenizer(name: str) -> Tokenizer:
    """Load ``t5`` (from the hub), ``sample`` (shipped), a ``.model`` file, a tokenizer's folder, or a hub's repository.

    Raises InputError for what is none of these, and where the hub is needed and cannot be reached.
    """
    path = find_tokenizer(name)
    if name == "t5":
        return SentencePieceTokenizer(download(*T5), name)
    if path is not None and path.is_file():
        return SentencePieceTokenizer(path, name)
    if path is None:
        download(name, "tokenizer_config.json")
    return HuggingFaceTokenizer(name, name)


def find_tokenizer(name: str) -> Path | None:
    """Return the file or folder that ``--tokenizer`` means, or None for one of the hub. InputError if it is neither."""
    path = Path(name)
    if name == "sample":
        shipped = resources.files("galore_pretrain") / "tokenizers" / "sample.model"
        return Path(str(shipped))
    if path.is_dir():
        # A folder may hold both forms; SentencePiece's own is the faster one.
        for file in _MODEL_FILES:
            if (path / file).is_file():
                return path / file
        return path
    if path.is_file():
        return path
    if name == "t5" or is_hub_id(name):
        return None
    raise InputError(
        f"--tokenizer {name}: no such file or folder; choose t5, sample, a .model file, a folder or a hub id"
    )


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
