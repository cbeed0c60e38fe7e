"""A hub for all tests of a process of pytest, and processes that have imported the libraries which read its address.

These libraries read HF_ENDPOINT, HF_HOME and their time limits when they are imported, which takes longer than what
a test does with them. So a `WarmHub` keeps its address while its content changes from test to test, and starts one
Python for each set of time limits. That one imports all, and forks itself for each command of a test: a process of its
own, with its own exit code, which has met no hub before.
"""

import json
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from fakehub import FakeHub
from runs import Done, execute

_READ_AT_IMPORT = re.compile("HF_.*")
_THIS_MACHINE = re.compile(r"HF_.*|WANDB_.*|.*_PROXY", re.IGNORECASE)


def without_this_machine(home: Path) -> dict[str, str]:
    """Return the environment without this machine's own hub settings, cache or proxy."""
    inherited = {key: value for key, value in os.environ.items() if not _THIS_MACHINE.fullmatch(key)}
    return inherited | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "WANDB_MODE": "disabled"}


class WarmHub(FakeHub):
    """A hub whose address stays, and processes that know it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "root")
        self._home = folder / "home"
        """A link to the folder ``hf`` of the test that runs: HF_HOME is read once."""
        self._warm: dict[tuple[tuple[str, str], ...], subprocess.Popen[str]] = {}

    def python(self, folder: Path, script: str, *arguments: str, **environment: str) -> Done:
        """What ``python -c script arguments`` comes to in ``folder``, whose ``hf`` is HF_HOME."""
        self._home.unlink(missing_ok=True)
        (folder / "hf").mkdir(exist_ok=True)
        self._home.symlink_to(folder / "hf")
        imported = {key: value for key, value in environment.items() if _READ_AT_IMPORT.fullmatch(key)}
        warm = self._started(imported)
        assert warm.stdin is not None
        assert warm.stdout is not None
        with tempfile.TemporaryDirectory() as place:
            said = [Path(place) / name for name in ("stdout", "stderr")]
            whole = self._environment(imported) | environment
            print(json.dumps([script, arguments, *map(str, said), whole, str(folder)]), file=warm.stdin, flush=True)
            if not select.select([warm.stdout], [], [], 180)[0]:
                self.stop()
                raise subprocess.TimeoutExpired(arguments, 180, said[0].read_text(), said[1].read_text())
            code = int(warm.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, said[0].read_text(), said[1].read_text())

    def stop(self) -> None:
        """End the processes, and what they have started."""
        for warm in self._warm.values():
            os.killpg(warm.pid, signal.SIGKILL)
            warm.communicate()
        self._warm.clear()

    def _environment(self, imported: dict[str, str]) -> dict[str, str]:
        return without_this_machine(self._home) | {"HF_ENDPOINT": self.url} | imported

    def _started(self, imported: dict[str, str]) -> subprocess.Popen[str]:
        key = tuple(sorted(imported.items()))
        if key not in self._warm:
            self._warm[key] = subprocess.Popen(
                [sys.executable, __file__],
                env=self._environment(imported),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        return self._warm[key]


def main() -> None:
    """Import all, then execute one command after another: a line of stdin is one, a line of stdout its exit code."""
    import datasets  # noqa: F401
    import transformers  # noqa: F401

    from galore_pretrain import run  # noqa: F401
    from galore_pretrain.rundir import loaded  # noqa: F401

    forking = multiprocessing.get_context("fork")
    for line in sys.stdin:
        script, arguments, stdout, stderr, environment, folder = json.loads(line)
        process = forking.Process(target=execute, args=(script, arguments, stdout, stderr, environment, folder))
        process.start()
        process.join()
        print(process.exitcode, flush=True)


if __name__ == "__main__":
    main()
