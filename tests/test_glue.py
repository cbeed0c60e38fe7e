"""GLUE's tasks read from files of every kind and from a loopback hub; what is no example of a task is refused."""

import csv
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fakehub import FakeHub, Fault
from galore_pretrain.errors import InputError
from galore_pretrain.text.glue import TASKS, Examples, Task, read_examples
from galore_pretrain.text.hub import GLUE
from roberta import make_glue

RTE = TASKS["rte"]
ROWS: list[tuple[str, str, int]] = [
    ("plain", "text", 0),
    ('with "quotes", a comma', "a\u2028separator that ends no line", 1),
    ("", "日本 🙂 <s> </s>", 1),
]
"""Of RTE; an empty text is one, as QQP has some."""
FINGERPRINT = "61f7a0a6ef885e9d941be0999807ea2c94238eb427454c3cae416face4599a38"


def records(rows: list[tuple[str, str, int]] = ROWS) -> list[dict[str, Any]]:
    return [{"idx": i, "label": row[2], "sentence2": row[1], "sentence1": row[0]} for i, row in enumerate(rows)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    if ".parquet" in path.suffixes:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if ".csv" in path.suffixes:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        elif ".tsv" in path.suffixes:
            for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
                file.write("\t".join(map(str, row.values())) + "\n")
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def refused(data: Path | str, task: Task = RTE, split: str = "train") -> str:
    with pytest.raises(InputError) as error:
        read_examples(task, str(data), split)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- the tasks --------------------------------------------------------------------------------------------------------


def test_the_tasks_are_glues() -> None:
    assert list(TASKS) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
    assert {name: task.columns for name, task in TASKS.items()} == {
        "cola": ("sentence",),
        "sst2": ("sentence",),
        "mrpc": ("sentence1", "sentence2"),
        "stsb": ("sentence1", "sentence2"),
        "qqp": ("question1", "question2"),
        "mnli": ("premise", "hypothesis"),
        "qnli": ("question", "sentence"),
        "rte": ("sentence1", "sentence2"),
    }
    assert [task.classes for task in TASKS.values()] == [2, 2, 2, 1, 2, 3, 2, 2]
    printed = {name: task.metrics[0] for name, task in TASKS.items()}
    assert printed == dict.fromkeys(TASKS, "accuracy") | {"cola": "matthews", "mrpc": "f1", "stsb": "pearson"}
    assert TASKS["mnli"].validation == ("validation_matched", "validation_mismatched")
    assert {task.validation for name, task in TASKS.items() if name != "mnli"} == {("validation",)}


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["train.parquet", "train-00000-of-00001.parquet", "train.jsonl", "train.json", "train.csv", "train.tsv",
     "train.jsonl.gz", "train_all.csv.gz", "train.tsv.gz"],
)  # fmt: skip
def test_a_file_of_every_kind_holds_the_same(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, records())
    examples = read_examples(RTE, str(tmp_path), "train")
    assert examples.texts == [row[:2] for row in ROWS]
    assert examples.labels.dtype == np.int64
    assert examples.labels.tolist() == [0, 1, 1]
    assert len(examples) == 3
    assert examples.revision is None
    assert examples.fingerprint == FINGERPRINT


def test_the_fingerprint_is_of_all_that_is_read(tmp_path: Path) -> None:
    lines = [json.dumps([*row]) + "\n" for row in ROWS]
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == FINGERPRINT
    found = set()
    changes: list[list[tuple[str, str, int]]] = [
        ROWS,
        ROWS[::-1],
        ROWS[:2],
        [("plain", "text", 1), *ROWS[1:]],
        [("plain text", "", 0), *ROWS[1:]],
        [("text", "plain", 0), *ROWS[1:]],
    ]
    for i, rows in enumerate(changes):
        write(tmp_path / str(i) / "train.jsonl", records(rows))
        found.add(read_examples(RTE, str(tmp_path / str(i)), "train").fingerprint)
    assert len(found) == len(changes)


def test_files_of_a_split_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, rows in (("train-2.csv", ROWS[1:]), ("train-1.csv", ROWS[:1]), ("validation.csv", ROWS[2:])):
        write(tmp_path / name, records(rows))
    (tmp_path / "README.md").write_text("train")
    assert read_examples(RTE, str(tmp_path), "train").texts == [row[:2] for row in ROWS]
    assert read_examples(RTE, str(tmp_path), "validation").texts == [ROWS[2][:2]]


