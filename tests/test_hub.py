"""Text of the hub, C4 above all: the real command line and the real hub libraries, against a loopback hub.

The libraries read HF_ENDPOINT when they are imported: warm.py has processes that know one hub's. A hub that comes and
goes has tests whose processes begin from nothing, as a user's do.
"""

import gzip
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from fakehub import C4, FakeHub, Fault
from runs import COMMAND_LINE, Done, lines
from warm import WarmHub, without_this_machine

pytestmark = pytest.mark.network

Texts = dict[str, list[list[str]]]
"""Documents by split and shard."""


def _write_shard(root: Path, split: str, number: int, texts: list[str]) -> Path:
    path = root / C4 / "en" / f"c4-{split}.{number:05}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", compresslevel=1) as file:
        for text in texts:
            row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://example.org/"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def texts() -> Texts:
    """Documents of about a hundred words, none twice."""
    rng = random.Random(0)
    words = Path(__file__).read_text().split()

    def shard(title: str, count: int) -> list[str]:
        return [f"{title} {n}: {' '.join(rng.choices(words, k=100))}" for n in range(count)]

    return {"train": [shard(f"train {i}", 300) for i in range(3)], "validation": [shard("validation", 200)]}


def _write_texts(root: Path, texts: Texts) -> Path:
    for split, shards in texts.items():
        for number, shard in enumerate(shards):
            _write_shard(root, split, number, shard)
    return root


@pytest.fixture
def hub(warm_hub: WarmHub, tmp_path: Path, texts: Texts) -> WarmHub:
    warm_hub.hold(_write_texts(tmp_path / "hub", texts))
    return warm_hub


TRAIN = "--model llama_1m --data c4 --steps 4 --total-batch-size 4 --max-length 64 --eval-tokens 2000 --dtype float32"
SOON = {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}
"""Settings of the hub's libraries with which they wait two seconds for an answer."""


MODULE = ("-m", "galore_pretrain")
LESS_PATIENT = f"""
from galore_pretrain.text import hub

real = (hub._ANSWER, hub._FIRST_WAIT, hub._FIRST_PATIENCE, hub.LONGEST)
assert real == (5.0, 1.0, 8.0, 60.0)
hub._ANSWER, hub._FIRST_WAIT, hub._FIRST_PATIENCE, hub.LONGEST = 1.0, 0.2, 1.6, 0.2
{COMMAND_LINE}
"""
"""The command line, which waits a fifth of the time until the hub answers for the first time."""


def _python(tmp_path: Path, *arguments: str, **environment: str) -> Done:
    """What a process comes to that begins from nothing."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=without_this_machine(tmp_path / "hf") | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def _train(tmp_path: Path, *python: str, **environment: str) -> Done:
    return _python(tmp_path, *(python or MODULE), *TRAIN.split(), "--output", "run", **environment)


def _result(tmp_path: Path, hub: WarmHub, script: str, **environment: str) -> tuple[Any, str]:
    """What ``script`` prints, as JSON, and what it says on stderr."""
    done = hub.python(tmp_path, script, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_trains_on_c4_with_the_tokenizer_of_t5(hub: WarmHub, tmp_path: Path) -> None:
    done = _train(tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["data"]["value"], config["tokenizer"]["value"]) == ("c4", "t5")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    evaluation = {"eval_loss", "eval_perplexity", "eval_reference_perplexity", "eval_tokens"}
    for line in lines:
        assert {"loss", "lr", "tokens_seen", "tokens_per_second", "peak_memory_bytes"} <= line.keys()
    assert evaluation <= lines[-1].keys()
    memory = {"peak_memory_bytes", "process_peak_bytes", "planned_peak_bytes"}
    assert {"steps", "tokens_seen", "wall_seconds"} | evaluation | memory <= summary.keys()
    assert summary["steps"] == 4
    assert 0 < summary["tokens_seen"] == lines[-1]["tokens_seen"] <= 4 * 4 * 64
    assert summary["eval_tokens"] >= 2000
    assert lines[-1]["loss"] < lines[0]["loss"]


READ_EVERYTHING = """
import json
from galore_pretrain.text.sources import HubDataset

