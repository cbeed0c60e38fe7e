"""What the check leaves: ``check.json`` for programs, and ``check.md``, whose head can be pasted into an issue."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from galore_pretrain.check.part import Check, Found, Settings, Value
from galore_pretrain.check.parts import Entry
from galore_pretrain.rundir.directory import write_json

_FAILED = ("died", "late")
_BY_NAME = ("torch", "transformers", "bitsandbytes", "python")  # versions that the head tells
_NAMED = 5  # failures that the verdict names, at most


@dataclass(frozen=True)
class Outcome:
    """Says what came of a part.

    ``status`` is done, died (by a signal or an exception), late (it passed its limit), cut (the minutes were over),
    stopped (by the user) or skipped; ``why`` says of what, and ``said`` has the last lines that it printed.
    """

    entry: Entry
    status: str
    why: str = ""
    seconds: float = 0.0
    found: Found = field(default_factory=Found)
    said: str = ""

    @property
    def failures(self) -> list[Check]:
        """Return the checks that failed."""
        return [check for check in self.found.checks if not check.ok]


def has_failed(outcomes: Sequence[Outcome]) -> bool:
    """Return whether a check failed, or a part died or passed its limit."""
    return any(outcome.failures or outcome.status in _FAILED for outcome in outcomes)


def line(outcome: Outcome) -> str:
    """Return what came of a part, as a person reads it; failed checks on lines of their own."""
    name = outcome.entry.name
    if outcome.status == "skipped":
        return f"{name}: skipped, {outcome.why}"
    failures = outcome.failures
    met = len(outcome.found.checks) - len(failures)
    text = f"{name}: {met} checks passed, {len(failures)} failed, {outcome.seconds:.0f} s"
    if outcome.status != "done":
        text += f"; {outcome.status}: {outcome.why}"
    for check in failures:
        text += f"\n    FAILED {check.name}: {_shown(check.measured)} ({check.bound})"
    for what, why in outcome.found.skipped.items():
        text += f"\n    not checked: {what} ({why})"
    return text


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Return in a sentence or two what came of all parts."""
    failures: list[str] = []
    checks = 0
    for outcome in outcomes:
        name = outcome.entry.name
        checks += len(outcome.found.checks)
        if outcome.status in _FAILED:
            failures.append(f"{name} {outcome.status} ({outcome.why})")
        failures += [f"{name}: {check.name} = {_shown(check.measured)}" for check in outcome.failures]
    if failures:
        named = "; ".join(failures[:_NAMED])
        if len(failures) > _NAMED:
            named += f"; and {len(failures) - _NAMED} more"
        text = f"FAILED: {len(failures)} of {checks} checks or parts. {named}."
    else:
        text = f"passed: {checks} checks."
    unfinished = [outcome.entry.name for outcome in outcomes if outcome.status not in ("done", *_FAILED)]
    if unfinished:
        text += f" Not or not wholly made: {', '.join(unfinished)}."
    return text


def write(output: Path, settings: Settings, outcomes: Sequence[Outcome]) -> None:
    """Write both files anew."""
    (output / "check.md").write_text(_markdown(settings, outcomes))
    parts: dict[str, Any] = {}
    for outcome in outcomes:
        parts[outcome.entry.name] = {
            "about": outcome.entry.about,
            "status": outcome.status,
            "why": outcome.why,
            "seconds": round(outcome.seconds, 1),
            "checks": [asdict(check) for check in outcome.found.checks],
            "numbers": outcome.found.numbers,
            "skipped": outcome.found.skipped,
            "said": outcome.said,
        }
    answer = {
        "verdict": verdict(outcomes),
        "ok": not has_failed(outcomes),
        "device": settings.device,
        "machine": _machine(outcomes),
        "parts": parts,
    }
    write_json(output / "check.json", answer)


