"""The real wandb: its own settings hold, a server that is away delays nothing, and no line is lost."""

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runs import command, python, run
from warm_python import executable

KEY = "0" * 40
LOG = """
import json, os, sys, time
from pathlib import Path
from galore_pretrain.train import metrics
from galore_pretrain.train.metrics import Wandb

metrics._INIT = float(os.environ.get("INIT", metrics._INIT))
mode, options = sys.argv[1], {"project": None, "name": None, "tags": None} | json.loads(sys.argv[2])
started = time.monotonic()
logger = Wandb(mode, Path("folder"), config={}, run_id=None, **options)
for step in range(1, 4):
    logger.log({"eval_loss": step / 1000}, step)
has_ended = logger.close()
print(json.dumps([has_ended, time.monotonic() - started]), flush=True)
if not has_ended:
    os._exit(0)  # as the command line does
"""


def _python(tmp_path: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process without this machine's own settings of wandb."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    fixed = {"HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path / "settings"), "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [executable(), "-c", script, *arguments],
        env={**inherited, **fixed, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def _log(
    tmp_path: Path, mode: str, given: dict[str, Any] | None = None, *, ends: bool = True, **environment: str
) -> tuple[bytes, str]:
    """What the file for ``wandb sync`` holds of a logger's three lines, and what the process says."""
    (tmp_path / "folder").mkdir()
    done = _python(tmp_path, LOG, mode, json.dumps(given or {}), **environment)
    has_ended, seconds = json.loads(done.stdout)
    assert has_ended is ends
    assert seconds < 20, done.stderr
    (file,) = tmp_path.rglob("offline-run-*/*.wandb")
    return file.read_bytes(), done.stderr


@pytest.mark.parametrize("mode", ["auto", "offline"])
def test_wandbs_own_variables_hold(tmp_path: Path, mode: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    own = {"WANDB_PROJECT": "my-project", "WANDB_NAME": "my-name", "WANDB_TAGS": "tag-a,tag-b"}
    own["WANDB_DIR"] = str(tmp_path / "elsewhere")
    log, _ = _log(tmp_path, mode, **own, **{"WANDB_MODE": "offline"} if mode == "auto" else {})
    assert all(word in log for word in (b"my-project", b"my-name", b"tag-a", b"tag-b"))
    assert list((tmp_path / "elsewhere").rglob("*.wandb"))


def test_a_flag_wins_over_wandbs_variables(tmp_path: Path) -> None:
    given = {"project": "flag-project", "name": "flag-name", "tags": ["flag-tag"]}
    own = {"WANDB_PROJECT": "my-project", "WANDB_NAME": "my-name", "WANDB_TAGS": "my-tag", "WANDB_MODE": "online"}
    log, _ = _log(tmp_path, "offline", given, **own)
    assert all(word in log for word in (b"flag-project", b"flag-name", b"flag-tag"))
    assert b"my-" not in log


def test_without_either_our_defaults_hold(tmp_path: Path) -> None:
    log, stderr = _log(tmp_path, "auto")
    assert b"galore-pretrain" in log
    assert b"folder" in log
    assert list((tmp_path / "folder").rglob("*.wandb"))
    assert stderr == ""


def test_a_key_is_seen_where_wandb_looks_for_it(tmp_path: Path) -> None:
    """In netrc it is one of the server's: WANDB_BASE_URL's, or that of wandb's settings."""
    (tmp_path / "netrc").write_text(f"machine wandb.example.com\n  login user\n  password {KEY}\n")
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "settings").write_text("[default]\nbase_url = https://wandb.example.com\n")
    (tmp_path / "bare").mkdir()
    netrc = {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "bare")}
    cases: list[tuple[dict[str, str], bool]] = [
        (netrc, False),
        (netrc | {"WANDB_BASE_URL": "https://wandb.example.com"}, True),
        (netrc | {"WANDB_CONFIG_DIR": str(tmp_path / "settings")}, True),
        ({"NETRC": str(tmp_path / "none"), "WANDB_BASE_URL": "https://wandb.example.com"}, False),
        ({"WANDB_API_KEY": KEY}, True),
    ]
    script = "from galore_pretrain.train import metrics; print(metrics._has_key())"
    for environment, has_key in cases:
        assert _python(tmp_path, script, **environment).stdout.strip() == str(has_key), environment


def test_online_without_a_key_logs_offline_and_never_asks(tmp_path: Path) -> None:
    _, stderr = _log(tmp_path, "online")
    assert "no API key" in stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    """Neither at the beginning nor at the end, when wandb still tries to reach it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen()
        server = f"http://127.0.0.1:{listener.getsockname()[1]}"
        log, stderr = _log(tmp_path, "online", ends=False, WANDB_API_KEY=KEY, WANDB_BASE_URL=server, INIT="2")
    assert all(f"{step / 1000}".encode() in log for step in range(1, 4))
    synced = re.search(rf"wandb logs offline: {server} did not take the run .* wandb sync (\S+) ", stderr)
    assert synced, stderr
    assert list((tmp_path / synced[1]).glob("*.wandb"))


def test_a_run_that_was_killed_hands_all_its_lines_over_again(tiny_config: str, tmp_path: Path) -> None:
    kill = """
import os, signal, sys
from galore_pretrain import cli
from galore_pretrain.train import metrics

log = metrics.JsonLines.log
def deadly(self, values, step):
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, values, step)
metrics.JsonLines.log = deadly
cli.main()
"""
    output = tmp_path / "run"
    arguments = command(tiny_config, output, "--wandb", "offline")[3:]
    killed = python(kill, *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = set(output.rglob("offline-run-*/*.wandb"))
    again = run(tiny_config, output, "--wandb", "offline")
    assert again.returncode == 0, again.stderr
    (file,) = set(output.rglob("offline-run-*/*.wandb")) - before
    held = file.read_bytes()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert json.dumps(row["loss"]).encode() in held, row
    assert {path.stem for path in before} == {file.stem}, "another run of wandb"