train, validation = (HubDataset("allenai/c4", "en", split) for split in ("train", "validation"))
whole = [[list(source.read(i, 0)) for i in range(len(source.shards))] for source in (train, validation)]
tails = {k: list(train.read(1, k)) for k in (1, 150, 299, 300)}
print(json.dumps([*whole, tails]))
"""


def test_reads_every_document_of_a_split_from_any_position(hub: WarmHub, tmp_path: Path, texts: Texts) -> None:
    (train, validation, tails), _ = _result(tmp_path, hub, READ_EVERYTHING)
    for read, shards in ((train, texts["train"]), (validation, texts["validation"])):
        assert read == [[[n, text] for n, text in enumerate(shard, 1)] for shard in shards]
    assert tails == {k: train[1][int(k) :] for k in tails}
    assert {text for shard in train for _, text in shard}.isdisjoint(text for _, text in validation[0])


# After which documents to resume: within a block, at its end, where the epoch ends, and in the next epoch.
RESUME = """
import json
from itertools import islice
from galore_pretrain.text import batches
from galore_pretrain.text.sources import HubDataset

batches.BLOCK = 128
source = HubDataset("allenai/c4", "en", "train")


def documents(position, count):
    found = islice(batches.Documents(source, 7, position), count)
    return [[text, after.state_dict()] for _, text, after in found]


whole = documents(batches.Position(), 1200)
stops = (100, 128, 500, 900, 1100)
print(json.dumps([whole, {k: documents(batches.Position.of(whole[k - 1][1]), 1200 - k) for k in stops}]))
"""


def test_resumed_documents_are_the_rest_of_the_uninterrupted_ones(hub: WarmHub, tmp_path: Path, texts: Texts) -> None:
    (whole, resumed), _ = _result(tmp_path, hub, RESUME)
    position = whole[499][1]
    assert min(position["shard"], position["document"], position["taken"]) > 0, "not in the middle of everything"
    assert resumed == {k: whole[int(k) :] for k in resumed}
    epoch, in_order = [text for text, _ in whole[:900]], [text for shard in texts["train"] for text in shard]
    assert epoch != in_order
    assert sorted(epoch) == sorted(in_order)


# The hub library asks five times more, for 23 s, before the loop under test has its turn, which then waits up to 60 s.
SHORT_WAITS = """
import datasets
from huggingface_hub.utils import http_backoff
from galore_pretrain.text import sources

assert (http_backoff.__kwdefaults__["max_retries"], sources.LONGEST) == (5, 60.0), "other names, and the real waits"
http_backoff.__kwdefaults__["max_retries"], sources.LONGEST = 0, 0.1
assert datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL == 60
datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0.1
"""


READ_LARGE = f"""
import json, logging, zlib
{SHORT_WAITS}
from galore_pretrain.text.sources import HubDataset

