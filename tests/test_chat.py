"""Conversations: what of them has labels, that the ids are those of inference, rows, and lines that hold none."""

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Form
from tokenizers import decoders as form_decoders
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import make, write
from galore_pretrain.errors import InputError
from galore_pretrain.rundir.export import try_export
from galore_pretrain.text.batches import IGNORE, Row, TrainingData, validation_rows
from galore_pretrain.text.chat import ChatRows, template_of
from galore_pretrain.text.conversations import record
from galore_pretrain.text.readers import Flaw
from galore_pretrain.text.sources import BadData, HubDataset, LocalFiles, Tally, open_source
from galore_pretrain.text.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    begun,
    load_folder,
    load_tokenizer,
)
from pretrained import make_folder
from runs import COMMAND_LINE, python

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if tools %}<|head|>tools<|head_end|>\n\n{{ tools | tojson }}<|eot|>{% endif %}"
    "{% for message in messages %}<|head|>{{ message.role }}<|head_end|>\n\n"
    "{% if message.tool_calls is defined %}{{ message.tool_calls | tojson }}{% else %}{{ message.content | trim }}"
    "{% endif %}<|eot|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|head_end|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = CHATML.replace(
    "{{ message.content }}",
    "{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}",
)
MARKED = FORGETFUL.replace(
    "{{ message.content }}",
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}",
)
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|head_end|>", "<|eot|>", "[INST]"]
SPECIAL += ["[/INST]"]
CORPUS = ["user assistant system question answer hello how are you fine thanks the quick brown fox über 日本"] * 20
TALK = [
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "fine, thanks"},
    {"role": "user", "content": "the fox?"},
    {"role": "assistant", "content": "quick über 日本 🙂"},
]
SYSTEM = {"role": "system", "content": "the system"}
FRAGMENTS = ["hello", " how", "\n", " ", "é", "日本", "🙂", "you?", "<|im_end|>", "<|begin|>", "[INST]", "\t", "</s>"]


def folder_of(folder: Path, template: str | None, **settings: Any) -> str:
    """A folder with a byte-level tokenizer that begins texts with a marker, and a template."""
    form = Form(models.BPE())
    form.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    form.decoder = form_decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    form.train_from_iterator(CORPUS, trainer)
    form.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    begin = (SPECIAL[0], form.token_to_id(SPECIAL[0]))
    form.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(f"{begin[0]} $A", special_tokens=[begin]),
        ]
    )
    write(form, folder, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], **settings})
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a template's folder, once."""
    folders: dict[str | None, str] = {}

    def folder(template: str | None) -> str:
        if template not in folders:
            folders[template] = folder_of(tmp_path_factory.mktemp("chat") / "own", template)
        return folders[template]

    return folder


@cache
def theirs_of(folder: str) -> Any:
    """What transformers makes of a folder."""
    return AutoTokenizer.from_pretrained(folder)


def line(*messages: dict[str, Any], **others: Any) -> str:
    return json.dumps({"messages": messages, **others})


def rows_of(tokenizer: Tokenizer | str, texts: Sequence[str], layout: str = "pad", length: int = 200) -> list[Row]:
    if isinstance(tokenizer, str):
        tokenizer = begun(load_tokenizer(tokenizer, with_template=True), "auto")
    return validation_rows(Lists([list(texts)]), ChatRows(tokenizer, layout, length), 10**9)


class Lists:
    """A source of given documents."""

    def __init__(self, shards: list[list[str]]) -> None:
        self._documents, self.shards = shards, [f"shard {i}" for i in range(len(shards))]
        self.fingerprint, self.bad_data = "-", BadData()

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        return iter(list(enumerate(self._documents[shard], 1))[start:])


# -- labels -----------------------------------------------------------------------------------------------------------


