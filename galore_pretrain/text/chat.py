"""Conversations to rows of tokens, in which the answers alone have labels.

`ChatRows` stands where `batches.TokenRows` does. A document is a conversation in JSON: messages, which the tokenizer's
own chat template turns to text, or a prompt and its completion. `ChatRows.record` makes such documents of the objects
and rows that a source reads, and says which are none.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galore_pretrain.errors import InputError
from galore_pretrain.text.batches import ALL, IGNORE, Position, Row, Share
from galore_pretrain.text.conversations import (
    ANSWERING,
    STRINGS,
    Completion,
    Conversation,
    Message,
    Tool,
    UnfitError,
    parsed,
    record,
)
from galore_pretrain.text.hub import first_line
from galore_pretrain.text.readers import Flaw
from galore_pretrain.text.tokenizer import Begun, HuggingFaceTokenizer, Ids, Tokenizer
from galore_pretrain.text.usable import TextShares, shares

_PROBE = "answer"  # what is answered where it is tried how a template ends an answer
_SHOWN = 40  # characters of a document that an error shows
_BARREN = 100_000  # conversations in a row without a label, after which the data are refused rather than read for ever

log = logging.getLogger(__name__)


# -- the template -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """A ``text``, its token ids, and which of them are an answer's (tokens, bool)."""

    text: str
    ids: Ids
    is_answer: NDArray[np.bool_]


def template_of(tokenizer: Tokenizer) -> "ChatTemplate | None":
    """Return a tokenizer's chat template, or None where it has none."""
    if isinstance(tokenizer, Begun):  # a template writes the marker of a beginning by itself
        tokenizer = tokenizer.plain
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.has_template:
        return ChatTemplate(tokenizer)
    return None


class _RefusedError(Exception):
    """Raised for messages that a template does not take. The message is its reason."""