logging.basicConfig()
documents = HubDataset("allenai/c4", "en", "train").read(0, 0)
print(json.dumps([[position, zlib.crc32(text.encode())] for position, text in documents]))
"""


@dataclass(frozen=True)
class Large:
    """A hub whose one shard of ``size`` bytes has these documents: each one's number and checksum."""

    root: Path
    size: int
    documents: list[list[int]]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    """``datasets`` parses 10 MB at a time: of 24 MB, some has been read before a fault at three quarters, and some
    comes after."""
    root, rng = tmp_path_factory.mktemp("large"), random.Random(0)
    texts = [rng.randbytes(10_000).hex() for _ in range(1200)]
    size = _write_shard(root, "train", 0, texts).stat().st_size
    _write_shard(root, "validation", 0, ["validation"])
    return Large(root, size, [[n, zlib.crc32(text.encode())] for n, text in enumerate(texts, 1)])


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(times=2), id="drops"),
        pytest.param(Fault(times=1, status=503), id="unavailable"),
        pytest.param(Fault(times=2, status=429), id="too many requests"),
        pytest.param(Fault(times=1, hang=8.0), id="hangs"),
        pytest.param(Fault(times=7, status=500), id="a long outage"),
    ],
)
def test_goes_on_at_the_same_document_when_the_hub_fails(
    fault: Fault, large: Large, warm_hub: WarmHub, tmp_path: Path
) -> None:
    hub = warm_hub
    hub.hold(large.root)
    hub.fault = replace(fault, at=large.size * 3 // 4)
    read, stderr = _result(tmp_path, hub, READ_LARGE, **SOON)
    assert hub.fault.times == 0
    assert read == large.documents
    reconnected = [int(n) for n in re.findall(r"reconnecting at document (\d+)", stderr)]
    assert len(reconnected) == fault.times
    assert all(0 < n < len(large.documents) for n in reconnected)


IMPATIENT = f"""
import os, signal, sys
{SHORT_WAITS}
from galore_pretrain import cli
from galore_pretrain.text import batches
from galore_pretrain.train import trainer

batches.BLOCK, batches._TOKENIZE, sources.PATIENCE = 24, 32, 2
advance = trainer.Trainer._advance
def deadly(self, batches):
    if self.state.step == int(os.environ.get("KILL_AT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    advance(self, batches)
trainer.Trainer._advance = deadly
sys.argv = ["galore-pretrain", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_a_run_on_c4_goes_on_bit_for_bit(layout: str, hub: WarmHub, tmp_path: Path, texts: Texts) -> None:
    """First the second of three shards cannot be had: what was trained on the first is saved, with a clear error. When
    the hub is back, with a newer commit too, the run goes on, is killed, and goes on, as if nothing had happened."""
    flags = f"--model llama_1m --data c4 --steps 30 --total-batch-size 4 --max-length 64 --eval-tokens 500 --rank 4 \
        --layout {layout} --layerwise --batch-size 2 --dtype float32 --save-every 27 --eval-every 13 --output"
    for number, shard in enumerate(texts["train"]):
        hundred = shard[:100] if layout == "pad" else [text[:80] for text in shard[:100]]
        _write_shard(tmp_path / "hub", "train", number, hundred)
    order = np.random.default_rng([0, 0]).permutation(3).tolist()
    hub.fault = Fault(times=10**6, status=503, suffix=f"c4-train.{order[1]:05}.json.gz")

    def train(output: str, **environment: str) -> Done:
        return hub.python(tmp_path, IMPATIENT, *flags.split(), output, **environment)

    cut = train("run")
    assert cut.returncode == 2, cut.stderr
    assert re.search(r"Error: --data: allenai/c4 train shard \d cannot be read from the hub \(.*503", cut.stderr)
    trained = len(lines(tmp_path / "run"))
    assert 10 < trained < 27, cut.stderr
    assert (tmp_path / "run" / "checkpoints" / f"step_{trained:08}").is_dir()
    hub.fault = Fault(times=0)
    undisturbed = train("undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    hub.commit = "0" * 40  # somebody has edited the data set's card
    assert train("run", KILL_AT="29").returncode == -signal.SIGKILL
    again = train("run")
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stderr
    assert lines(tmp_path / "run") == lines(tmp_path / "undisturbed")
    ours, theirs = (load_file(tmp_path / o / "model" / "model.safetensors") for o in ("run", "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


@pytest.mark.slow
def test_a_hub_that_is_gone_for_a_while(large: Large, tmp_path: Path) -> None:
    """It drops the connection in the middle of a shard, and for three seconds nothing listens at its address."""
    found: list[Done] = []
    with FakeHub(large.root) as hub:
        hub.fault = Fault(times=1, at=large.size * 3 // 4)
        arguments = ("-c", READ_LARGE)
        environment = {"HF_ENDPOINT": hub.url, **SOON}
        reader = threading.Thread(target=lambda: found.append(_python(tmp_path, *arguments, **environment)))
        reader.start()
        while hub.fault.times and reader.is_alive():
            time.sleep(0.01)
    time.sleep(3)
    with FakeHub(large.root, hub.server_port):
        reader.join()
    (done,) = found
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == large.documents
    assert "refused" in done.stderr


def test_bad_documents_of_the_hub_are_named_or_left_out(hub: WarmHub, tmp_path: Path) -> None:
    """One without a text, and the rest of a shard that breaks off."""
    shard = tmp_path / "hub" / C4 / "en" / "c4-train.00001.json.gz"
    rows = gzip.decompress(shard.read_bytes()).splitlines()
    rows[100] = b'{"text": null, "timestamp": "", "url": ""}'
    shard.write_bytes(gzip.compress(b"\n".join(rows)))
    (tmp_path / "hub" / C4 / "en" / "c4-train.00002.json.gz").write_bytes(b"<html>not found</html>")
    script = f"""
import json
{SHORT_WAITS}
from galore_pretrain.errors import InputError
from galore_pretrain.text.sources import BadData, HubDataset

def read(shard, policy):
    try:
        return len(list(HubDataset("allenai/c4", "en", "train", BadData(policy)).read(shard, 0)))
    except InputError as error:
        return str(error)

print(json.dumps([read(shard, policy) for policy in ("raise", "skip") for shard in (1, 2)]))
"""
    (null, broken, kept, rest), stderr = _result(tmp_path, hub, script)
    assert "train shard 1 document 101 has no string" in null
    assert "train shard 2 cannot be read after document 0 (" in broken
    assert (kept, rest) == (299, 0), stderr


def test_an_outage_that_ends_in_a_cut_stream_is_no_bad_document(hub: WarmHub, tmp_path: Path) -> None:
    """Failures of the connection, then a page of HTML under the shard's name, then the shard."""
    script = f"""
import gzip, json
{SHORT_WAITS}
from galore_pretrain.text.sources import HubDataset

source, faults = HubDataset("allenai/c4", "en", "train"), [ConnectionError("reset")] * 8
faults += [gzip.BadGzipFile("Not a gzipped file"), EOFError("cut")] + [ConnectionError("reset")] * 8 + [EOFError("cut")]

class Failing:
    def __init__(self, stream): self.stream = stream
    def shard(self, **which): return Failing(self.stream.shard(**which))
    def skip(self, count): return Failing(self.stream.skip(count))
    def __iter__(self):
        for i, row in enumerate(self.stream):
            if i == 3 and faults:
                raise faults.pop(0)
            yield row

source._stream = Failing(source._stream)
print(json.dumps([text for _, text in source.read(1, 0)]))
"""
    read, _ = _result(tmp_path, hub, script)
    assert len(read) == 300
    assert len(set(read)) == 300


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("refused", id="nothing listens"),
        pytest.param("silent", id="accepts and never answers"),
        pytest.param("failing", id="answers 503"),
        pytest.param("offline", id="HF_HUB_OFFLINE"),
    ],
)
def test_without_a_hub_one_line_says_what_to_do_instead(tmp_path: Path, kind: str) -> None:
    """At once, or in the patience that it has with a hub that may come back, which is shortened here; the bound is what
    ``load_dataset`` needs at least, left to itself."""
    with socket.socket() as listener, FakeHub(tmp_path / "hub") as hub:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen()
        hub.fault = Fault(times=100, status=503, suffix=C4)
        nowhere = f"http://127.0.0.1:{listener.getsockname()[1]}"
        environment = {"HF_ENDPOINT": hub.url if kind == "failing" else nowhere}
        if kind == "offline":
            environment["HF_HUB_OFFLINE"] = "1"
        started = time.monotonic()
        done = _train(tmp_path, "-c", LESS_PATIENT, **environment)
        seconds = time.monotonic() - started
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: ")
    assert "--data sample" in done.stderr
    assert "--data PATH" in done.stderr
    assert seconds < (10 if kind == "refused" else 23)