def chatml(*messages: tuple[str, str]) -> list[tuple[str, bool]]:
    """What the template writes, in parts, and whether each part is an answer."""
    parts: list[tuple[str, bool]] = []
    for role, content in messages:
        is_answer = role == "assistant"
        parts += [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", is_answer), ("\n", False)]
    return parts


def llama3(*messages: tuple[str, str]) -> list[tuple[str, bool]]:
    parts = [("<|begin|>", False)]
    for role, content in messages:
        parts += [(f"<|head|>{role}<|head_end|>\n\n", False), (f"{content}<|eot|>", role == "assistant")]
    return parts


def mistral(*messages: tuple[str, str]) -> list[tuple[str, bool]]:
    parts = [("<|begin|>", False)]
    for role, content in messages:
        if role == "assistant":
            parts.append((f" {content}<|end|>", True))
        else:
            parts.append((f"[INST] {content} [/INST]", False))
    return parts


@pytest.mark.parametrize(
    ("template", "parts", "has_system"),
    [
        (CHATML, chatml, False),
        (CHATML, chatml, True),
        (LLAMA3, llama3, False),
        (LLAMA3, llama3, True),
        (MISTRAL, mistral, False),  # which has no message of the system
    ],
)
@pytest.mark.parametrize("turns", [2, 4])
def test_answers_alone_have_labels(place: Any, template: str, parts: Any, turns: int, has_system: bool) -> None:
    """With the token that ends them, by which a model learns to stop, and without what comes behind that."""
    messages = TALK[:turns]
    if has_system:
        messages = [SYSTEM, *messages]
    (row,) = rows_of(place(template), [line(*messages)])
    theirs = theirs_of(place(template))
    ids: list[int] = []
    is_answer: list[bool] = []
    for part, has_labels in parts(*((message["role"], message["content"]) for message in messages)):
        of_part = theirs(part, add_special_tokens=False)["input_ids"]
        ids += of_part
        is_answer += [has_labels] * len(of_part)
    assert sum(is_answer) > turns
    assert row.real == len(ids)
    assert row.input_ids[: len(ids)].tolist() == ids
    expected = [ids[i] if is_answer[i] else IGNORE for i in range(1, len(ids))]
    assert row.labels.tolist() == expected + [IGNORE] * (200 - len(expected))


@settings(max_examples=80, deadline=None)
@given(
    template=st.sampled_from([CHATML, LLAMA3, MISTRAL, FORGETFUL, MARKED]),
    contents=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), min_size=2, max_size=6),
)
def test_ids_are_those_of_inference(place: Any, template: str, contents: list[str]) -> None:
    """Of the conversation as of the question: markers that a message spells included."""
    roles = ["user", "assistant"] * 3
    contents = contents[: len(contents) // 2 * 2]
    messages = [{"role": role, "content": f"{said}x"} for role, said in zip(roles, contents, strict=False)]
    (row,) = rows_of(place(template), [line(*messages)], length=500)
    theirs = theirs_of(place(template))
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert row.input_ids[: row.real].tolist() == expected
    labels = row.labels[: row.real - 1]
    has_label = labels != IGNORE
    assert labels[has_label].tolist() == row.input_ids[1 : row.real][has_label].tolist()
    assert labels[-1] != IGNORE or labels[-2] != IGNORE  # the end of the last answer, and perhaps a newline behind it
    tokenizer = load_tokenizer(place(template))
    asked = theirs.apply_chat_template(
        [{"role": "user", "content": contents[0]}], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    chat_template = template_of(tokenizer)
    assert chat_template is not None
    assert chat_template.asked(contents[0]) == asked["input_ids"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MARKED])
def test_an_answer_is_labelled_as_transformers_marks_it(place: Any, template: str) -> None:
    """And so is the token behind that ends it. Of a last character of several tokens, transformers marks the first."""
    messages = [*TALK[:3], {"role": "assistant", "content": "über 日本 🙂 quick"}]
    marks = template
    if template != MARKED:
        content = "{{ message.content | trim }}" if template == LLAMA3 else "{{ message.content }}"
        answer = f"{{% generation %}}{content}{{% endgeneration %}}"
        either = f"{{% if message.role == 'assistant' %}}{answer}{{% else %}}{content}{{% endif %}}"
        marks = template.replace(content, either)
    theirs = theirs_of(place(template))
    found = theirs.apply_chat_template(
        messages, chat_template=marks, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    is_answer = np.array(found["assistant_masks"], bool)
    ends = np.flatnonzero(is_answer[:-1] & ~is_answer[1:]) + 1
    is_answer[ends] = True
    for folder in (template, marks):
        (row,) = rows_of(place(folder), [line(*messages)])
        ids = np.array(found["input_ids"])
        expected = np.where(is_answer[1:], ids[1:], IGNORE)
        assert row.labels[: len(expected)].tolist() == expected.tolist()


def test_a_template_that_writes_an_answer_otherwise_later(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    """No model has written the first answer as it stands there; the last one has its empty thought."""
    rows = rows_of(place(FORGETFUL), [line(*TALK), line(*TALK), line(*TALK[:2])])
    texts = [labelled(place(FORGETFUL), row) for row in rows]
    whole = "<think>\n\n</think>\n\nquick über 日本 🙂<|im_end|>"
    assert texts == [[whole], [whole], ["<think>\n\n</think>\n\nfine, thanks<|im_end|>"]]
    (message,) = caplog.messages
    assert "only the last one has labels there" in message


def test_what_a_template_writes_behind_the_last_answer_alone_has_no_label(place: Any) -> None:
    """Phi-3's writes the tokenizer's end marker there; the earlier answers are none the less whole."""
    closing = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    (row,) = rows_of(place(closing), [line(*TALK)])
    assert labelled(place(closing), row) == ["fine, thanks<|im_end|>", "quick über 日本 🙂<|im_end|>"]
    assert row.input_ids[row.real - 1] == load_tokenizer(place(closing)).eos_id


def test_without_a_marker_of_its_end_an_answer_ends_as_it_is_written(place: Any) -> None:
    plain = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant:{% endif %}"
    (row,) = rows_of(place(plain), [line(*TALK)])
    assert labelled(place(plain), row) == [" fine, thanks\n", " quick über 日本 🙂\n"]


def labelled(folder: str, row: Row) -> list[str]:
    """The runs of labels, as text."""
    theirs = theirs_of(folder)
    runs: list[list[int]] = [[]]
    for label in row.labels.tolist():
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(label)
    return [theirs.decode(run) for run in runs if run]


def test_a_template_that_does_not_extend_is_refused(place: Any) -> None:
    backwards = "{{ messages | length }} {% for message in messages %}{{ message.content }}<|end|>{% endfor %}"
    with pytest.raises(InputError, match=r"does not extend: .*\{% generation %\}.*chat_template.jinja"):
        rows_of(place(backwards), [line(*TALK)])
    unmarked = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(InputError, match="marks no answer by it"):
        rows_of(place(unmarked), [line(*TALK)])


def test_an_answer_to_nothing_and_what_comes_behind_the_last_have_no_label(place: Any) -> None:
    greeting = {"role": "assistant", "content": "hello"}
    (row, same) = rows_of(place(CHATML), [line(greeting, *TALK[:2], TALK[2]), line(greeting, *TALK[:2])])
    assert labelled(place(CHATML), row) == ["fine, thanks<|im_end|>"]
    assert row.input_ids.tolist() == same.input_ids.tolist()


@pytest.mark.parametrize("template", [LLAMA3, CHATML, MARKED])
def test_of_a_prompt_of_messages_the_completion_has_labels(place: Any, template: str) -> None:
    (row, other) = rows_of(place(template), [json.dumps({"prompt": TALK[:3], "completion": TALK[3:]}), line(*TALK)])
    assert len(labelled(place(template), row)) == 1
    assert labelled(place(template), row) == labelled(place(template), other)[1:]
    assert row.input_ids.tolist() == other.input_ids.tolist()


def test_tools_and_calls_are_for_the_template_to_write(place: Any) -> None:
    tools = [{"type": "function", "function": {"name": "fox", "parameters": {"type": "object", "properties": {}}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "fox", "arguments": {}}}]}
    messages = [TALK[0], call, {"role": "tool", "content": "brown"}, TALK[1]]
    (row,) = rows_of(place(LLAMA3), [line(*messages, tools=tools)])
    theirs = theirs_of(place(LLAMA3))
    expected = theirs.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True)["input_ids"]
    assert row.input_ids[: row.real].tolist() == expected
    assert labelled(place(LLAMA3), row) == [
        '[{"function": {"name": "fox", "arguments": {}}}]<|eot|>',
        "fine, thanks<|eot|>",
    ]


# -- prompts and completions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", ["yes", "no"])
def test_a_completion_has_labels_and_the_end_marker(place: Any, bos: str) -> None:
    """Without a template, and no text makes a marker."""
    tokenizer = begun(load_tokenizer(place(CHATML)), bos)
    prompt, completion = "how are <|im_end|>", " you über 日本"
    (row,) = rows_of(tokenizer, [json.dumps({"prompt": prompt, "completion": completion})])
    before = tokenizer.encode([prompt])[0].tolist()
    ids = tokenizer.encode([prompt + completion])[0].tolist()
    assert ids[: len(before)] == before
    assert row.input_ids[: row.real].tolist() == [*ids, tokenizer.eos_id]
    expected = [IGNORE] * (len(before) - 1) + [*ids[len(before) :], tokenizer.eos_id]
    assert row.labels[: row.real].tolist() == [*expected, IGNORE]
    assert (ids[0] == tokenizer.bos_id) == (bos == "yes")


def test_a_completion_that_changes_the_prompts_last_token_has_it_as_label() -> None:
    """The two make one piece together."""
    tokenizer = load_tokenizer("sample")
    prompt, completion = "of the gov", "ernment"
    (row,) = rows_of(tokenizer, [json.dumps({"prompt": prompt, "completion": completion})])
    before, ids = (ids.tolist() for ids in tokenizer.encode([prompt, prompt + completion]))
    common = next(i for i in range(len(before)) if before[i] != ids[i])
    assert row.labels[: row.real].tolist() == [IGNORE] * (common - 1) + [*ids[common:], tokenizer.eos_id, IGNORE]


def test_messages_without_a_template_are_refused(place: Any) -> None:
    rows = ChatRows(load_tokenizer(place(None)), "pack", 64)
    assert rows.fingerprint == ""
    with pytest.raises(InputError, match=r"has no chat template.*chat_template\.jinja, or give lines of"):
        rows.record({"messages": TALK})
    assert isinstance(rows.record({"prompt": "a", "completion": "b"}), str)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_what_is_cut_loses_its_labels(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = place(CHATML)
    (whole,) = rows_of(folder, [line(*TALK)])
    places = np.flatnonzero(whole.labels != IGNORE)
    last_of_first = int(np.flatnonzero(np.diff(places) > 1)[0])
    for length in range(places[0] + 1, whole.real + 1):
        (row,) = rows_of(folder, [line(*TALK)], length=length)
        assert row.real == length
        assert row.input_ids.tolist() == whole.input_ids[:length].tolist()
        assert row.labels[:-1].tolist() == whole.labels[: length - 1].tolist()
        assert row.labels[-1] == whole.labels[length - 1]  # a token behind the row may be the last label
        if length == places[last_of_first] + 1:
            assert labelled(folder, row) == ["fine, thanks<|im_end|>"]
    assert caplog.messages == []
    short = line({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    rows = rows_of(folder, [line(*TALK), short, *[line(*TALK)] * 10], length=int(places[0]))
    assert len(rows) == 1
    assert [message.split(" without")[0][-2:].strip() for message in caplog.messages] == ["1", "10"]
    assert f"within --max-length {places[0]}: left out" in caplog.messages[0]


def test_rows_are_filled_by_whole_conversations(place: Any) -> None:
    folder = place(LLAMA3)
    contents = ["fox", "the quick brown fox", "a", "how are you? " * 4, "b", "c", "hello " * 30, "d"]
    texts = [line({"role": "user", "content": c}, {"role": "assistant", "content": c}) for c in contents]
    alone = rows_of(folder, texts, "pad", 80)
    sizes = [row.real for row in alone]
    expected: list[list[int]] = [[]]
    for i, size in enumerate(sizes):
        if expected[-1] and sum(sizes[j] for j in expected[-1]) + size > 80:
            expected.append([])
        expected[-1].append(i)
    assert max(map(len, expected)) > 1
    packed = rows_of(folder, texts, "pack", 80)
    assert len(packed) == len(expected)
    eos = load_tokenizer(folder).eos_id
    for row, members in zip(packed, expected, strict=True):
        ids = [token for i in members for token in alone[i].input_ids[: sizes[i]].tolist()]
        labels = [label for i in members for label in alone[i].labels[: sizes[i]].tolist()]
        padding = 80 - len(ids)
        assert row.real == len(ids)
        assert row.input_ids.tolist() == ids + [eos] * padding
        assert row.labels.tolist() == labels + [IGNORE] * padding


@pytest.mark.parametrize("layout", ["pad", "pack"])
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=2, max_size=20), sequences=st.integers(1, 3))
def test_a_run_goes_on_at_every_row(place: Any, layout: str, lengths: list[int], sequences: int) -> None:
    """Conversations that are left out are among them."""
    tokenizer = load_tokenizer(place(CHATML))
    texts = [
        line({"role": "user", "content": "x" * n}, {"role": "assistant", "content": f"answer {i}"})
        for i, n in enumerate([*lengths, 0])
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("galore_pretrain.text.batches.BLOCK", 7)

        def stream() -> TrainingData:
            return TrainingData(Lists([texts, texts[:2]]), ChatRows(tokenizer, layout, 48), sequences, 3)

        run = list(islice(stream(), 8))
        for cut in range(7):
            again = stream()
            again.load_state_dict(json.loads(json.dumps(run[cut].state)))
            for a, b in zip(run[cut + 1 :], again, strict=False):
                assert torch.equal(a.input_ids, b.input_ids)
                assert torch.equal(a.labels, b.labels)
                assert (a.tokens, a.state) == (b.tokens, b.state)


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_processes_share_the_rows_of_one(place: Any, layout: str) -> None:
    tokenizer = load_tokenizer(place(CHATML))
    texts = [line({"role": "user", "content": "x" * (i % 40)}, TALK[1]) for i in range(60)]

    def batches(rank: int, size: int) -> list[Any]:
        rows = ChatRows(tokenizer, layout, 64)
        return list(islice(TrainingData(Lists([texts]), rows, 8, 3, rank=rank, size=size), 3))

    parts = [batches(rank, 4) for rank in range(4)]
    for i, batch in enumerate(batches(0, 1)):
        of_all = [part[i] for part in parts]
        assert torch.equal(torch.cat([part.input_ids for part in of_all]), batch.input_ids)
        assert torch.equal(torch.cat([part.labels for part in of_all]), batch.labels)
        assert {part.fingerprint for part in of_all} == {of_all[0].fingerprint}
        assert of_all[0].state == batch.state


def test_conversations_without_a_label_are_not_read_for_ever(place: Any) -> None:
    tokenizer = load_tokenizer(place(CHATML))
    data = TrainingData(Lists([[line(*TALK)] * 3]), ChatRows(tokenizer, "pack", 5), 1, 0)
    with pytest.raises(InputError, match="none has an answer within --max-length 5; give a larger one"):
        next(iter(data))


def test_what_cannot_be_used_is_measured_on_what_is_read(place: Any) -> None:
    tokenizer = load_tokenizer(place(CHATML))
    rows = ChatRows(tokenizer, "pack", 20)
    texts = [line(*TALK), line(TALK[0], {"role": "assistant", "content": "\x00" * 40})]
    (whole, other) = rows_of(tokenizer, texts)
    found = rows.measure([*texts, texts[0][:50]])
    assert found.tokens == whole.real + other.real
    assert found.cut == pytest.approx((whole.real + other.real - 2 * 21) / found.tokens)
    assert found.control > 0.1


# -- sources ----------------------------------------------------------------------------------------------------------

UNFIT = {
    "no JSON": ('{"messages": [', "is not JSON"),
    "a list": ("[1]", "holds no object"),
    "neither": ('{"text": "a", "b": 1}', "has neither .* its keys: 'text', 'b'"),
    "a prompt alone": ('{"prompt": "a"}', "has neither"),
    "no list": ('{"messages": "a"}', 'has no list of messages under "messages"'),
    "empty": ('{"messages": []}', 'has no list of messages under "messages"'),
    "no message": ('{"messages": ["a"]}', 'has no object as message 1 of "messages"'),
    "unknown role": (
        line({"role": "human", "content": "a"}, TALK[1]),
        "message 1 of \"messages\" of role 'human'; rename it to one of system, developer, user, assistant, tool",
    ),
    "no role": ('{"messages": [{"content": "a"}]}', "of role None"),
    "content of parts": (
        line({"role": "user", "content": [{"type": "text", "text": "a"}]}, TALK[1]),
        r'message 1 of "messages" whose content is no string \(\[\{',
    ),
    "no content": (line(TALK[0], {"role": "assistant"}), r"message 2 .* no string \(None\)"),
    "an empty answer": (line(TALK[0], {"role": "assistant", "content": " \n"}), "message 2 .*, an answer, without"),
    "no answer": (line(SYSTEM, TALK[0]), "has no answer"),
    "an answer to nothing": (line(TALK[1], TALK[0]), "has no answer"),
    "mixed": (json.dumps({"prompt": "a", "completion": TALK[1:2]}), 'has no list of messages under "prompt"'),
    "an empty completion": ('{"prompt": "a", "completion": ""}', 'has an empty "completion"'),
    "no answer completes": (json.dumps({"prompt": TALK[:2], "completion": TALK[2:3]}), "has no answer"),
    "tools of text": (line(*TALK, tools="fox"), 'has "tools" that are no list of objects'),
    "tools for nobody": (json.dumps({"prompt": "a", "completion": "b", "tools": [{}]}), "no messages that a template"),
    "half a pair": ('{"prompt": "a", "completion": "\\ud83d"}', "half a surrogate pair"),
    "no user": (line(*TALK[:2], TALK[1]), r"is refused by the chat template .*roles must alternate"),
    "a system message": (line(SYSTEM, *TALK), r"is refused by the chat template .*roles must alternate"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_an_unfit_line_names_file_and_line(
    place: Any, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unfit, message = UNFIT[kind]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([line(*TALK), unfit, line(*TALK)]))
    rows = ChatRows(load_tokenizer(place(MISTRAL)), "pack", 64)
    with pytest.raises(InputError, match=rf"^--data: {path} line 2 .*{message}"):
        list(LocalFiles([path], text_key=rows.record).read(0, 0))
    source = LocalFiles([path], BadData("skip"), text_key=rows.record)
    assert [text for _, text in source.read(0, 0)] == [record({"messages": TALK})] * 2
    assert source.bad_data.tally == Tally(2, 1)
    assert f"{path} line 2 " in caplog.messages[0]


def test_every_kind_of_file_holds_the_same_conversations(tmp_path: Path) -> None:
    objects = [{"messages": TALK[:2], "id": i} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, objects)))
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write("\n".join(json.dumps(one, ensure_ascii=False) for one in objects))
    with_null = [dict(message, tool_calls=None) for message in TALK[:2]]
    table = pyarrow.table({"messages": [with_null] * 6, "id": list(range(6)), "tools": pyarrow.nulls(6)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    expected = [record({"messages": TALK[:2]})] * 6
    for name in ("a.jsonl", "a.json.gz", "a.parquet"):
        source = LocalFiles([tmp_path / name], text_key=record)
        found = list(source.read(0, 0))
        assert [text for _, text in found] == expected
        assert list(source.read(0, found[2][0])) == found[3:]
    (tmp_path / "b.csv").write_text('n,prompt,completion\n1,how are,"you,\nfox"\n2,a,\n')
    source = LocalFiles([tmp_path / "b.csv"], BadData("skip"), text_key=record)
    assert [json.loads(text) for _, text in source.read(0, 0)] == [{"prompt": "how are", "completion": "you,\nfox"}]
    assert source.bad_data.tally == Tally(1, 1)


def test_plain_text_holds_no_conversation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for data in ("sample", str(tmp_path)):
        with pytest.raises(InputError, match=r"is plain text, which has no keys; give lines of JSON"):
            open_source(data, "train", text_key=record)
    (tmp_path / "b.jsonl").write_text(line(*TALK))
    with pytest.raises(InputError, match=r"a\.txt is plain text, which has no keys; leave it out"):
        list(open_source(str(tmp_path), "train", text_key=record).read(0, 0))


def test_a_conversation_falls_on_one_side_whatever_stands_beside_it(tmp_path: Path) -> None:
    texts = [line({"role": "user", "content": f"{i}"}, TALK[1], id=n) for i in range(200) for n in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    sides = [open_source(str(tmp_path), split, text_key=record) for split in ("train", "validation")]
    train, validation = ([text for _, text in side.read(0, 0)] for side in sides)
    assert len(train) + len(validation) == 400
    assert validation
    assert not set(train) & set(validation)


def test_rows_of_the_hub_are_conversations_too() -> None:
    source = object.__new__(HubDataset)
    source._text_key = record
    assert source._text_of({"messages": TALK, "image": object()}, 3) == record({"messages": TALK})
    flaw = source._text_of({"text": "a"}, 3)
    assert isinstance(flaw, Flaw)
    assert str(flaw).startswith("document 3 has neither")


def test_what_json_cannot_write_is_told() -> None:
    flaw = record({"messages": [TALK[0], {**TALK[1], "at": b"\x00"}]})
    assert isinstance(flaw, Flaw)
    assert "cannot be written as JSON" in flaw.what
    assert isinstance(record({"messages": TALK, "at": b"\x00"}), str)
    assert json.loads(str(record({"messages": [{**TALK[0], "n": math.nan}, TALK[1]]})))


# -- tokenizers, exports, answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL])
def test_the_end_of_an_answer_is_found(place: Any, template: str) -> None:
    tokenizer = load_tokenizer(place(template))
    names = {CHATML: ["<|end|>", "<|im_end|>"], LLAMA3: ["<|end|>", "<|eot|>"], MISTRAL: ["<|end|>"]}[template]
    theirs = theirs_of(place(template))
    rows = ChatRows(begun(tokenizer, "yes"), "pack", 64)
    assert theirs.convert_ids_to_tokens(rows.ends) == names
    assert rows.vocab_size == len(theirs)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL])
def test_an_exported_tokenizer_keeps_its_template(
    place: Any, template: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those who load it get the ids of training, markers and all; so does a checkpoint's."""
    tokenizer = begun(load_tokenizer(place(template)), "auto")
    (row,) = rows_of(tokenizer, [line(*TALK)])
    config = AutoModelForCausalLM.from_pretrained(make_folder(tmp_path / "model", tokenizer=None)).config
    try_export(config, tokenizer, ["how are you?"])
    assert caplog.messages == []
    (tmp_path / "exported").mkdir()
    tokenizer.save(tmp_path / "exported", 77, 1024)
    (tmp_path / "kept").mkdir()
    for name, content in tokenizer.files().items():
        (tmp_path / "kept" / name).write_bytes(content)
    for folder in (tmp_path / "exported", tmp_path / "kept"):
        theirs = theirs_of(folder)
        ids = theirs.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
        assert ids == row.input_ids[: row.real].tolist()
        assert theirs("how are you?")["input_ids"] == tokenizer.encode(["how are you?"])[0].tolist()
        again = load_folder(folder, "again")
        assert isinstance(again, HuggingFaceTokenizer)
        assert rows_of(again, [line(*TALK)])[0].labels.tolist() == row.labels.tolist()


def test_all_of_several_templates_are_kept(tmp_path: Path) -> None:
    folder = Path(folder_of(tmp_path / "own", CHATML))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(LLAMA3)
    tokenizer = load_tokenizer(str(folder))
    tools = [{"type": "function", "function": {"name": "fox"}}]
    plain, with_tools = rows_of(tokenizer, [line(*TALK), line(*TALK, tools=tools)])
    assert labelled(str(folder), plain)[0].endswith("<|im_end|>")
    assert labelled(str(folder), with_tools)[0].endswith("<|eot|>")
    (tmp_path / "exported").mkdir()
    tokenizer.save(tmp_path / "exported", 77, 1024)
    again = load_tokenizer(str(tmp_path / "exported"))
    assert ChatRows(again, "pad", 64).fingerprint == ChatRows(tokenizer, "pad", 64).fingerprint


def test_a_template_is_known_where_sentencepiece_has_the_same_ids(tmp_path: Path) -> None:
    """It is the faster one, and knows nothing of the template."""
    own = load_tokenizer(str(make("BPE of LLaMA", tmp_path)))
    folder = tmp_path / "both"
    folder.mkdir()
    own.save(folder, 77, 1024)
    assert (folder / "tokenizer.model").exists()
    assert isinstance(load_tokenizer(str(folder), with_template=True), SentencePieceTokenizer)
    template = MISTRAL.replace("{{ bos_token }}", "<s>")
    (folder / "chat_template.jinja").write_text(template)
    assert isinstance(load_tokenizer(str(folder)), SentencePieceTokenizer)
    tokenizer = load_tokenizer(str(folder), with_template=True)
    (row,) = rows_of(tokenizer, [line(*TALK)])
    theirs = AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
    expected = theirs.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert row.input_ids[: row.real].tolist() == expected
    assert len(labelled(str(folder), row)) == 2
    (tmp_path / "kept").mkdir()
    for name, content in tokenizer.files().items():
        (tmp_path / "kept" / name).write_bytes(content)
    assert isinstance(load_folder(tmp_path / "kept", "kept"), HuggingFaceTokenizer)


def test_a_template_that_names_a_beginning_gets_none_that_the_tokenizer_has_not(tmp_path: Path) -> None:
    from galore_pretrain.rundir.export import _save_tokenizer

    folder = folder_of(tmp_path / "own", LLAMA3)
    settings = tmp_path / "own" / "tokenizer_config.json"
    without = {key: value for key, value in json.loads(settings.read_text()).items() if key != "bos_token"}
    settings.write_text(json.dumps(without))
    tokenizer = load_tokenizer(folder)
    config = AutoModelForCausalLM.from_pretrained(make_folder(tmp_path / "model", tokenizer=None)).config
    (tmp_path / "exported").mkdir()
    _save_tokenizer(tmp_path / "exported", config, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    (row,) = rows_of(tokenizer, [line(*TALK)])
    ids = theirs.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert ids == row.input_ids[: row.real].tolist()


def test_a_model_answers_and_stops(tmp_path: Path) -> None:
    """The ids are those of transformers' own loop, up to the end of a turn, which is not the tokenizer's end marker."""
    folder = make_folder(tmp_path / "model", tokenizer=None)
    folder_of(tmp_path / "model", CHATML)
    theirs = theirs_of(folder)
    asked = theirs.apply_chat_template(
        [TALK[0]], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    flags = ["--chat", "--temperature", "0", "--tokens", "6", "--device", "cpu"]

    def answer() -> str:
        done = python(COMMAND_LINE, "generate", folder, TALK[0]["content"], *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = model.generate(asked, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answer() == theirs.decode(told[0, asked.shape[1] :], skip_special_tokens=True) + "\n"
    with torch.no_grad():  # now it says one word, and ends
        hidden = model.model(asked).last_hidden_state[0, -1]
        word = theirs.convert_tokens_to_ids("fox") or 1
        model.lm_head.weight.zero_()
        model.lm_head.weight[word] = hidden / hidden.norm()
        then = model.model(torch.cat([asked, torch.tensor([[word]])], 1)).last_hidden_state[0, -1]
        other = then - (then @ hidden) / (hidden @ hidden) * hidden
        model.lm_head.weight[theirs.convert_tokens_to_ids("<|im_end|>")] = 100 * other / other.norm()
    model.save_pretrained(folder)
    assert answer() == theirs.decode([word]) + "\n"


def test_a_model_without_a_template_is_not_asked(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    done = python(COMMAND_LINE, "generate", folder, "question", "--chat", "--device", "cpu")
    assert done.returncode == 2
    assert "has no chat template; leave --chat out" in done.stderr