def test_a_split_is_not_another_that_begins_alike(tmp_path: Path) -> None:
    mnli = TASKS["mnli"]
    for i, split in enumerate(("validation_matched", "validation_mismatched", "validation")):
        write(tmp_path / f"{split}.jsonl", [{"premise": split, "hypothesis": "", "label": i}])
    for i, split in enumerate(("validation_matched", "validation_mismatched", "validation")):
        assert read_examples(mnli, str(tmp_path), split).labels.tolist() == [i]


def test_scores_are_numbers_from_0_to_5(tmp_path: Path) -> None:
    scores = [0.0, 3.8, 5.0, 2]
    rows = [{"sentence1": "a", "sentence2": "b", "label": score} for score in scores]
    write(tmp_path / "train.csv", rows)
    write(tmp_path / "validation.jsonl", rows)
    read = [read_examples(TASKS["stsb"], str(tmp_path), split) for split in ("train", "validation")]
    for examples in read:
        assert examples.labels.dtype == np.float32
        assert examples.labels.tolist() == np.float32(scores).tolist()
    assert read[0].fingerprint == read[1].fingerprint


@pytest.mark.parametrize(
    ("task", "label", "told"),
    [
        ("rte", 2, "has the label 2; rte has 0 (entailment), 1 (not_entailment)"),
        ("mnli", 3, "has the label 3; mnli has 0 (entailment), 1 (neutral), 2 (contradiction)"),
        ("rte", "entailment", "has the label 'entailment'; rte has 0 (entailment)"),
        ("rte", 0.5, "has the label 0.5;"),
        ("rte", True, "has the label True;"),
        ("rte", None, "has the label None;"),
        ("rte", float("nan"), "has the label nan;"),
        ("rte", [1], "has the label [1];"),
        ("rte", -1, "has the label -1, which stands for one that GLUE keeps hidden"),
        ("stsb", -1.0, "has the label -1, which stands for one that GLUE keeps hidden"),
        ("stsb", 5.1, "has the label 5.1; stsb has a score from 0 to 5"),
        ("stsb", float("nan"), "has the label nan; stsb has a score from 0 to 5"),
        ("stsb", 10**400, "has the label 1000"),
        ("stsb", "", "has the label ''; stsb"),
    ],
)
def test_what_is_no_label_of_the_task_is_told(task: str, label: Any, told: str, tmp_path: Path) -> None:
    columns = TASKS[task].columns
    rows = [dict.fromkeys(columns, "a") | {"label": i} for i in (0, 1, label)]
    write(tmp_path / "train.jsonl", rows)
    message = refused(tmp_path, TASKS[task])
    assert message.startswith(f"--data {tmp_path}: train.jsonl: line 3 has the label")
    assert told in message
    assert len(message) < 300


def test_labels_of_csv_are_digits(tmp_path: Path) -> None:
    write(
        tmp_path / "train.csv", [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("1", "1.0", " 0")]
    )
    assert read_examples(RTE, str(tmp_path), "train").labels.tolist() == [1, 1, 0]
    write(tmp_path / "train.csv", [{"sentence1": "a", "sentence2": "b", "label": "not_entailment"}])
    assert "train.csv: row 1 has the label 'not_entailment'" in refused(tmp_path)