# -- any text of the hub ----------------------------------------------------------------------------------------------

_BOOKS_CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*.parquet}
- config_name: first
  data_files:
  - {split: train, path: data/train-00000.parquet}
---
"""


@pytest.fixture
def library(hub: WarmHub, texts: Texts) -> WarmHub:
    """A hub with two repositories more: parquet without a validation split, and compressed lines of JSON with one."""
    books = hub.root / "acme" / "books"
    (books / "data").mkdir(parents=True)
    (books / "README.md").write_text(_BOOKS_CARD)
    for number, shard in enumerate(texts["train"]):
        table = pyarrow.table({"id": list(range(len(shard))), "body": shard})
        pyarrow.parquet.write_table(table, books / "data" / f"train-{number:05}.parquet", row_group_size=70)
    notes = hub.root / "acme" / "notes"
    notes.mkdir()
    for split, shards in texts.items():
        for number, shard in enumerate(shards):
            rows = [json.dumps({"content": text, "meta": {"n": n}}) for n, text in enumerate(shard)]
            with pyarrow.CompressedOutputStream(str(notes / f"{split}-{number}.jsonl.zst"), "zstd") as file:
                file.write("\n".join(rows).encode())
    for number, config in enumerate(("de", "en")):
        folder = hub.root / "acme" / "tongues" / config
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts["train"][number]))
    tongues = [f"- config_name: {c}\n  data_files: {c}/train.jsonl" for c in ("de", "en")]
    (hub.root / "acme" / "tongues" / "README.md").write_text("\n".join(["---", "configs:", *tongues, "---"]))
    return hub


READ_LIBRARY = """
import json, sys
from galore_pretrain.text.sources import HubDataset

