"""What a run says of its weights before it begins: how many there are, of what kind, and how many are trained."""

from pathlib import Path

from runs import COMMAND_LINE, command, python

MATRICES = 2 * (4 * 32 * 32 + 3 * 32 * 80)
OTHERS = 2 * 1024 * 32 + 5 * 32
FACTORS = 2 * (4 * 4 * (32 + 32) + 3 * 4 * (32 + 80))


def told(model: str, output: Path, *flags: str) -> str:
    words = command(model, output, *flags, "--batch-size", "1", "--dtype", "bfloat16")[3:]
    for name, value in {"--steps": "1", "--save-every": "1", "--eval-every": "1", "--total-batch-size": "1"}.items():
        words[words.index(name) + 1] = value
    del words[(i := words.index("--update-proj-gap")) : i + 2]
    done = python(COMMAND_LINE, *words)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_weights_that_are_not_trained_are_told_from_those_that_are(tiny_config: str, tmp_path: Path) -> None:
    said = told(tiny_config, tmp_path / "run", "--optim", "lora")
    whole, trained = MATRICES + OTHERS + FACTORS, OTHERS + FACTORS
    assert f": {whole:,} weights, {trained:,} of them trained, in bfloat16 on CPU" in said
    assert f"updates 28 tensors, {FACTORS:,} weights, with" in said


def test_frozen_matrices_are_told_from_what_is_trained(tiny_config: str, tmp_path: Path) -> None:
    said = told(tiny_config, tmp_path / "run", "--optim", "galore_adamw", "--matrix-lr-scale", "0")
    assert f": {MATRICES + OTHERS:,} weights, {OTHERS:,} of them trained, in bfloat16 on CPU" in said


def test_weights_in_codes_are_told(tiny_config: str, tmp_path: Path) -> None:
    said = told(tiny_config, tmp_path / "run", "--optim", "q_galore")
    assert f": {MATRICES + OTHERS:,} weights in int8 and bfloat16 on CPU" in said
    assert f"updates 14 tensors, {MATRICES:,} weights, with" in said
