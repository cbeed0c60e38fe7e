"""Repeats an entry of a leaderboard: its first updates, and one seed to the end."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from galore_pretrain.errors import InputError
from galore_pretrain.signals import on_stop
from galore_pretrain.study.leaderboard import UPDATES, Entry, Run
from galore_pretrain.study.sweep import as_words

TOLERANCE = 1e-3
"""The most by which a training loss of the first updates may differ, in nats."""
ONE_SEED = 0.02
"""The same of the last validation loss where an entry has one seed, and so no spread of its own."""
LARGEST_SPREAD = 0.05
"""The same where it has several: at most so much, whatever spread its seeds have."""

_POLL_SECONDS = 0.5


@dataclass
class Verification:
    """Repeats the run of an entry's first seed in ``output``, and tells by ``say`` what it finds.

    The entry's file was checked (`Entry.check_method`), and may be executed.

    The losses of the first updates are compared as soon as they are there, so that what is different ends at once.
    ``is_short`` ends there in any case.
    """

    entry: Entry
    output: Path
    is_short: bool
    say: Callable[[str], None]
    _process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)
    _stop: int | None = field(default=None, init=False)

    def run(self) -> int:
        """Make the run and compare; return 0 where it repeats the entry, 1 where not, 128 + N after signal N."""
        if (self.output / "metrics.jsonl").exists():
            raise InputError(f"--output {self.output} has a run already; give a new folder")
        self.output.mkdir(parents=True, exist_ok=True)
        recorded = self.entry.runs[0]
        with on_stop(self._interrupted), (self.output / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "galore_pretrain", *self.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
            try:
                return self._watch(self._process, recorded)
            finally:
                self._process.terminate()
                self._process.wait()

    def arguments(self) -> list[str]:
        """Return the words of the run's command: it evaluates and saves at its end alone."""
        steps = self.entry.track.flags.get("steps")
        flags = {
            **self.entry.run_flags(self.entry.runs[0].seed),
            "eval_every": steps,
            "save_every": steps,
            "wandb": "disabled",
            "resume": "never",
            "output": self.output,
        }
        return as_words(flags)

    def _watch(self, process: "subprocess.Popen[bytes]", recorded: Run) -> int:
        """Follow the run and compare what it writes."""
        wanted = len(recorded.first_losses)
        losses = self._losses()
        while len(losses) < wanted and process.poll() is None:
            time.sleep(_POLL_SECONDS)
            losses = self._losses()
        if self._stop is not None:
            return 128 + self._stop
        losses = self._losses()  # once more: the last ones may have come as the run ended
        if len(losses) < wanted:
            raise InputError(f"the run ended after {len(losses)} updates: {self._last_words()}")
        if not self._repeats_updates(losses[:wanted], recorded):
            return 1
        if self.is_short:
            return 0
        code = process.wait()
        if self._stop is not None:
            return 128 + self._stop
        if code:
            raise InputError(f"the run ended with exit code {code}: {self._last_words()}")
        return int(not self._repeats_seed(recorded))

    def _repeats_updates(self, losses: list[float | None], recorded: Run) -> bool:
        """Compare the training losses of the first updates, and tell."""
        differences = []
        for ours, theirs in zip(losses, recorded.first_losses, strict=True):
            differences.append(float("inf") if ours is None else abs(ours - theirs))
        largest = max(differences)
        repeats = largest <= TOLERANCE
        word = "repeated" if repeats else f"not repeated from update {_first_beyond(differences)} on"
        self.say(f"updates 1 to {len(losses)}: {word}; losses differ by up to {largest:.1e}, {TOLERANCE:g} is allowed")
        return repeats

    def _repeats_seed(self, recorded: Run) -> bool:
        """Compare the last validation loss, and tell."""
        summary = json.loads((self.output / "summary.json").read_text())
        loss = float(summary["eval_loss"])
        losses = list(self.entry.losses.values())
        spread = ONE_SEED
        if len(losses) > 1:
            spread = min(max(losses) - min(losses), LARGEST_SPREAD)
        difference = abs(loss - recorded.loss)
        repeats = difference <= spread
        word = "repeated" if repeats else "not repeated"
        self.say(
            f"seed {recorded.seed}: {word}; validation loss {loss:.4f}, the entry's {recorded.loss:.4f}; "
            f"a difference of {difference:.1e}, {spread:.1e} is allowed"
        )
        return repeats

    def _last_words(self) -> str:
        """Return the last line of the run's log."""
        lines = (self.output / "log.txt").read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"

    def _losses(self) -> list[float | None]:
        """Return the training losses that the run has written so far, of its first updates."""
        try:
            text = (self.output / "metrics.jsonl").read_text()
        except OSError:
            return []
        whole_lines = text.split("\n")[:-1]
        return [json.loads(line)["loss"] for line in whole_lines[:UPDATES]]

    def _interrupted(self, number: int) -> None:
        """Stop the run, which is asked to end by itself."""
        self._stop = number
        if self._process is not None:
            self._process.terminate()


def _first_beyond(differences: list[float]) -> int:
    """Return the number of the first update whose loss differs by too much."""
    for update, difference in enumerate(differences, 1):
        if difference > TOLERANCE:
            return update
    raise ValueError("no difference is beyond the tolerance")
