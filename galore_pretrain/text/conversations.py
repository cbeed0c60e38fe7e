"""What an object of JSON has to hold to be a conversation, and what is wrong with one that is none.

It holds ``messages``, or a ``prompt`` and its ``completion``, which are both strings or both messages.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from galore_pretrain.text.readers import Flaw, is_text

Message = dict[str, Any]
Tool = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may say something. Which of them a chat template takes, it says by itself."""
ANSWERING = "assistant"
STRINGS = '{"prompt": "…", "completion": "…"}'
"""A line that needs no template."""
_LINE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
_EXPECTED = f"each line is {_LINE} or {STRINGS}"
_NAMED = 20  # keys that an error names at most
_SHOWN = 40  # characters of a value that an error shows


@dataclass(frozen=True)
class Conversation:
    """Messages, the last of which answers, and the ``tools`` that they may use; labels begin at message ``first``."""

    messages: list[Message]
    tools: list[Tool] | None = None
    first: int = 0

    @property
    def answers(self) -> list[int]:
        """List the numbers of the messages that have labels. One that nothing stands before answers nothing."""
        numbers = range(max(1, self.first), len(self.messages))
        return [number for number in numbers if self.messages[number]["role"] == ANSWERING]

    def as_json(self) -> dict[str, Any]:
        """Return the object that `conversation_of` makes this of."""
        document: dict[str, Any] = {"messages": self.messages}
        if self.first:
            document = {"prompt": self.messages[: self.first], "completion": self.messages[self.first :]}
        if self.tools is not None:
            document["tools"] = self.tools
        return document


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on, without a template; the ``completion`` has labels."""

    prompt: str
    completion: str

    def as_json(self) -> dict[str, Any]:
        """Return the object that `conversation_of` makes this of."""
        return {"prompt": self.prompt, "completion": self.completion}


class UnfitError(Exception):
    """Raised for an object that is no conversation: ``what`` may follow ``line 7``, and a ``way_out``."""

    def __init__(self, what: str, way_out: str = _EXPECTED) -> None:
        super().__init__(f"{what}; {way_out}")
        self.what = what
        self.way_out = way_out


def record(document: object) -> str | Flaw:
    """Return the conversation that an object or a row holds, as JSON without what else it holds; or what is wrong.

    This is a `readers.Record`. It knows no template: `ChatRows.record` asks that as well.
    """
    try:
        text = json.dumps(conversation_of(document).as_json(), ensure_ascii=False)
    except UnfitError as error:
        return Flaw(error.what, way_out=error.way_out)
    except (TypeError, ValueError, RecursionError) as error:  # a column's bytes or dates, or what is nested too deep
        return Flaw(f"cannot be written as JSON ({error})")
    if not is_text(text):
        return Flaw("has half a surrogate pair, which is no character")
    return text


def parsed(text: str) -> Conversation | Completion:
    """Return the conversation that `record` has written. Raises UnfitError where ``text`` is another."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UnfitError(f"is not JSON ({error})") from error
    return conversation_of(document)


def conversation_of(document: object) -> Conversation | Completion:
    """Return what an object of JSON holds, up to its last answer. Raises UnfitError where it is no conversation."""
    if not isinstance(document, dict):
        raise UnfitError("holds no object")
    tools = document.get("tools") or None
    if tools is not None and not _is_list_of_objects(tools):
        raise UnfitError('has "tools" that are no list of objects', "write them as a list of JSON schemas")
    if document.get("messages") is not None:
        return _up_to_last_answer(_messages(document["messages"], "messages"), tools, first=0)
    prompt, completion = document.get("prompt"), document.get("completion")
    if prompt is None or completion is None:
        raise UnfitError('has neither "messages" nor "prompt" and "completion"', f"{_EXPECTED}; {_told(document)}")
    if isinstance(prompt, str) and isinstance(completion, str):
        if tools is not None:
            raise UnfitError('has "tools", and no messages that a template writes', "leave them out")
        if not completion.strip():
            raise UnfitError('has an empty "completion"')
        return Completion(prompt, completion)
    before = _messages(prompt, "prompt")
    return _up_to_last_answer(before + _messages(completion, "completion"), tools, first=len(before))


def _up_to_last_answer(messages: list[Message], tools: list[Tool] | None, first: int) -> Conversation:
    """Return messages as a conversation. Raises UnfitError where there is no answer."""
    answers = Conversation(messages, tools, first).answers
    if not answers:
        raise UnfitError(f'has no answer: no message of role "{ANSWERING}" behind another')
    return Conversation(messages[: answers[-1] + 1], tools, first)


def _messages(value: object, key: str) -> list[Message]:
    """Return the messages under a key. Raises UnfitError where one is not as it must be, or there is none."""
    if not isinstance(value, list) or not value:
        raise UnfitError(f'has no list of messages under "{key}"')
    return [_message(message, f'message {number} of "{key}"') for number, message in enumerate(value, 1)]


def _message(value: object, which: str) -> Message:
    """Return a message without what is null, as transformers gives it to a template; UnfitError where it is none."""
    if not isinstance(value, dict):
        raise UnfitError(f"has no object as {which}")
    message = {key: part for key, part in value.items() if part is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UnfitError(f"has {which} of role {_shown(role)}", f"rename it to one of {', '.join(ROLES)}")
    if message.get("tool_calls") and content is None:
        return message
    if not isinstance(content, str):
        raise UnfitError(f"has {which} whose content is no string ({_shown(content)})")
    if role == ANSWERING and not content.strip() and not message.get("tool_calls"):
        raise UnfitError(f"has {which}, an answer, without content")
    return message


def _is_list_of_objects(value: object) -> bool:
    """Return whether ``value`` is a list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _told(document: dict[Any, Any]) -> str:
    """Return the keys of an object for a message, the first few of them."""
    keys: Sequence[Any] = list(document)
    return f"its keys: {', '.join(_shown(key) for key in keys[:_NAMED])}"


def _shown(value: object) -> str:
    """Return a value as Python writes it, or its beginning."""
    written = repr(value)
    if len(written) > _SHOWN:
        return f"{written[:_SHOWN]}…"
    return written
