"""Random flags and mutated configs end in a run or in one line that says what is wrong: no traceback, no hang.

`make fuzz` tries 500 of each.
"""

import contextlib
import io
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from conftest import TINY
from galore_pretrain import cli
from galore_pretrain.optim.methods import METHODS

ROOT = str(Path(__file__).parents[1])
HOSTILE = [
    "",
    "0",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "abc",
    "1.5",
    "10" * 20,
    "١٢",
    "../..",
    "true",
    "[]",
    "💥",
]
"""For any flag: none of them makes a run long or large. A null byte no argument of a process can hold; JSON can."""
FITTING: dict[str, list[str]] = {
    "optim": [*METHODS, "galore", "adam8bit", "galore_adamw_layerwise"],
    "rank": ["1", "4", "32", "1000"],
    "update-proj-gap": ["1", "2", "200"],
    "galore-scale": ["0.25", "1", "1e30"],
    "proj-type": ["std", "reverse_std", "left", "right", "full"],
    "basis": ["svd", "randomized"],
    "refresh": ["staggered", "together"],
    "moments": ["keep", "project", "reset"],
    "natural-history": ["1", "3"],
    "natural-damping": ["1e-3", "1e-30"],
    "lora-alpha": ["32", "1e-9"],
    "lora-dropout": ["0", "0.5", "0.999", "1"],
    "relora-every": ["1", "2"],
    "relora-warmup": ["0", "1"],
    "matrix-lr-scale": ["0", "1", "1e9"],
    "numerics": ["sound", "reference"],
    "weight-decay": ["0", "0.1"],
    "betas": ["0.9,0.999", "0,0", "0.9", "1,1", "0.9,0.999,0.5"],
    "eps": ["1e-8", "1e-300"],
    "batch-size": ["1", "2", "3"],
    "total-batch-size": ["1", "2", "3", "4"],
    "memory-budget": ["24GiB", "1.1GB", "1GB", "24"],
    "grad-clip": ["0", "1", "1e-30"],
    "clip-norm": ["full", "projected"],
    "data": ["sample", "c4", ROOT + "/README.md", "*", ROOT + "/tests"],
    "eval-data": ["sample", ROOT + "/README.md"],
    "tokenizer": ["sample", "t5", ROOT + "/README.md", ROOT + "/tests"],
    "bad-data": ["raise", "skip"],
    "max-unknown": ["0", "0.05", "5%", "1"],
    "layout": ["pad", "pack"],
    "documents": ["joined", "separate"],
    "max-length": ["2", "16", "64", "65"],
    "steps": ["1", "2"],
    "max-tokens": ["1", "100", "recipe"],
    "warmup-steps": ["0", "1", "3"],
    "lr": ["0.01", "1e-300", "1e30"],
    "min-lr-ratio": ["0", "1", "2"],
    "scheduler": ["cosine", "linear"],
    "max-loss": ["5", "100"],
    "eval-every": ["1", "1000"],
    "eval-tokens": ["1", "500", "2K"],
    "dtype": ["float32", "bfloat16"],
    "device": ["cpu", "auto", "cuda", "cuda:7", "meta", "tpu"],
    "seed": ["0", "1", "4294967296", "18446744073709551616"],
    "resume": ["auto", "never", ROOT + "/tests"],
    "save-every": ["1", "3"],
    "keep": ["1", "3"],
    "keep-every": ["1", "2"],
    "wandb": ["disabled"],
    "wandb-project": ["x", "a/b"],
    "name": ["x"],
    "tags": ["a,b", ",,"],
    "model": ["llama_1m", "llama_1b7", ROOT + "/tests", ROOT + "/README.md"],
    "config": [ROOT + "/README.md", ROOT + "/tests"],
    "output": ["/proc/self/x", ROOT + "/README.md/x", ROOT + "/README.md"],
}
SWITCHES = ["layerwise", "activation-checkpointing", "resume-with-changes"]


class HangError(BaseException):
    """Nothing that is meant for what may go wrong takes it."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise HangError(f"no end within {seconds} s")

    numbers = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [(number, signal.getsignal(number)) for number in numbers]
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in before:
            signal.signal(number, handler)


def called(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """(exit code, stderr) of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["galore-pretrain", *arguments])
    shown = io.StringIO()
    logger = logging.getLogger("galore_pretrain")
    monkeypatch.setattr(logger, "handlers", [])
    quiet = contextlib.redirect_stdout(io.StringIO())
    with contextlib.redirect_stderr(shown), quiet, at_most(600), pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code, shown.getvalue()


def check(code: int, stderr: str, output: Path) -> None:
    """A run, or one line; a line that says where to look with ``--debug`` is one that nobody thought of."""
    assert "Traceback" not in stderr, stderr
    if code == 0:
        assert (output / "summary.json").exists(), stderr
        return
    assert code in (1, 2), stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("Error: "), stderr
    assert "--debug shows where" not in last, stderr
    assert sum(line.startswith("Error: ") for line in stderr.splitlines()) == 1, stderr
    assert len(last) < 1000, last


