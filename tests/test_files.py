"""Which files of a folder are text, and what each is for: by whole words of names, and nothing is left out unsaid."""

import errno
import gzip
import json
import os
import random
import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_pretrain.errors import InputError
from galore_pretrain.text.batches import TokenRows, validation_rows
from galore_pretrain.text.files import TEST, TRAINING, VALIDATION, role_of, select
from galore_pretrain.text.sources import LocalFiles, describe_text, in_turn, open_source
from galore_pretrain.text.tokenizer import load_tokenizer


def write(path: Path, *texts: str) -> Path:
    """Write documents in the layout that the path's suffixes ask for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    name = path.name.lower()
    if ".csv" in name:
        lines = "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts))
    elif ".txt" in name:
        lines = "\n\n".join(texts)
    if ".pq" in name or ".parquet" in name:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), path)
    elif ".zst" in name:
        import pyarrow

        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines.encode())
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def texts_of(source: object) -> Counter[str]:
    assert isinstance(source, LocalFiles)
    return Counter(text for shard in range(len(source.shards)) for _, text in source.read(shard, 0))


def said(data: str | list[str], eval_data: str | None = None) -> str:
    """What the log says of files."""
    source = open_source(data, "train", eval_data)
    assert isinstance(source, LocalFiles)
    return "\n".join(source.titles)


def test_what_is_said_of_files_was_found_when_they_were_opened(tmp_path: Path) -> None:
    """Not when it is said, by each process, once more from the disk."""
    write(tmp_path / "data" / "a.jsonl", "a")
    write(tmp_path / "data" / "val.jsonl", "b")
    training, validation = (open_source(str(tmp_path / "data"), split) for split in ("train", "validation"))
    (tmp_path / "data").rename(tmp_path / "away")
    (line,) = describe_text(str(tmp_path / "data"), None, training, validation)
    assert line.startswith(f"--data {tmp_path / 'data'}: training 1 .jsonl (")
    assert describe_text("sample", None, open_source("sample", "train"), open_source("sample", "validation")) == []


def both(folder: Path) -> tuple[Counter[str], Counter[str]]:
    return texts_of(open_source(str(folder), "train")), texts_of(open_source(str(folder), "validation"))


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train.jsonl", TRAINING),
        ("val.jsonl", VALIDATION),
        ("valid_00.jsonl", VALIDATION),
        ("validation/part-0.jsonl", VALIDATION),
        ("DEV-set.JSONL", VALIDATION),
        ("eval/train/a.jsonl", TRAINING),  # the nearest name decides
        ("test.jsonl", TEST),
        ("c4-train.00000-of-01024.json.gz", TRAINING),
        ("validated_part1.jsonl", None),
        ("invalid.jsonl", None),
        ("evaluation.jsonl", None),
        ("contest.txt", None),
        ("détest.txt", None),
        ("de\u0301test.txt", None),  # as macOS writes it
        ("latest/a.jsonl", None),
    ],
)
def test_whole_words_of_names_decide(name: str, role: str | None) -> None:
    assert role_of(name) == role


def test_a_name_that_says_two_things_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "train_test.jsonl", "b")
    with pytest.raises(InputError, match=r"train_test\.jsonl.* says test and training; rename it"):
        open_source(str(tmp_path), "train")


def test_folders_of_a_hugging_face_data_set(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / "data" / split / "0.jsonl", split)
    assert both(tmp_path / "data") == (Counter(["train"]), Counter(["validation"]))
    assert both(tmp_path / "data" / "test")[0] + both(tmp_path / "data" / "test")[1] == Counter(["test"])


def test_every_kind_is_read_whatever_its_case(tmp_path: Path) -> None:
    names = ("a.JSONL", "b.ndjson", "c.csv", "d.jsonl.zstd", "e.pq", "f.Json.GZ", "g.parquet", "h.txt", "i.CSV.gz")
    for name in names:
        write(tmp_path / name, name)
    write(tmp_path / "val.jsonl", "held out")
    assert both(tmp_path)[0] == Counter(names)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.jsonl", "b")
    write(tmp_path / "data" / "a.jsonl", "a")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data")
    write(tmp_path / "not named" / "c.jsonl", "c")
    (tmp_path / "data" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "up").symlink_to("..")
    train, validation = both(tmp_path / "data")
    assert train + validation == Counter("ab")
    assert "data/up" in said(str(tmp_path / "data"))


def test_a_file_is_read_once_whatever_links_lead_to_it(tmp_path: Path) -> None:
    """A link beside its folder, links from folder to folder, a link to a file: the file counts by its own path."""
    for folder in ("zz", "a", "b"):
        write(tmp_path / "data" / folder / "x.jsonl", folder)
    (tmp_path / "data" / "latest").symlink_to("zz")
    (tmp_path / "data" / "a" / "toB").symlink_to("../b")
    (tmp_path / "data" / "b" / "toA").symlink_to("../a")
    (tmp_path / "data" / "again.jsonl").symlink_to("zz/x.jsonl")
    (tmp_path / "data" / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "data" / "self.jsonl").symlink_to("self.jsonl")
    (tmp_path / "link").symlink_to("data")
    for named in ("data", "link", "data/*", "data/**", "data/**/*.jsonl"):
        selection = select(str(tmp_path / named))
        assert [file.name for file in selection.training] == ["a/x.jsonl", "b/x.jsonl", "zz/x.jsonl"], named
    left_out = select(str(tmp_path / "data")).left_out
    assert {reason: sorted(path.name for path in paths) for reason, paths in left_out.items()} == {
        "links to what is counted already": ["again.jsonl", "latest", "toA", "toB"],
        "leads nowhere": ["gone.jsonl", "self.jsonl"],
    }
    assert "links to what is counted already" in said(str(tmp_path / "data"))


def test_a_link_does_not_make_training_text_of_validation_text(tmp_path: Path) -> None:
    write(tmp_path / "data" / "validation.jsonl", "held out")
    write(tmp_path / "data" / "train" / "a.jsonl", "a")
    (tmp_path / "data" / "train" / "b.jsonl").symlink_to("../validation.jsonl")
    assert both(tmp_path / "data") == (Counter(["a"]), Counter(["held out"]))
    write(tmp_path / "elsewhere" / "c.jsonl", "c")  # which has no path of its own below: the first link decides
    for name in ("train/c.jsonl", "valid-c.jsonl"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere" / "c.jsonl")
    assert both(tmp_path / "data") == (Counter("ac"), Counter(["held out"]))


def test_links_may_lead_to_what_is_hidden_or_has_no_suffix(tmp_path: Path) -> None:
    """As in a cache of the hub: the file's own path is none of text, so the link's counts."""
    write(tmp_path / "data" / "a.jsonl", "a").rename(tmp_path / "data" / "blob")
    write(tmp_path / "data" / ".cache" / "b.jsonl", "b")
    write(tmp_path / "data" / ".all" / "c.jsonl", "c")
    (tmp_path / "data" / "train.jsonl").symlink_to("blob")
    (tmp_path / "data" / "x.jsonl").symlink_to(".cache/b.jsonl")
    (tmp_path / "data" / ".more").symlink_to(".all")
    (tmp_path / "data" / "more").symlink_to(".all")
    write(tmp_path / "data" / "val.jsonl", "held out")
    assert both(tmp_path / "data")[0] == Counter("abc")


def test_links_from_folder_to_folder_take_no_more_time_than_their_number(tmp_path: Path) -> None:
    """Each of thirty folders has two links to the next: there are a thousand million paths to the last."""
    for number in range(30):
        write(tmp_path / "far" / str(number) / "x.jsonl", str(number))
        for name in ("left", "right"):
            (tmp_path / "far" / str(number) / name).symlink_to(f"../{number + 1}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "first").symlink_to("../far/0")
    selection = select(str(tmp_path / "data"))
    assert len(selection.training) == 30


def test_what_cannot_be_looked_at_is_told_with_its_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", "a")
    for flag, paths in (("--data", ("x" * 300, None)), ("--eval-data", (str(tmp_path), "x" * 300))):
        with pytest.raises(InputError, match=f"{flag} x*: cannot be read .File name too long") as error:
            open_source(paths[0], "train", paths[1])
        assert "\n" not in str(error.value)

    def refuse(path: object, *_: object, **__: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(InputError, match=r"--data .*a\.jsonl: cannot be read \(Permission denied\)"):
        select(str(tmp_path / "a.jsonl"))


def test_a_compressed_twin_of_the_evaluated_text_is_not_trained_on(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "b.jsonl.gz"):
        write(tmp_path / "twins" / name, name[0])
    (tmp_path / "link.jsonl.gz").symlink_to("twins/b.jsonl.gz")
    for twin in ("twins/b.jsonl.gz", "twins/b.jsonl", "link.jsonl.gz"):
        other = str(tmp_path / twin)
        assert texts_of(open_source(str(tmp_path / "twins"), "train", other)) == Counter("a")
        assert texts_of(open_source(str(tmp_path / "twins"), "validation", other)) == Counter("b")
        assert "training 1 .jsonl" in said(str(tmp_path / "twins"), other)
    with pytest.raises(InputError, match=r"both hold .*b\.jsonl\.gz; give it by one of them"):
        open_source([str(tmp_path / "twins"), str(tmp_path / "twins" / "b.jsonl.gz")], "train")


def test_a_link_to_a_compressed_copy_is_no_second_text(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl.gz").symlink_to(write(tmp_path / "a.jsonl.gz", "a"))
    train, validation = both(tmp_path)
    assert train + validation == Counter("a")


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert re.search(r"left out \S+/b\.jsonl: leads nowhere", said(str(tmp_path)))


@pytest.mark.parametrize(
    ("encoding", "text"), [("utf-16", "text\n"), ("utf-16-le", "text\n"), ("utf-16-be", "text\n"), ("latin-1", "été\n")]
)
def test_plain_text_in_another_encoding_is_refused(encoding: str, text: str, tmp_path: Path) -> None:
    """UTF-16 without a byte order mark is valid UTF-8, full of NUL characters, where the text is English."""
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=r"is UTF-16|line \d (is not UTF-8|holds NUL characters)"):
        list(open_source(str(tmp_path), "train").read(0, 0))


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_all_files_in_another_encoding_are_told_at_once(suffix: str, tmp_path: Path) -> None:
    """Whichever is read first; those that are sound are not named, and each way to convert is told once."""
    for n in range(12):
        write(tmp_path / f"{n:02}.{suffix}", "a summer", "another")
    for n in (1, 3, 5, 6, 8):
        path = tmp_path / f"{n:02}.{suffix}"
        path.write_bytes(path.read_bytes().replace(b"summer", "été".encode("latin-1")))
    for n in (2, 9):
        path = tmp_path / f"{n:02}.{suffix}"
        path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(InputError) as error:
        texts_of(open_source(str(tmp_path), "train"))
    told = str(error.value)
    named = [n for n in range(12) if f"/{n:02}.{suffix}" in told]
    assert named == [1, 2, 3, 5, 6, 9], told
    assert "and 1 more" in told
    assert told.count("iconv -f ISO-8859-1 -t UTF-8") == told.count("iconv -f UTF-16 -t UTF-8") == 1
    assert told.endswith("repair them")


def test_files_without_the_column_of_the_text_are_told_at_once(tmp_path: Path) -> None:
    for n in range(5):
        (tmp_path / f"{n}.csv").write_text(f"column{n}\na\n")
    with pytest.raises(InputError, match=r"0\.csv has .*'column0'.*'column2'.*; 2 more cannot be read either") as error:
        texts_of(open_source(str(tmp_path), "train"))
    assert "column3" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_paths_with_other_names_of_the_text_are_told_what_to_do(name: str, tmp_path: Path) -> None:
    """One key is for all paths, so the text of one of them has to be renamed."""
    import pyarrow.parquet

    sound = write(tmp_path / "b" / name, "a")
    other = tmp_path / "a" / name
    other.parent.mkdir()
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), other)
    else:
        other.write_text(sound.read_text().replace("text", "body"))
    message = f"{other} .*'body'; name one with --text-key, which counts for all files, or rename it here"
    if name == "a.jsonl":
        message += re.escape(""", as with jq -c '{"text": .KEY}'""")
    with pytest.raises(InputError, match=message):
        texts_of(open_source([str(other), str(sound)], "train"))


def test_hidden_files_and_second_copies_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "a.jsonl.gz", "a")
    write(tmp_path / "b.jsonl.gz", "b")
    (tmp_path / "._a.jsonl").write_bytes(b"\0\1\2")
    write(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl", "a")
    (tmp_path / "README.md").write_text("about")
    train, validation = both(tmp_path)
    assert train + validation == Counter("ab")
    line = said(str(tmp_path))
    for part in (
        "training 1 .jsonl, 1 .jsonl.gz",
        "1 document in 50",
        "README.md: of another kind",
        "hidden",
        "the same text as a.js",
    ):
        assert part in line, line


def test_nothing_left_for_training_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "val.jsonl", "a")
    write(tmp_path / "test.jsonl", "b")
    with pytest.raises(InputError, match=r"no training text; .*val\.jsonl, .*test\.jsonl are for validation or test"):
        open_source(str(tmp_path), "train")
    assert both(tmp_path / "val.jsonl")[0] + both(tmp_path / "val.jsonl")[1] == Counter("a")  # named by itself


def test_a_pattern_is_sorted_like_a_folder(tmp_path: Path) -> None:
    for name in ("x/train.jsonl", "x/dev.jsonl", "y/more.jsonl", "y/more.md"):
        write(tmp_path / name, name)
    expected = Counter(["x/train.jsonl", "y/more.jsonl"]), Counter(["x/dev.jsonl"])
    assert both(tmp_path / "*" / "*") == both(tmp_path / "**") == both(tmp_path / "*") == expected
    with pytest.raises(InputError, match=r"but y/more\.md"):
        open_source(str(tmp_path / "?" / "*.md"), "train")


def test_eval_data_leaves_named_validation_text_out(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "val.jsonl"):
        write(tmp_path / name, name)
    other = str(tmp_path / "b.jsonl")
    assert texts_of(open_source(str(tmp_path), "train", other)) == Counter(["a.jsonl"])
    assert "val.jsonl: validation text by their names" in said(str(tmp_path), other)


# -- an independent reading, written before the rule it checks ---------------------------------------------------------

WORDS = ("train", "val", "valid", "validation", "dev", "eval", "test", "part", "validated", "contest", "x")
SUFFIXES = (".jsonl", ".JSONL", ".json.gz", ".txt", ".csv", ".ndjson", ".parquet", ".md", ".jsonl.zstd")


def expected_role(parts: tuple[str, ...]) -> str:
    for part in parts[::-1]:
        words = set(re.split(r"[^a-z]+", part.lower()))
        roles = [r for r, named in ((TRAINING, {"train", "training"}), (TEST, {"test"})) if words & named]
        roles += [VALIDATION] if words & {"validation", "valid", "val", "dev", "eval"} else []
        if roles:
            return roles[0] if len(roles) == 1 else "refused"
    return TRAINING


@settings(max_examples=int(os.environ.get("FUZZ", "40")), deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_folders_are_read_as_written_or_refused(rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        expected: dict[str, Counter[str]] = {TRAINING: Counter(), VALIDATION: Counter(), TEST: Counter()}
        refused = False
        for number in range(rng.randint(1, 8)):
            depth = rng.randint(0, 2)
            parts = [rng.choice("-_. ").join(rng.choices(WORDS, k=rng.randint(1, 2))) for _ in range(depth)]
            if rng.random() < 0.1:
                parts.append(".hidden")
            name = rng.choice(WORDS) + rng.choice(("", "-00", "_7", "2")) + f"-{number}" + rng.choice(SUFFIXES)
            path = write(folder.joinpath(*parts, name), f"text {number}")
            if not name.endswith(".md") and ".hidden" not in parts:
                role = expected_role((*parts, name))
                refused |= role == "refused"
                if role != "refused":
                    expected[role][f"text {number}"] += 1
            assert path.is_file()
        if refused or not expected[TRAINING]:
            with pytest.raises(InputError):
                select(str(folder))
            return
        train, validation = both(folder)
        if expected[VALIDATION]:
            assert (train, validation) == (expected[TRAINING], expected[VALIDATION])
        else:
            assert train + validation == expected[TRAINING]


def test_another_key_names_the_text_of_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow.parquet

    texts = [f"text {n}" for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text, "text": "no"}) + "\n" for text in texts))
    (tmp_path / "b.csv").write_text("text,body\n" + "".join(f"no,{text}\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["no"] * 3, "body": texts}), tmp_path / "c.parquet")
    eval_file = tmp_path / "a.jsonl"
    training = open_source(str(tmp_path), "train", str(eval_file), text_key="body")
    assert [[text for _, text in training.read(shard, 0)] for shard in range(2)] == [texts, texts]
    validation = open_source(str(tmp_path), "validation", str(eval_file), text_key="body")
    assert [text for _, text in validation.read(0, 0)] == texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_key_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, name: str) -> None:
    import pyarrow.parquet

    file = tmp_path / name
    if name == "a.jsonl":
        file.write_text('{"title": "a", "body": "b"}\n')
    elif name == "a.csv":
        file.write_text("title,body\na,b\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"title": ["a"], "body": ["b"]}), file)
    source = open_source(str(file), "train", text_key="nothing")
    with pytest.raises(InputError, match=r"\"nothing\".*its (keys|columns): 'title', 'body'; name one with --text-key"):
        list(source.read(0, 0))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_keys_are_named_within_bounds(tmp_path: Path, name: str) -> None:
    """The file may be of another kind than its name says, and its keys whole texts."""
    import pyarrow.parquet

    file = tmp_path / name
    keys = ["long " * 1000, "line\nend", *(f"key {n}" for n in range(500))]
    if name == "a.jsonl":
        file.write_text(json.dumps(dict.fromkeys(keys, "a")))
    elif name == "a.csv":
        file.write_text(",".join(f'"{key}"' for key in keys) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table({key: ["a"] for key in keys}), file)
    with pytest.raises(InputError, match=r"'long long .*…', 'line\\nend', .*'key 17', and 482 more; name one") as error:
        list(open_source(str(file), "train").read(0, 0))
    assert len(str(error.value)) < 700


def test_a_key_whose_value_is_no_string_is_not_recommended(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ["a", "b"], "title": "t"}\n')
    with pytest.raises(InputError, match=r"line 1 has no string .*its keys: 'text', 'title'") as error:
        list(open_source(str(tmp_path), "train").read(0, 0))
    assert "--text-key" not in str(error.value)


def test_plain_text_has_no_key(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"--text-key body: .* is plain text, which has no keys"):
        open_source(str(tmp_path), "train", text_key="body")


def test_several_paths_are_one_list_of_shards_each_by_its_own_rule(tmp_path: Path) -> None:
    """One folder has a validation file, the other has none: of that, one document in fifty is held out."""
    trained = [f"a {n}" for n in range(120)]
    write(tmp_path / "a" / "train.jsonl", *trained)
    write(tmp_path / "a" / "validation.jsonl", "of a")
    others = [f"b {n}" for n in range(300)]
    write(tmp_path / "b" / "0.jsonl", *others[:100])
    write(tmp_path / "b" / "1.parquet", *others[100:])
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    train, validation = (open_source(paths, split) for split in ("train", "validation"))
    alone = [open_source(path, split) for split in ("train", "validation") for path in paths]
    read = [[list(source.read(i, 0)) for i in range(len(source.shards))] for source in (train, validation)]
    read_alone = [[list(source.read(i, 0)) for i in range(len(source.shards))] for source in alone]
    assert read[0] == read_alone[0] + read_alone[1]
    assert read[1] == read_alone[2] + read_alone[3]
    assert [text for _, text in read[0][0]] == trained
    assert sum(map(len, read[0][1:])) + sum(map(len, read[1][1:])) == len(others)
    assert train.fingerprint not in (alone[0].fingerprint, alone[1].fingerprint)
    assert [line.partition(":")[0] for line in said(paths).splitlines()] == [f"--data {path}" for path in paths]


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_validation_takes_a_document_of_each_path_in_turn(sizes: list[list[int]]) -> None:
    """Of paths with so many files of so many documents: the n-th document of each comes before the next of any."""
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / str(p) for p in range(len(sizes))]
        for path, files in zip(paths, sizes, strict=True):
            write(path / "train.jsonl", "text")
            for f, count in enumerate(files):
                write(path / f"val-{f}.jsonl", *[f"{path.name} {f} {n}" for n in range(count)])
        texts = [text for _, _, text in in_turn(open_source([str(path) for path in paths], "validation"))]
    whole = [[f"{p} {f} {n}" for f, count in enumerate(files) for n in range(count)] for p, files in enumerate(sizes)]
    longest = max(map(len, whole))
    assert texts == [text[n] for n in range(longest) for text in whole if n < len(text)]


def test_a_bounded_evaluation_reads_of_all_paths(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / name / "train.jsonl", "text").parent) for name in "ab"]
    for path in paths:
        write(Path(path) / "validation.jsonl", *[f"{Path(path).name}"] * 100)
    source = open_source(paths, "validation")
    rows = validation_rows(source, TokenRows(load_tokenizer("sample"), "pad", 8), tokens=30)
    assert len({row.input_ids.tobytes() for row in rows}) == 2


def test_a_file_of_two_paths_is_refused(tmp_path: Path) -> None:
    """It may be validation by one of them, and training text by the other."""
    write(tmp_path / "a" / "train.jsonl", "a")
    file = write(tmp_path / "a" / "validation.jsonl", "of a")
    with pytest.raises(InputError, match=r"both hold .*validation\.jsonl; give it by one of them"):
        open_source([str(tmp_path / "a"), str(file)], "train")


def test_a_file_beside_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not as one at the root of all; one elsewhere with its folder."""
    monkeypatch.chdir(tmp_path)
    write(Path("train.jsonl"), "one", "two")
    for path, told in (("other.jsonl", ": other.jsonl"), ("deep/er/other.jsonl", ": er/other.jsonl")):
        write(Path(path), "three")
        assert said("train.jsonl", path).endswith(told)
