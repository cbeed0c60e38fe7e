"""Reads the project's pages: the commands and the Python that they show, their links, headings and pieces of code."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS = ("galore-pretrain", "python", "pytest", "make", "pip", "torchrun", "sbatch", "lm_eval", "jq", "sed", "echo")
RUN = ("jq", "sed", "echo")
"""Those that change texts, and are run. What stands of them in a text is no command of the page's."""
SCRIPTS = "scripts/"
SHELLS = ("bash", "sh")
_INDENT = "    "
_PROMPT = "$ "
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Command:
    """One command of a page, as words of a shell. ``text`` is what the page shows, its comment left out."""

    page: str
    line: int
    text: str
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Block:
    """A block of code: fenced, with its language, or indented, without one. ``line`` is that of its first line."""

    language: str
    line: int
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All blocks of code of a page. Lines that go on an item of a list are indented too, and are none."""
    found = []
    language, inside, start = None, [], 0
    is_text = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence and language is None:
            language, inside, start = fence[1], [], number + 1
        elif fence:
            found.append(Block(str(language), start, tuple(inside)))
            language = None
        elif language is not None:
            inside.append(line)
        elif line.startswith(_INDENT) and not is_text:
            found.append(Block("indented", number, (line[len(_INDENT) :],)))
        else:
            is_text = bool(line.strip())
    return _joined(found)


def code(name: str, language: str) -> list[str]:
    """The blocks of a language on a page."""
    return [block.text for block in blocks(ROOT / name) if block.language == language]


def tables(name: str) -> list[list[list[str]]]:
    """The tables of a page, each as its rows of cells, without its headings."""
    found: list[list[list[str]]] = []
    before = ""
    for line in (ROOT / name).read_text().splitlines():
        if re.fullmatch(r"\|[-:| ]*---[-:| ]*\|", line):
            found.append([])
        elif line.startswith("|") and before.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        before = line
    return found


def _joined(found: list[Block]) -> list[Block]:
    """Put indented lines that follow each other into one block."""
    joined: list[Block] = []
    for block in found:
        last = joined[-1] if joined else None
        goes_on = last is not None and last.language == block.language == "indented"
        if last is not None and goes_on and last.line + len(last.lines) == block.line:
            joined[-1] = Block("indented", last.line, last.lines + block.lines)
        else:
            joined.append(block)
    return joined


def commands(page: Path) -> Iterator[Command]:
    """All commands of a page: of its blocks, and those that stand in its text.

    Of a shell's block every line is one, whatever it begins with. Elsewhere, what begins with no known program is
    output, and so is what follows a line with a prompt.
    """
    name = name_of(page)
    for block in blocks(page):
        variables: dict[str, str] = {}
        for line, text in _logical_lines(block):
            is_other = block.language not in (*SHELLS, "indented", "")
            if not text or is_other or (block.language not in SHELLS and not _is_command(text)):
                continue
            assigned = re.fullmatch(r'(\w+)="(.*)"', text)
            if assigned:
                variables[assigned[1]] = assigned[2]
                continue
            shown = text.removeprefix(_PROMPT)
            for variable, value in variables.items():
                shown = shown.replace(f"${variable}", value)
            yield Command(name, line, shown, _words(shown))
    for line, span in spans(page):
        words = span.split()
        if _is_command(span) and len(words) > 1 and words[0] not in RUN:
            yield Command(name, line, span, _words(span))


def spans(page: Path) -> Iterator[tuple[int, str]]:
    """The pieces of code in a page's text, each with its line. Blocks are left out."""
    inside = set()
    for block in blocks(page):
        inside |= set(range(block.line - 1, block.line + len(block.lines) + 1))
    lines = ["" if n in inside else line for n, line in enumerate(page.read_text().splitlines(), 1)]
    text = "\n".join(lines)
    for found in re.finditer(r"`([^`]+)`", text):
        yield text.count("\n", 0, found.start()) + 1, " ".join(found[1].split())


def _logical_lines(block: Block) -> Iterator[tuple[int, str]]:
    """A block's lines without comments, those that end with a backslash joined to the next, with their numbers."""
    begun, start = "", 0
    for number, line in enumerate(block.lines, block.line):
        start = start if begun else number
        without_comment = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if without_comment.endswith("\\"):
            begun += without_comment.removesuffix("\\").rstrip() + " "
            continue
        yield start, (begun + without_comment.strip()).strip()
        begun = ""


def _is_command(text: str) -> bool:
    bare = text.removeprefix(_PROMPT)
    while _ASSIGNMENT.match(bare):
        first, _, bare = bare.partition(" ")
        if '"' in first or "'" in first:
            return "=" in text
    word = bare.split(" ", 1)[0]
    return word in PROGRAMS or (word.startswith(SCRIPTS) and word != SCRIPTS)


def _words(text: str) -> tuple[str, ...]:
    """The words of a command, without settings of the environment before it."""
    words = shlex.split(text)
    while words and _ASSIGNMENT.match(words[0]):
        del words[0]
    return tuple(words)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    in_fence = False
    for line in page.read_text().splitlines():
        in_fence ^= line.startswith("```")
        heading = re.match(r"#{1,6} (.*)", line)
        if heading is None or in_fence:
            continue
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        number, anchor = 0, slug
        while anchor in found:
            number += 1
            anchor = f"{slug}-{number}"
        found.add(anchor)
    return found


def links(page: Path) -> Iterator[str]:
    """The targets of a page's links and pictures that are in this repository."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target