repository, config, key, holds_out = json.loads(sys.argv[1])
found = []
for split in ("train", "validation"):
    source = HubDataset(repository, config, split, text_key=key, holds_out=holds_out)
    whole = [list(source.read(i, 0)) for i in range(len(source.shards))]
    tails = [list(source.read(0, k)) for k in (1, 69, 70, 150)]
    found.append([whole, tails, source.title])
print(json.dumps(found))
"""


def _library(tmp_path: Path, hub: WarmHub, *arguments: Any) -> Any:
    done = hub.python(tmp_path, READ_LIBRARY, json.dumps(arguments))
    assert done.returncode == 0, done.stderr
    splits = json.loads(done.stdout)
    for whole, tails, _ in splits:
        for start, tail in zip((1, 69, 70, 150), tails, strict=True):
            assert tail == [[n, text] for n, text in whole[0] if n > start]
    return splits


def test_where_the_hub_has_no_validation_one_document_in_fifty_is(
    library: WarmHub, tmp_path: Path, texts: Texts
) -> None:
    (train, _, trained), (validation, _, evaluated) = _library(tmp_path, library, "acme/books", None, "body", True)
    for trained_on, held_out, shard in zip(train, validation, texts["train"], strict=True):
        placed = [[n, text] for n, text in enumerate(shard, 1)]
        assert held_out == [[n, text] for n, text in placed if zlib.crc32(text.encode()) % 50 == 0]
        assert trained_on == [document for document in placed if document not in held_out]
    assert sum(map(len, validation)) > 5
    assert (trained, evaluated) == ("split train but for 1 document in 50", "1 document in 50 of split train")
    (train, _, _), _ = _library(tmp_path, library, "acme/books", "first", "body", False)
    assert train == [[[n, text] for n, text in enumerate(texts["train"][0], 1)]]


def test_the_hubs_own_validation_is_used_where_there_is_one(library: WarmHub, tmp_path: Path, texts: Texts) -> None:
    splits = _library(tmp_path, library, "acme/notes", None, "content", True)
    for (whole, _, title), split in zip(splits, ("train", "validation"), strict=True):
        assert whole == [[[n, text] for n, text in enumerate(shard, 1)] for shard in texts[split]]
        assert title == f"split {split}"


def test_what_the_hub_has_not_is_refused_with_what_it_has(library: WarmHub, tmp_path: Path) -> None:
    script = """
import json, sys
from galore_pretrain.errors import InputError
from galore_pretrain.text.hub import check_hub
from galore_pretrain.text.sources import HubDataset, open_source

def refused(act, *arguments, **options):
    try:
        act(*arguments, **options)
    except InputError as error:
        return str(error)

print(json.dumps([
    refused(check_hub, "hub:acme/nothing", "sample"),
    refused(check_hub, "hub:acme", "sample"),
    refused(open_source, "hub:acme/books:second", "train", text_key="body"),
    refused(open_source, "hub:acme/tongues", "train"),
    refused(open_source, "hub:acme/tongues:enn", "train"),
    refused(open_source, "hub:acme/books", "train"),
    refused(open_source, "c4", "train", text_key="body"),
    refused(open_source, "sample", "train", text_key="body"),
]))
"""
    (repository, name, second, several, enn, key, c4, sample), _ = _result(tmp_path, library, script)
    assert "--data hub:acme/nothing: the hub has no data set acme/nothing" in repository
    assert "--data hub:acme: no name of a data set; write hub:ORG/NAME" in name
    assert "acme/books has no config second; write hub:acme/books:CONFIG with one of" in second
    assert re.search("(default, first|first, default)$", second)
    assert "acme/tongues has several configs; write hub:acme/tongues:CONFIG with one of de, en" in several
    assert "acme/tongues has no config enn; write hub:acme/tongues:CONFIG with one of en, de" in enn
    assert "--text-key text: acme/books has no such column; choose one of id, body" in key
    assert "--text-key body: allenai/c4:en has no such column; choose one of text, timestamp, url" in c4
    assert "--text-key body: --data sample is plain text, which has no keys" in sample


@pytest.mark.slow
def test_a_run_on_any_text_of_the_hub_goes_on_bit_for_bit(library: WarmHub, tmp_path: Path) -> None:
    """It is killed, and resumed where its commit is not the newest any more; plan and eval take the same flags."""
    text = "--data hub:acme/books --text-key body --tokenizer sample"
    size = "--max-length 64 --eval-tokens 500"
    flags = f"--model llama_1m {text} {size} --steps 12 --total-batch-size 4 --dtype float32 --save-every 5 --output"

    def train(output: str, **environment: str) -> Done:
        return library.python(tmp_path, IMPATIENT, *flags.split(), output, **environment)

    whole = train("whole")
    assert whole.returncode == 0, whole.stderr
    assert (
        "--data hub:acme/books: training split train but for 1 document in 50, 3 shards; "
        "validation 1 document in 50 of split train" in whole.stderr
    )
    assert train("run", KILL_AT="8").returncode == -signal.SIGKILL
    library.commit = "0" * 40
    again = train("run")
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stderr
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    planned = library.python(tmp_path, COMMAND_LINE, "plan", *flags.split(), "run", "--json")
    assert planned.returncode == 0, planned.stderr
    evaluated = library.python(tmp_path, COMMAND_LINE, "eval", "run", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["eval_loss"] == lines(tmp_path / "run")[-1]["eval_loss"]
    other = ("--data", "hub:acme/notes", "--text-key", "content")
    evaluated = library.python(tmp_path, COMMAND_LINE, "eval", "run", *other)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "hub:acme/notes (validation)" in evaluated.stdout


# -- opening ----------------------------------------------------------------------------------------------------------

OPEN = f"""
import json, logging
{SHORT_WAITS}
from galore_pretrain.text.sources import HubDataset

