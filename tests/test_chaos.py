"""Killed at random moments, a run ends as if nothing had happened; `make chaos` does it a hundred times and more."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from galore_pretrain.optim.methods import METHODS
from warm_python import executable


def chaos(folder: Path, *arguments: str) -> Any:
    script = Path(__file__).with_name("chaos.py")
    command = [executable(), str(script), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_ten_times_runs_end_bit_for_bit_as_undisturbed(tmp_path: Path) -> None:
    """Two kills a scenario."""
    assert chaos(tmp_path / "runs", "--kills", "10", "--seed", "7")["kills"] == 10


@pytest.mark.slow
def test_every_row_resumes_bit_for_bit(tmp_path: Path) -> None:
    """In one execution, since layerwise updates are global ones bit for bit; `make chaos` takes both."""
    assert chaos(tmp_path / "runs", "--every-row", "once")["runs"] == len(METHODS)