@pytest.mark.parametrize("text", [None, 5, "half a pair \ud800"])
def test_what_is_no_text_is_told(text: Any, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"sentence1": "a", "sentence2": text, "label": 0}))
    assert 'train.jsonl: line 1 has no text under "sentence2", but ' in refused(tmp_path)


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.csv", "train.tsv"])
def test_a_missing_column_is_told_with_those_that_are_there(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, [{"premise": "a", "sentence2": "b", "label": 0}])
    message = refused(tmp_path)
    assert f"{name}: " in message
    assert "has no column \"sentence1\"; its columns: 'premise', 'sentence2', 'label'; rename" in message


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("train.parquet", b"PAR1", "train.parquet: cannot be read as parquet ("),
        ("train.jsonl", b"{", "train.jsonl: line 1 is not JSON ("),
        ("train.json", b"[]", "train.json: line 1 is no object; jq -c"),
        ("train.jsonl", b'{"sentence1": "\xff"}', "train.jsonl: cannot be read ('utf-8' codec"),
        ("train.jsonl.gz", b"not gzip", "train.jsonl.gz: cannot be read ("),
        ("train.csv", b'sentence1,sentence2,label\n"a,b,0\n', "train.csv: cannot be read after line 2 ("),
        ("train.csv", b"sentence1,sentence2,label\na,b\n", "row 1 has 2 cells, and the first line names 3"),
        ("train.tsv", b"sentence1\tsentence2\tlabel\na\tb\t0\t1\n", "row 1 has 4 cells, and the first line names 3"),
        ("train.tsv", b'sentence1\tsentence2\tlabel\n"a ""b"""\tb\t0\n', "row 1 has a cell in quotes"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert told in refused(tmp_path)


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.tsv", "train.parquet"])
def test_a_file_without_rows_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    if name.endswith(".parquet"):
        schema = pyarrow.schema([("sentence1", "string"), ("sentence2", "string"), ("label", "int64")])
        pyarrow.parquet.write_table(schema.empty_table(), tmp_path / name)
    assert f"{name} holds no row; give --data FOLDER with examples of rte" in refused(tmp_path)


def test_lines_of_windows_and_a_byte_order_mark_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes('\ufeffsentence1\tsentence2\tlabel\r\na\tb "c"\t1\r\n\r\n'.encode())
    (tmp_path / "validation.csv").write_bytes('\ufeffsentence1,sentence2,label\r\na,"b ""c""",1\r\n\r\n'.encode())
    read = [read_examples(RTE, str(tmp_path), split) for split in ("train", "validation")]
    assert read[0].texts == read[1].texts == [("a", 'b "c"')]
    assert read[0].fingerprint == read[1].fingerprint


def test_a_folder_without_the_split_is_told(tmp_path: Path) -> None:
    assert "holds no .parquet, .jsonl, .json, .csv or .tsv file named train*" in refused(tmp_path)
    assert refused(tmp_path).endswith(", and no other file")
    (tmp_path / "training.md").write_text("")
    assert refused(tmp_path).endswith(f", but {tmp_path.name}/training.md")
    (tmp_path / "rte").mkdir()
    assert refused(tmp_path).endswith(f"; did you mean {tmp_path / 'rte'}?")
    missing = refused(tmp_path / "rtf")
    assert f"no such folder; did you mean {tmp_path / 'rte'}? give one with files named train*" in missing
    write(tmp_path / "train.csv", records())
    assert "train.csv: is a file; give the folder of the files that are named train*" in refused(tmp_path / "train.csv")


@pytest.mark.parametrize("other", ["train.csv.gz", "train-00000-of-00001.parquet"])
def test_files_that_may_hold_the_same_are_refused(other: str, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", records())
    write(tmp_path / other, records())
    assert "are of several kinds, and may hold the same examples; leave those of one kind" in refused(tmp_path)


# -- GLUE in miniature ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("hub") / GLUE
    make_glue.write_glue(folder, 66, 33)
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_the_miniature_has_the_form_of_the_hubs(name: str, miniature: Path) -> None:
    task = TASKS[name]
    seen: set[tuple[str, ...]] = set()
    for split, size in (("train", 66), *((split, 33) for split in task.validation)):
        table = pyarrow.parquet.read_table(miniature / name / f"{split}-00000-of-00001.parquet")
        assert table.column_names == [*task.columns, "label", "idx"]
        assert {str(table.schema.field(column).type) for column in task.columns} == {"string"}
        assert str(table.schema.field("label").type) == ("float" if name == "stsb" else "int64")
        examples = read_examples(task, str(miniature / name), split)
        assert len(examples) == size
        counts = np.unique(examples.labels, return_counts=True)[1]
        assert max(counts) - min(counts) <= 1
        assert len(counts) == (6 if name == "stsb" else task.classes)
        for texts, label in zip(examples.texts, examples.labels, strict=True):
            found = [i for i, word in enumerate(make_glue.MARKERS[name]) if word in texts[-1].split()]
            assert found == [list(np.float32(make_glue.SCORES)).index(label) if name == "stsb" else label]
        seen |= set(examples.texts)
    assert len(seen) == 66 + 33 * len(task.validation)
    test = task.validation[0].replace("validation", "test")
    assert "which stands for one that GLUE keeps hidden" in refused(miniature / name, task, test)


def test_the_miniature_is_made_by_a_command(miniature: Path, tmp_path: Path) -> None:
    script = Path(make_glue.__file__)
    words = ["--train", "66", "--validation", "33"]
    done = subprocess.run([sys.executable, script, tmp_path, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, task in TASKS.items():
        examples = [read_examples(task, str(folder / name), "train") for folder in (miniature, tmp_path)]
        assert examples[0].fingerprint == examples[1].fingerprint


# -- the hub ----------------------------------------------------------------------------------------------------------

READ = """
import json, sys
from galore_pretrain.errors import InputError
from galore_pretrain.text.glue import TASKS, read_examples

found = []
for name, split, revision in json.loads(sys.argv[1]):
    try:
        examples = read_examples(TASKS[name], None, split, revision)
    except InputError as error:
        found.append(str(error))
    else:
        found.append([examples.fingerprint, examples.revision])
print(json.dumps(found))
"""


@pytest.fixture
def hub(miniature: Path) -> Iterator[FakeHub]:
    with FakeHub(miniature.parent.parent) as hub:
        yield hub


def from_hub(tmp_path: Path, hub: FakeHub, asked: list[Any], **environment: str) -> list[Any]:
    """What a process without this machine's own hub settings, cache or proxy reads."""
    own = re.compile(r"HF_.*|.*_PROXY", re.IGNORECASE)
    inherited = {key: value for key, value in os.environ.items() if not own.fullmatch(key)}
    fixed = {"HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", "HF_ENDPOINT": hub.url}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(asked)],
        env={**inherited, **fixed, **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def of_folder(miniature: Path, name: str, split: str) -> Examples:
    return read_examples(TASKS[name], str(miniature / name), split)


@pytest.mark.network
def test_every_task_of_the_hub_is_read_at_one_commit(hub: FakeHub, miniature: Path, tmp_path: Path) -> None:
    """And is not asked for again: neither without a hub, nor where the hub has another by now."""
    asked = [[name, split, None] for name, task in TASKS.items() for split in ("train", *task.validation)]
    expected = [[of_folder(miniature, name, split).fingerprint, hub.commit] for name, split, _ in asked]
    assert from_hub(tmp_path, hub, asked) == expected
    hub.fault = Fault(times=10**6, status=500, suffix="")
    assert from_hub(tmp_path, hub, asked, HF_HUB_OFFLINE="1") == expected
    hub.commit = "0" * 40
    assert from_hub(tmp_path, hub, asked) == expected


@pytest.mark.network
def test_a_commit_that_is_named_is_read(hub: FakeHub, miniature: Path, tmp_path: Path) -> None:
    older = hub.commit
    hub.commit = "0" * 40
    fingerprint = of_folder(miniature, "rte", "train").fingerprint
    assert from_hub(tmp_path, hub, [["rte", "train", older], ["rte", "train", None]]) == [
        [fingerprint, older],
        [fingerprint, "0" * 40],
    ]


@pytest.mark.network
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(times=2, status=429, suffix=".parquet"), id="too many requests"),
        pytest.param(Fault(times=2, status=503, suffix=".parquet"), id="unavailable"),
        pytest.param(Fault(times=2, at=1000, suffix=".parquet"), id="drops"),
    ],
)
def test_a_busy_hub_and_a_connection_that_drops_are_asked_again(
    fault: Fault, hub: FakeHub, miniature: Path, tmp_path: Path
) -> None:
    hub.fault = fault
    found = from_hub(tmp_path, hub, [["mrpc", "train", None]])
    assert found == [[of_folder(miniature, "mrpc", "train").fingerprint, hub.commit]]
    assert hub.fault.times == 0


@pytest.mark.network
def test_what_the_hub_has_not_is_told_with_the_way_on(hub: FakeHub, tmp_path: Path) -> None:
    (absent,) = from_hub(tmp_path, hub, [["rte", "held_out", None]])
    assert absent == (
        f"--task rte: {GLUE} of the hub has no rte/held_out-00000-of-00001.parquet; give --data FOLDER with files of "
        "your own"
    )
    (offline,) = from_hub(tmp_path, hub, [["rte", "train", None]], HF_HUB_OFFLINE="1")
    assert offline.startswith(
        f"--task rte: rte/train-00000-of-00001.parquet of {GLUE} cannot be fetched from the hub ("
    )
    assert offline.endswith("; give --data FOLDER with files of your own")
    (closed,) = from_hub(tmp_path, hub, [["rte", "train", None]], HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be fetched from the hub (" in closed