assert sources._ANSWER > 2.0
sources._ANSWER = 2.0
logging.basicConfig()
source = HubDataset("acme/books", None, "train", text_key="body", holds_out=False)
print(json.dumps([text for _, text in source.read(0, 0)]))
"""


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(times=3, status=429, suffix=""), id="too many requests"),
        pytest.param(Fault(times=5, status=503, suffix=""), id="a long outage"),
        pytest.param(Fault(times=2, status=500, suffix=".parquet"), id="the first file fails"),
        pytest.param(Fault(times=2, suffix=""), id="drops"),
        pytest.param(Fault(times=3, hang=3.0, suffix=""), id="answers too late"),
    ],
)
def test_a_hub_that_fails_while_a_text_is_opened_is_waited_for(
    fault: Fault, library: WarmHub, tmp_path: Path, texts: Texts
) -> None:
    first = library.root / "acme" / "books" / "data" / "train-00000.parquet"
    at = first.stat().st_size - 1 if fault.suffix else 0  # parquet is read from its end
    library.fault = replace(fault, at=at)
    read, stderr = _result(tmp_path, library, OPEN, **SOON)
    assert library.fault.times == 0
    assert read == texts["train"][0]
    assert "opening it again" in stderr


def test_a_first_start_passes_over_a_short_failure(hub: WarmHub, tmp_path: Path) -> None:
    hub.fault = Fault(times=2, status=503, suffix=C4)
    done = hub.python(tmp_path, COMMAND_LINE, *TRAIN.split(), "--output", "run")
    assert done.returncode == 0, done.stderr
    assert hub.fault.times == 0


@pytest.mark.slow
def test_a_run_that_goes_on_waits_for_a_hub_that_is_gone(hub: WarmHub, tmp_path: Path) -> None:
    """Nothing listens when it starts again, where a first start is refused at once, or ends after a while."""
    begun = hub.python(tmp_path, COMMAND_LINE, *TRAIN.split(), "--output", "run")
    assert begun.returncode == 0, begun.stderr
    whole = lines(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    gone = FakeHub(hub.root)
    gone.server_close()
    log, deadline = tmp_path / "again.log", time.monotonic() + 120
    with log.open("w") as stderr:
        again = subprocess.Popen(
            [sys.executable, "-c", LESS_PATIENT, *TRAIN.split(), "--output", "run"],
            env=without_this_machine(tmp_path / "hf") | {"HF_ENDPOINT": gone.url},
            cwd=tmp_path,
            stderr=stderr,
        )
    try:
        while "the hub does not answer" not in log.read_text():
            assert again.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        time.sleep(3)  # longer than a first start would
        assert again.poll() is None, log.read_text()
        with FakeHub(hub.root, gone.server_port):
            assert again.wait(180) == 0, log.read_text()
    finally:
        again.kill()
        again.wait()
    assert lines(tmp_path / "run") == whole
