"""The stand-in for Python that tests start processes by: what is seen of it is what is seen of Python."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from warm_python import executable

TELLS = """
import atexit, json, os, sys, threading, time
atexit.register(print, "at the end")
threading.Thread(target=lambda: (time.sleep(0.1), print("from a thread", flush=True))).start()
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("OWN"), __name__, sys.stdin.read()]))
print("told", file=sys.stderr)
"""
ENDINGS = {
    "nothing": "",
    "a number": "sys.exit(3)",
    "a word": "sys.exit('a word')",
    "an error": "raise ValueError('no number')",
    "a signal": "os.kill(os.getpid(), 9)",
    "at once": "os._exit(7)",
}


def by_both(words: list[str], **options: object) -> list[subprocess.CompletedProcess[str]]:
    """What the stand-in comes to, and what Python does."""
    return [
        subprocess.run([python, *words], capture_output=True, text=True, timeout=60, check=False, **options)  # type: ignore[call-overload]
        for python in (executable(), sys.executable)
    ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_it_ends_as_python_does(ending: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TELLS + ENDINGS[ending])
    (tmp_path / "module.py").write_text(TELLS + ENDINGS[ending])
    environment = os.environ | {"OWN": "told", "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": ""}
    for words in (["-c", TELLS + ENDINGS[ending], "a", "b c"], ["-u", str(script), "a"], ["-m", "module", "-x"]):
        ours, pythons = by_both(words, input="read", cwd=tmp_path, env=environment)
        assert (ours.returncode, ours.stdout) == (pythons.returncode, pythons.stdout), words
        assert ours.stderr.splitlines()[-1] == pythons.stderr.splitlines()[-1]


def test_what_it_starts_is_warm_and_has_all_imported(tmp_path: Path) -> None:
    nested = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    asked = "import sys; sys.exit(len({'torch', 'transformers', 'galore_pretrain.run'} & sys.modules.keys()))"
    done = subprocess.run([executable(), "-c", nested, asked], check=False)
    assert done.returncode == 3


WAITS = """
import os, signal, sys, time
from pathlib import Path
def stop(number, frame):
    sys.exit(40 + number)
signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1]).write_text(f"{os.getpid()}\\n")
time.sleep(60)
"""


def test_signals_reach_it_and_its_end_is_that_of_the_child(tmp_path: Path) -> None:
    """One that it handles, one that it does not, and SIGKILL, which the client cannot hand on."""
    for number, code in ((signal.SIGTERM, 55), (signal.SIGHUP, -signal.SIGHUP), (signal.SIGKILL, -signal.SIGKILL)):
        file = tmp_path / number.name
        process = subprocess.Popen([executable(), "-c", WAITS, str(file)])
        deadline = time.monotonic() + 30
        while not (file.exists() and file.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) == code
        child, deadline = int(file.read_text()), time.monotonic() + 30
        while Path(f"/proc/{child}").exists():
            assert time.monotonic() < deadline, number
            time.sleep(0.01)


def test_many_at_once_are_many() -> None:
    script = "import sys, time; time.sleep(0.2); sys.exit(int(sys.argv[1]))"
    started = [subprocess.Popen([executable(), "-c", script, str(n)]) for n in range(20)]
    assert [process.wait(60) for process in started] == list(range(20))
