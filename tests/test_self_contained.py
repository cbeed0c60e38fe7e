"""A run and a checkpoint hold what they are: whatever becomes of the files that their config names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoConfig

from families import HUGGING_FACE, SENTENCEPIECE, UNLIKE, make
from galore_pretrain.cli import cli
from galore_pretrain.config.options import RunConfig, text_seen_from
from galore_pretrain.errors import InputError
from galore_pretrain.rundir import checkpoint
from galore_pretrain.rundir.resume import check_inputs, tokenizer_files
from galore_pretrain.text import hub, sources
from galore_pretrain.text.tokenizer import load_folder, load_tokenizer
from galore_pretrain.train import inputs
from test_checkpoint import seal

MODEL = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
TEXTS = [
    "the quick brown fox jumps over the lazy dog, it's 1984: zürich café aaaa",
    "<|endoftext|> <s> a </s> <sep> [SEP] <|eot_id|>",
    " a  b\n\nc\td 日本 ▁x 🙂",
    "",
]


def invoke(*words: object) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and the files that its command named by relative paths."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "model.json").write_text(json.dumps(MODEL))
    make("Llama-3", _made(folder / "tokenizer"))
    lines = [json.dumps({"text": f"the quick brown fox number {n} jumps over the lazy dog"}) for n in range(400)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    flags = "--model model.json --data text.jsonl --tokenizer tokenizer --optim adamw --lr 0.02 --dtype float32"
    flags += " --steps 12 --save-every 6 --total-batch-size 4 --max-length 32 --eval-tokens 500 --wandb disabled"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        invoke(*flags.split(), "--output", "run")
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, as the working folder."""
    copy = tmp_path / "home"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(copy)
    # What the run wrote down of its working folder is the copy's.
    for folder in (copy / "run" / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        assert state["folder"] == str(trained)
        (folder / "state.json").write_text(json.dumps(state | {"folder": str(copy)}))
        seal(folder)
    return copy


def evaluated(*words: object) -> dict[str, float]:
    numbers: dict[str, float] = json.loads(invoke("eval", *words, "--json"))
    return numbers


def edit_the_model(home: Path) -> None:
    (home / "model.json").write_text(json.dumps(MODEL | {"hidden_act": "gelu", "rms_norm_eps": 0.01}))


def remove_the_model(home: Path) -> None:
    (home / "model.json").unlink()


def replace_the_tokenizer(home: Path) -> None:
    shutil.rmtree(home / "tokenizer")
    make("WordLevel", _made(home / "tokenizer"))


def remove_the_tokenizer(home: Path) -> None:
    shutil.rmtree(home / "tokenizer")


@pytest.mark.parametrize("change", [edit_the_model, remove_the_model, replace_the_tokenizer, remove_the_tokenizer])
def test_a_run_is_what_it_was_trained_as(
    change: Callable[[Path], None], home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = home / "run" / "checkpoints" / "step_00000012"
    before = evaluated("run")
    said = invoke("generate", "run", "the quick", "--tokens", 5, "--temperature", 0)
    change(home)
    assert evaluated("run") == evaluated(newest) == before
    assert invoke("generate", "run", "the quick", "--tokens", 5, "--temperature", 0) == said
    invoke("export", newest, tmp_path / "exported")
    assert AutoConfig.from_pretrained(tmp_path / "exported").hidden_act == "silu"
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (home / "run" / "model" / name).read_bytes()
    assert "another one" not in caplog.text


def test_a_run_is_read_from_any_working_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = evaluated("run")
    monkeypatch.chdir(tmp_path)
    assert evaluated(home / "run") == before
    moved = shutil.move(home / "run", tmp_path / "moved")
    assert evaluated(moved) == before
    assert invoke("generate", moved, "the quick", "--tokens", 3)


def test_another_validation_text_is_told(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluated("run")
    assert "another one" not in caplog.text
    (home / "text.jsonl").write_text((home / "text.jsonl").read_text() + '\n{"text": "one more"}')
    evaluated("run")
    assert "the validation text is another one than the run was evaluated on" in caplog.text
    caplog.clear()
    evaluated("run", "--data", "text.jsonl")
    assert "another one" not in caplog.text


def test_a_text_of_the_hub_is_read_at_the_commit_of_the_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = home / "run" / "checkpoints" / "step_00000012"
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | {"revision": "5" * 40}))
    seal(newest)
    revisions: list[Any] = []

    def opened(data: Any, split: Any, eval_data: Any, bad_data: str, revision: str | None, *more: Any) -> Any:
        revisions.append(revision)
        return sources.open_source(data, split, eval_data, bad_data, None, *more)

    monkeypatch.setattr(inputs, "open_source", opened)
    evaluated(newest)
    evaluated(newest, "--data", "text.jsonl")
    assert revisions == ["5" * 40, None]


def test_every_file_of_a_checkpoint_is_checked(home: Path) -> None:
    newest = home / "run" / "checkpoints" / "step_00000012"
    names = {path.relative_to(newest).as_posix() for path in newest.rglob("*.json")}
    assert {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"} <= names
    for file in (newest / "tokenizer").iterdir():
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        with pytest.raises(checkpoint.DamagedError, match=f"tokenizer/{file.name} is"):
            checkpoint.opened(newest)
        file.unlink()
        with pytest.raises(checkpoint.DamagedError, match=f"tokenizer/{file.name} is absent"):
            checkpoint.opened(newest)
        file.write_bytes(content)
    checkpoint.opened(newest)


def test_an_older_checkpoint_with_another_tokenizer_is_refused(home: Path) -> None:
    """One of format 2 holds no tokenizer, but knows the vocabulary."""
    newest = home / "run" / "checkpoints" / "step_00000012"
    vocabulary = load_tokenizer("tokenizer").vocabulary_fingerprint
    shutil.rmtree(newest / "tokenizer")
    state = json.loads((newest / "state.json").read_text())
    state["inputs"]["tokenizer"] = vocabulary
    (newest / "state.json").write_text(json.dumps(state | {"format": 2}))
    seal(newest)
    evaluated(newest)
    replace_the_tokenizer(home)
    with pytest.raises(InputError, match="trained with another tokenizer than tokenizer is now; restore it"):
        invoke("eval", newest)


@pytest.mark.parametrize("family", [*SENTENCEPIECE, *UNLIKE, *HUGGING_FACE])
def test_the_files_of_a_tokenizer_are_all_of_it(family: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make(family, _made(tmp_path / "own"))))
    for name, content in tokenizer.files().items():
        file = tmp_path / "kept" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    again = load_folder(tmp_path / "kept", tokenizer.name)
    assert type(again) is type(tokenizer)
    assert (again.fingerprint, again.vocab_size, again.eos_id) == (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.eos_id,
    )
    for ours, theirs in zip(again.encode(TEXTS), tokenizer.encode(TEXTS), strict=True):
        assert ours.tolist() == theirs.tolist()
        assert again.decode(ours.tolist()) == tokenizer.decode(ours.tolist())


def test_the_files_of_a_tokenizer_are_made_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on takes those of its checkpoint, as long as they are of the tokenizer that it reads with."""
    saved = checkpoint.opened(home / "run" / "checkpoints" / "step_00000012")
    old = load_tokenizer("tokenizer")
    made = old.files()
    replace_the_tokenizer(home)
    new = load_tokenizer("tokenizer")
    assert tokenizer_files(saved, new) == new.files() != made
    (saved.folder / "tokenizer" / ".DS_Store").write_text("not the checkpoint's own")
    monkeypatch.setattr(old, "files", lambda: pytest.fail("made anew"))
    assert tokenizer_files(saved, old) == made
    (saved.folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="step_00000012: cannot be read"):
        tokenizer_files(saved, old)
    monkeypatch.setattr(old, "files", lambda: made)
    assert tokenizer_files(None, old) == made


def test_a_library_of_another_version_changes_no_model(home: Path) -> None:
    saved = checkpoint.opened(home / "run" / "checkpoints" / "step_00000012")
    config = RunConfig.of(saved.state["config"])
    inputs: dict[str, Any] = saved.state["inputs"]
    model = json.loads(inputs["model"])
    check_inputs(config, saved, inputs | {"model": json.dumps(model | {"transformers_version": "9.9"})})
    with pytest.raises(InputError, match="made with another model than there is now"):
        check_inputs(config, saved, inputs | {"model": json.dumps(model | {"rms_norm_eps": 0.01})})


def test_where_a_text_is_seen_from_another_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert text_seen_from(tmp_path, "a.txt") == str(tmp_path / "a.txt")
    assert text_seen_from(tmp_path, "*.txt") == str(tmp_path / "*.txt")
    for text in ("c4", "sample", "hub:acme/books", "b.txt", str(tmp_path / "a.txt")):
        assert text_seen_from(tmp_path, text) == text


def test_a_library_that_writes_tokenizers_otherwise_changes_none(home: Path) -> None:
    """The checkpoint's own files are asked, where the fingerprint is not the one that was written."""
    newest = home / "run" / "checkpoints" / "step_00000012"
    state = json.loads((newest / "state.json").read_text())
    now = dict(state["inputs"])
    state["inputs"]["tokenizer"] = "as an older library wrote it"
    (newest / "state.json").write_text(json.dumps(state))
    seal(newest)
    saved = checkpoint.opened(newest)
    config = RunConfig.of(saved.state["config"])
    check_inputs(config, saved, now)
    with pytest.raises(InputError, match="made with another tokenizer than there is now"):
        check_inputs(config, saved, now | {"tokenizer": "another"})


def test_a_run_without_an_update_begins_with_the_text_that_was_mended(home: Path) -> None:
    """Its checkpoint was written when it was stopped by its text."""
    newest = home / "run" / "checkpoints" / "step_00000012"
    state = json.loads((newest / "state.json").read_text())
    mended = state["inputs"] | {"training text": "mended", "validation text": "mended"}
    for step in (12, 0):
        (newest / "state.json").write_text(json.dumps(state | {"trainer": state["trainer"] | {"step": step}}))
        seal(newest)
        saved = checkpoint.opened(newest)
        config = RunConfig.of(saved.state["config"])
        if step:
            with pytest.raises(InputError, match="another training text and validation text"):
                check_inputs(config, saved, mended)
        else:
            check_inputs(config, saved, mended)
        with pytest.raises(InputError, match="made with another tokenizer"):
            check_inputs(config, saved, state["inputs"] | {"tokenizer": "another"})


def test_a_finished_run_tells_that_its_model_is_another_now(home: Path) -> None:
    """As it would where it went on; with the model as it was, it does nothing."""
    config = json.loads((home / "run" / "config.json").read_text())["config"]
    flags = [f"--{name}={config[name]['value']}" for name in ("model", "data", "tokenizer", "optim", "lr", "steps")]
    flags += ["--dtype=float32", "--save-every=6", "--total-batch-size=4", "--max-length=32", "--eval-tokens=500"]
    flags += ["--wandb=disabled", "--output=run"]
    before = (home / "run" / "summary.json").read_bytes()
    invoke("train", *flags)
    edit_the_model(home)
    with pytest.raises(
        InputError, match="step_00000012 was made with another model than there is now; restore"
    ) as told:
        invoke("train", *flags)
    assert str(told.value).endswith("(of the model, hidden_act, rms_norm_eps differ)")
    invoke("train", *flags, "--resume-with-changes")
    assert (home / "run" / "summary.json").read_bytes() == before


def test_an_evaluation_whose_text_is_gone_names_the_way_out(home: Path) -> None:
    shutil.move(home / "text.jsonl", home / "kept.jsonl")
    with pytest.raises(InputError, match=r"no such file.* this is the text of the run: --eval-data PATH names another"):
        invoke("eval", "run")
    assert evaluated("run", "--eval-data", "kept.jsonl")["eval_tokens"] > 500
    with pytest.raises(InputError, match="--eval-data gone: no such file") as error:
        invoke("eval", "run", "--eval-data", "gone")
    assert "of the run" not in str(error.value)


def test_an_evaluation_by_another_tokenizer_says_so(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a run and of its export; by its own tokenizer, named or not, it says nothing."""
    invoke("export", "run", "exported")
    make("WordLevel", _made(home / "other"))
    for trained in ("run", "exported"):
        text = ("--data", "text.jsonl", "--max-length", "32") if trained == "exported" else ()
        invoke("eval", trained, *text, "--eval-tokens", "500")
        invoke("eval", trained, *text, "--eval-tokens", "500", "--tokenizer", "tokenizer")
        assert "another one than the model was trained with" not in caplog.text
        invoke("eval", trained, *text, "--eval-tokens", "500", "--tokenizer", "other")
        assert "--tokenizer other is another one than the model was trained with" in caplog.text
        caplog.clear()


def test_an_evaluation_from_another_folder_asks_no_hub_for_the_tokenizer(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the checkpoint, whatever the path in the config would be from here."""
    before = evaluated("run")
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    monkeypatch.setattr(hub, "_answer", lambda *question: ConnectionError("nobody is there"))
    assert evaluated("../run") == before


def test_an_evaluation_on_a_text_of_its_own_asks_no_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = home / "run" / "checkpoints" / "step_00000012"
    state = json.loads((newest / "state.json").read_text())
    state["config"]["data"] = "c4"
    (newest / "state.json").write_text(json.dumps(state))
    seal(newest)
    monkeypatch.setattr(hub, "_answer", lambda *question: ConnectionError("nobody is there"))
    with pytest.raises(InputError, match=r"\(nobody is there\); .* this is the text of the run: --eval-data PATH"):
        invoke("eval", newest)
    assert evaluated(newest, "--eval-data", "text.jsonl")["eval_tokens"] > 500