_MANY = settings(
    max_examples=int(os.environ.get("FUZZ", "80")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@st.composite
def flags(draw: st.DrawFn) -> list[str]:
    names = draw(st.lists(st.sampled_from(sorted(FITTING)), min_size=1, max_size=5, unique=True))
    given = [f"--{name}={draw(st.sampled_from(FITTING[name] * 3 + HOSTILE))}" for name in names]
    switches = draw(st.lists(st.sampled_from(SWITCHES), max_size=2, unique=True))
    return given + [f"--{draw(st.sampled_from(['', 'no-']))}{name}" for name in switches]


@_MANY
@given(drawn=flags())
def test_random_flags(drawn: list[str], tiny_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "run"
        base = "--data=sample --total-batch-size=2 --max-length=32 --eval-tokens=300 --dtype=float32 --wandb=disabled"
        chosen = {flag.partition("=")[0] for flag in drawn}
        length = [] if "--max-tokens" in chosen else ["--steps=1"]
        words = [word for word in [*base.split(), *length] if word.partition("=")[0] not in chosen]
        model = [f"--model={tiny_config}"] * ("--model" not in chosen)
        place = [f"--output={output}"] * ("--output" not in chosen)
        below = Path(name) / "a" / "b" / "c"  # so that a hostile --output, such as ../.., is made inside too
        below.mkdir(parents=True)
        monkeypatch.chdir(below)
        code, stderr = called([*model, *words, *drawn, *place], monkeypatch)
        written = next(Path(name).rglob("summary.json"), output / "summary.json").parent
        check(code, stderr, written)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.lists(st.integers(-2, 2), max_size=3), st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
    st.sampled_from([0, -1, 1, 2, 3, 7, 32, 1024, 10**9, 0.5, "float32", "llama", "silu", {"rope_type": "default"}]),
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, base: dict[str, Any], more: list[str]) -> str:
    """A JSON text: keys changed, removed, added; or bytes of the text cut or changed."""
    values = dict(base)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from([*base, *more]) | st.text(max_size=6))
        if draw(st.integers(0, 4)):
            values[key] = draw(VALUES)
        else:
            values.pop(key, None)
    text = json.dumps(values)
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(text)))
        text = (
            text[:place]
            + draw(st.sampled_from(["", "\x00", "}", "[", '"', "é"]))
            + text[place + draw(st.integers(0, 3)) :]
        )
    return text


RUN = {"steps": 1, "data": "sample", "total_batch_size": 2, "max_length": 32, "eval_tokens": 300, "dtype": "float32"}
RUN |= {"wandb": "disabled", "optim": "galore_adamw", "rank": 4, "layerwise": True, "betas": [0.9, 0.99]}
MORE = [
    "head_dim", "num_key_value_heads", "hidden_act", "rope_scaling", "rope_parameters", "rope_theta", "rms_norm_eps",
    "attention_bias", "attention_dropout", "mlp_bias", "tie_word_embeddings", "initializer_range", "model_type",
    "architectures", "dtype", "torch_dtype", "pad_token_id", "use_cache", "pretraining_tp", "quantization_config",
]  # fmt: skip


@_MANY
@given(text=mutated(TINY, MORE))
@example(text=json.dumps(TINY | {"num_hidden_layers": 10**9}))
def test_mutated_model_configs(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.suppress(ValueError, AttributeError):
        layers = json.loads(text).get("num_hidden_layers")
        assume(not isinstance(layers, int) or not 50 < layers <= 1000)  # fine, and too long
    with tempfile.TemporaryDirectory() as name:
        output, file = Path(name) / "run", Path(name) / "config.json"
        file.write_text(text, errors="surrogatepass")
        words = [
            f"--{key.replace('_', '-')}={value}" for key, value in RUN.items() if key not in ("layerwise", "betas")
        ]
        code, stderr = called([f"--model={file}", *words, f"--output={output}"], monkeypatch)
        check(code, stderr, output)


@_MANY
@given(text=mutated(RUN, ["lr", "model", "keep", "config", "seed", "grad_clip", "device", "max_tokens"]))
def test_mutated_run_configs(text: str, tiny_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        output, file = Path(name) / "run", Path(name) / "run.json"
        with contextlib.suppress(ValueError, AttributeError):
            sizes = [json.loads(text).get(key) for key in ("total_batch_size", "eval_tokens", "max_tokens")]
            assume(not any(isinstance(size, int) and 500 < size < 2**63 for size in sizes))  # fine, and too long
        file.write_text(text, errors="surrogatepass")
        code, stderr = called(
            [f"--model={tiny_config}", f"--config={file}", "--steps=1", f"--output={output}"], monkeypatch
        )
        check(code, stderr, output)