def _markdown(settings: Settings, outcomes: Sequence[Outcome]) -> str:
    """Return the page: the verdict and the machine, what failed, numbers, then everything."""
    lines = [f"**galore-pretrain check {verdict(outcomes)}**", "", _machine_in_words(settings, outcomes), ""]
    lines += _table_of_parts(outcomes)
    lines += _failed(outcomes)
    lines += _numbers(outcomes)
    lines += _everything(outcomes)
    return "\n".join(lines)


def _machine(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what a part has said of the machine; nothing where no part came so far."""
    for outcome in outcomes:
        if outcome.found.machine is not None:
            return outcome.found.machine
    return {}


def _machine_in_words(settings: Settings, outcomes: Sequence[Outcome]) -> str:
    """Return the line of the page that says what was checked, and where."""
    machine = _machine(outcomes)
    date = datetime.now(UTC).date().isoformat()
    if not machine:
        return f"On {settings.device}, {date}."
    hardware = machine["hardware"]
    versions = machine["versions"]
    place = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    words = [f"galore-pretrain {versions['galore-pretrain']}"]
    git = machine["git"]
    if git is not None:
        changed = ", changed since" if git["changed"] else ""
        words.append(f"commit {git['commit'][:12]}{changed}")
    words += [f"on {settings.device}: {place}"]
    words += [f"{name} {versions[name]}" for name in _BY_NAME if versions[name] is not None]
    words += [hardware["system"], date]
    return f"{'; '.join(words)}."


def _table_of_parts(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a table with a line for each part."""
    lines = ["| part | about | what came of it | passed | failed | s |", "|---|---|---|---|---|---|"]
    for outcome in outcomes:
        came = outcome.status
        if outcome.why:
            came += f": {outcome.why}"
        failed = len(outcome.failures)
        passed = len(outcome.found.checks) - failed
        cells = [outcome.entry.name, outcome.entry.about, came, str(passed), str(failed), f"{outcome.seconds:.0f}"]
        lines.append(_row(cells))
    return [*lines, ""]


def _failed(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a table of the checks that failed, and what parts said that ended otherwise than well."""
    rows: list[str] = []
    for outcome in outcomes:
        for check in outcome.failures:
            rows.append(_row([outcome.entry.name, check.name, _shown(check.measured), check.bound]))
    lines: list[str] = []
    if rows:
        lines += ["## What failed", "", "| part | check | measured | bound |", "|---|---|---|---|", *rows, ""]
    for outcome in outcomes:
        if outcome.said:
            name = outcome.entry.name
            lines += [f"## What {name} said at last ({outcome.why})", "", "```", outcome.said, "```", ""]
    return lines


def _numbers(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the numbers that nothing bounds, a table a part."""
    lines: list[str] = []
    for outcome in outcomes:
        if outcome.found.numbers:
            lines += [f"## Numbers: {outcome.entry.name}", "", "| | |", "|---|---|"]
            lines += [_row([name, _shown(value)]) for name, value in outcome.found.numbers.items()]
            lines.append("")
    return lines


def _everything(outcomes: Sequence[Outcome]) -> list[str]:
    """Return all checks, and what could not be checked, a table a part."""
    lines: list[str] = []
    for outcome in outcomes:
        found = outcome.found
        if not found.checks and not found.skipped:
            continue
        lines += [f"## All checks: {outcome.entry.name}", ""]
        lines += ["| check | measured | bound | passed |", "|---|---|---|---|"]
        for check in found.checks:
            passed = "yes" if check.ok else "**no**"
            lines.append(_row([check.name, _shown(check.measured), check.bound, passed]))
        for what, why in found.skipped.items():
            lines.append(_row([what, "not checked", why, ""]))
        lines.append("")
    return lines


def _row(cells: Sequence[str]) -> str:
    """Return a row of a table in Markdown."""
    escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _shown(value: Value) -> str:
    """Return a value as a person reads it: yes or no, and three digits of what is no whole number."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value != round(value):
        return f"{value:.4g}"
    if isinstance(value, float):
        return f"{value:.0f}"
    return str(value)