class ChatTemplate:
    """A tokenizer's own template of conversations, rendered by transformers' sandbox.

    A model that has learned its answers ends them with one of the ids ``ends``: the end of a turn, as far as the
    template has a token for it, and the tokenizer's end marker. ``fingerprint`` changes when the template does.
    ``vocab_size`` is one more than the largest id of any token, since a template may write each.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_told = False
        self.ends = self._ends()
        ends = "|".join(re.escape(tokenizer.added[number]) for number in self.ends if number in tokenizer.added)
        self._ending = re.compile(rf"(?:(?:{ends})\s*)+\Z") if ends else None
        self.fingerprint = tokenizer.template_fingerprint
        self.vocab_size: int = max(tokenizer.vocab_size, max(tokenizer.vocabulary.values()) + 1)

    def _ends(self) -> list[int]:
        """Return the end marker's id, and that of the first added token that the template writes behind an answer."""
        ends = [self._tokenizer.eos_id]
        tried = [{"role": "user", "content": "question"}, {"role": ANSWERING, "content": _PROBE}]
        text = self._prefix(tried, None, asks=False)
        if text is None or _PROBE not in text:
            return ends
        ids, places = self._tokenizer.encode_rendered(text)
        behind = text.rindex(_PROBE) + len(_PROBE)
        for number, first in zip(ids.tolist(), places[:, 0].tolist(), strict=True):
            if first >= behind and number in self._tokenizer.added:
                return list(dict.fromkeys([*ends, number]))
        return ends

    def refusal(self, conversation: Conversation) -> str | None:
        """Return why the template does not take a conversation; None where it does."""
        try:
            self._render(conversation.messages, conversation.tools, asks=False)
        except _RefusedError as error:
            return str(error)
        return None

    def asked(self, question: str) -> list[int]:
        """Return the ids behind which the model answers a user's question. InputError where the template refuses it."""
        try:
            text, _ = self._render([{"role": "user", "content": question}], None, asks=True)
        except _RefusedError as error:
            raise InputError(
                f"--tokenizer {self._tokenizer.name}: its chat template refuses a question by itself ({error})"
            ) from error
        ids, _ = self._tokenizer.encode_rendered(text)
        return [int(number) for number in ids]

    # The whole conversation is tokenized as one, so that its ids are those of `apply_chat_template`. Answers are spans
    # of its characters. A token that lies in one and in what stands before it (a word's space that ends the prompt)
    # counts as the answer's, as it does for transformers; but not a marker, which may swallow the space behind it. The
    # first marker of an end behind an answer is the model's to write. What the template writes behind that is not.
    def tokenize(self, conversation: Conversation) -> Answered:
        """Return a conversation's ids, and which of them are its answers', the marker of an answer's end included.

        Raises InputError where the template does not tell the answers apart.
        """
        try:
            text, marked = self._render(conversation.messages, conversation.tools, asks=False)
        except _RefusedError as error:
            raise InputError(
                f"--tokenizer {self._tokenizer.name}: its chat template refuses a conversation ({error})"
            ) from error
        if marked is None:
            spans = self._spans(conversation, text)
        else:
            spans = self._spans_marked(conversation, text, marked)
        ids, places = self._tokenizer.encode_rendered(text)
        firsts, behinds = places[:, 0], places[:, 1]
        is_added = np.isin(ids, list(self._tokenizer.added))
        is_end = np.isin(ids, self.ends)
        is_answer = np.zeros(len(ids), np.bool_)
        for start, stop in spans:
            is_inside = (behinds > start) & (firsts < stop) & ~(is_added & (firsts < start))
            is_answer |= is_inside
            behind = int(np.flatnonzero(is_inside).max(initial=-1)) + 1
            if 0 < behind < len(ids) and is_end[behind]:
                is_answer[behind] = True
        return Answered(text, ids, is_answer)

    # An answer is what its message adds to the conversation before it, but for what already asks for it, and for the
    # markers of its end. That holds where the text of the whole conversation begins with both. Some templates write an
    # earlier answer otherwise once the conversation goes on (Qwen3's leaves out thoughts). Such an answer stands there
    # as no model has written it, so it has no label.
    def _spans(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """Return where the answers stand in a conversation's ``text``, without their ends, by rendering its parts."""
        messages, tools = conversation.messages, conversation.tools
        spans: list[tuple[int, int]] = []
        for number in conversation.answers:
            before = self._prefix(messages[:number], tools, asks=True)
            through: str | None = text
            if number + 1 < len(messages):
                through = self._prefix(messages[: number + 1], tools, asks=False)
            if before is None or through is None:
                continue
            answered = through[: self._end(through)]
            if answered.startswith(before) and text.startswith(answered):
                spans.append((len(before), len(answered)))
        if not spans:
            raise self._error("does not extend: with an answer, a text does not begin as without")
        if len(spans) < len(conversation.answers) and not self._is_told:
            self._is_told = True
            log.warning(
                "--tokenizer %s: its chat template writes an answer otherwise once the conversation goes on: only the "
                "last one has labels there; to learn from all of them, end a conversation with each",
                self._tokenizer.name,
            )
        return spans

    def _spans_marked(
        self, conversation: Conversation, text: str, marked: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Return those of the spans that the template itself has marked which have labels, without their ends."""
        begin = 0
        if conversation.first:
            before = self._prefix(conversation.messages[: conversation.first], conversation.tools, asks=True)
            if before is None or not text.startswith(before):
                raise self._error("does not extend: with a completion, a text does not begin as without")
            begin = len(before)
        spans = [(start, self._end(text[:stop])) for start, stop in marked if start >= begin]
        if not spans:
            raise self._error("has {% generation %}, and marks no answer by it")
        return spans

    def _end(self, text: str) -> int:
        """Return how many characters stand before the markers by which a text ends."""
        ending = self._ending.search(text) if self._ending is not None else None
        return ending.start() if ending else len(text)

    def _error(self, what: str) -> InputError:
        """Return the error that the template does not tell answers apart."""
        return InputError(
            f"--tokenizer {self._tokenizer.name}: its chat template {what}; put {{% generation %}} and "
            f"{{% endgeneration %}} around an answer in its chat_template.jinja, or give lines of {STRINGS}"
        )

    def _prefix(self, messages: list[Message], tools: list[Tool] | None, *, asks: bool) -> str | None:
        """Return the text of the beginning of a conversation; None where the template does not take it."""
        try:
            text, _ = self._render(messages, tools, asks=asks)
        except _RefusedError:
            return None
        return text

    def _render(
        self, messages: list[Message], tools: list[Tool] | None, *, asks: bool
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Return what `HuggingFaceTokenizer.render` does. Raises _RefusedError where the template takes no such."""
        try:
            return self._tokenizer.render(messages, tools, asks=asks)
        except InputError:
            raise
        except Exception as error:  # whatever a template of somebody else's raises
            raise _RefusedError(first_line(error)) from error


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Placed:
    """The ids and labels of a conversation, of one length, as they stand in a row."""

    input_ids: Ids
    labels: Ids


class ChatRows:
    """Conversations as rows of ``max_length`` tokens, whole but for what is longer than a row, whose end is cut.

    ``pad``: one conversation a row. ``pack``: as many as fit, in the order in which they come. The rest of a row is
    padding. Answers have labels, and nothing else. A conversation whose answers are all cut away is left out, which a
    warning says. ``tokenizer`` has to be loaded with its template, where it has one. With ``separate``, packed rows say
    where their conversations begin.
    """

    def __init__(self, tokenizer: Tokenizer, layout: str, max_length: int, *, separate: bool = False) -> None:
        self._tokenizer = tokenizer
        self._template = template_of(tokenizer)
        self._layout = layout
        self._max_length = max_length
        self._separate = separate

    @property
    def kept(self) -> int:
        """Return how many tokens of a conversation a row has room for. The last of them is a label alone."""
        return self._max_length + 1

    @property
    def ends(self) -> list[int]:
        """List the ids by which a model that learned from these rows ends an answer."""
        if self._template is None:
            return [self._tokenizer.eos_id]
        return self._template.ends

    @property
    def vocab_size(self) -> int:
        """Return one more than the largest id that a row can have: see `ChatTemplate`."""
        if self._template is None:
            return self._tokenizer.vocab_size
        return max(self._tokenizer.vocab_size, self._template.vocab_size)

    @property
    def fingerprint(self) -> str:
        """Return what changes when the template does; empty where there is none."""
        if self._template is None:
            return ""
        return self._template.fingerprint

    def record(self, document: object) -> str | Flaw:
        """Return the conversation that an object or a row holds, as JSON; or what is wrong with it.

        This is a `readers.Record`: ``open_source(…, text_key=rows.record)``. Raises InputError for messages where the
        tokenizer has no chat template.
        """
        text = record(document)
        if isinstance(text, Flaw):
            return text
        conversation = parsed(text)
        if isinstance(conversation, Conversation):
            why = self._template_for_messages().refusal(conversation)
            if why is not None:
                return Flaw(f"is refused by the chat template of --tokenizer {self._tokenizer.name} ({why})")
        return text

    def measure(self, documents: Sequence[str]) -> TextShares:
        """Measure how much of the texts of conversations cannot be used. A document that was cut is passed over."""
        answered: list[Answered] = []
        for document in documents:
            try:
                conversation = parsed(document)
            except UnfitError:
                continue
            answered.append(self._tokenize(conversation))
        texts = [one.text for one in answered]
        return shares(texts, [one.ids for one in answered], self._tokenizer, self.kept)

    # Next fit: a conversation that does not fit in the row begins the next one. So a row is decided by where it begins
    # in the stream alone, and a run goes on at any row. Every process reads and tokenizes all conversations, since
    # which of them stand in a row shows only then.
    def __call__(self, documents: Iterable[tuple[Position, str, Position]], share: Share = ALL) -> Iterator[Row]:
        """Yield all rows, in every process. The last one of documents that end may hold few conversations."""
        del share
        open_row: list[_Placed] = []
        used = 0
        after = Position()
        for placed, position in self._placed(documents):
            if placed is not None:
                size = len(placed.input_ids)
                fits = self._layout == "pack" and used + size <= self._max_length
                if open_row and not fits:
                    yield self._row(open_row, after)
                    open_row = []
                    used = 0
                open_row.append(placed)
                used += size
            after = position
        if open_row:
            yield self._row(open_row, after)

    def _placed(self, documents: Iterable[tuple[Position, str, Position]]) -> Iterator[tuple[_Placed | None, Position]]:
        """Yield each document's tokens and the position after it; None for the tokens of one without a label.

        Raises InputError where none has a label for too long.
        """
        left_out = 0  # conversations of the first epoch; later ones leave out the same
        barren = 0  # in a row, up to here
        since = 0  # the epoch in which these began
        for position, document, after in documents:
            placed = self._place(document)
            yield placed, after
            if placed is not None:
                barren = 0
                continue
            since = position.epoch if barren == 0 else since
            barren += 1
            if position.epoch == 0:
                left_out += 1
                self._warn(left_out)
            if barren > _BARREN or position.epoch > since + 1:  # a whole epoch lies between
                raise InputError(
                    f"--data: of {barren} conversations in a row, none has an answer within --max-length "
                    f"{self._max_length}; give a larger one"
                )

    def _warn(self, left_out: int) -> None:
        """Log how many conversations were left out, at 1, 10, 100 and so on."""
        if str(left_out).strip("0") == "1":
            log.warning(
                "of the conversations read so far, %d without an answer within --max-length %d: left out",
                left_out,
                self._max_length,
            )

    def _place(self, document: str) -> _Placed | None:
        """Return a conversation as it stands in a row; None where it has no label there."""
        try:
            conversation = parsed(document)
        except UnfitError as error:
            raise InputError(f"--data: {document[:_SHOWN]!r} {error}") from error
        answered = self._tokenize(conversation)
        input_ids = answered.ids[: self._max_length]
        targets = answered.ids[1 : self.kept]
        is_answer = answered.is_answer[1 : self.kept]
        if not is_answer.any():
            return None
        labels = np.full(len(input_ids), IGNORE, np.int32)  # nothing comes behind the last token of a conversation
        labels[: len(targets)] = np.where(is_answer, targets, IGNORE)
        return _Placed(input_ids, labels)

    def _tokenize(self, conversation: Conversation | Completion) -> Answered:
        """Return a conversation's ids, and which of them are answers'."""
        if isinstance(conversation, Conversation):
            return self._template_for_messages().tokenize(conversation)
        return self._complete(conversation)

    # A prompt's ids are those that it has by itself, as at inference. Where the completion changes the last of them,
    # labels begin with the first that is another one.
    def _complete(self, told: Completion) -> Answered:
        """Return the ids of a prompt with its completion and the end marker; neither text makes a special token."""
        text = told.prompt + told.completion
        before, whole = self._tokenizer.encode([told.prompt, text])
        common = min(len(before), len(whole))
        differing = np.flatnonzero(before[:common] != whole[:common])
        if len(differing):
            common = int(differing[0])
        ids = np.append(whole, np.int32(self._tokenizer.eos_id)).astype(np.int32)
        return Answered(text, ids, np.arange(len(ids)) >= common)

    def _row(self, conversations: Sequence[_Placed], after: Position) -> Row:
        """Return a row of conversations, filled up with padding without labels."""
        # Any id may stand for padding, since no label comes behind it.
        input_ids = np.full(self._max_length, self._tokenizer.eos_id, np.int32)
        labels = np.full(self._max_length, IGNORE, np.int32)
        real = 0
        begins: list[int] = []
        for placed in conversations:
            begins.append(real)
            stop = real + len(placed.input_ids)
            input_ids[real:stop] = placed.input_ids
            labels[real:stop] = placed.labels
            real = stop
        starts = np.array(begins, np.int32) if self._separate else None
        return Row(input_ids, labels, real, after, starts=starts)

    def counted(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Row]:
        """Return the rows as they are: answers are a part of their texts, whose bytes nobody counts."""
        return list(rows)

    def _template_for_messages(self) -> ChatTemplate:
        """Return the template; InputError where there is none."""
        if self._template is None:
            raise InputError(
                f"--tokenizer {self._tokenizer.name}: has no chat template, which messages need; put one in its folder "
                f"as chat_template.jinja, or give lines of {STRINGS}"
            )
        return self._template
