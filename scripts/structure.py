"""This script counts the structure of the package: what imports what, who asks whom, how dense a line is.

    python scripts/structure.py                               # a table in Markdown, of the package beside this folder
    python scripts/structure.py COPY/galore_pretrain --list   # of another copy, with the place of every question

* A room is a module or a folder at the top level of a package, its ``__init__`` included. An arrow runs from a room to
  another that it imports, however often. Imports inside functions and under TYPE_CHECKING count; relative ones and
  modules loaded by a computed name do not. A floor stands above all that it imports. A circle is a set of rooms that
  all reach each other. One row counts the folder ``scripts`` as a further room, without this file.
* A question for a class is a line with ``isinstance``, ``issubclass``, ``type(x) is`` or a ``case`` for a class that
  another file defines. A rule is a class with ``update(grad, state, step)``, or one derived from it. A store has
  ``read`` and ``write`` of a ``state``. Protocols, abstract classes and methods without a body do not count.
* A name is asked for a part by ``"galore" in name``, ``startswith`` or ``endswith``. It is asked as a whole by ``==``
  or by ``in`` a literal tuple. The literal must consist of `WORDS`.
* A gradient's way is one update: ``begin``, the hooks, ``complete`` and ``outcome``. Up to Python 3.11 a comprehension
  is a call of its own. The processor is taken to have no fast bf16, so that all machines count alike.
* A code line is one on which a token begins. Comments, docstrings, line ends and indentation are no tokens.
* A config is followed by its name, ``config``, and by its annotation, ``RunConfig``, from file to file.
"""

import argparse
import ast
import io
import itertools
import statistics
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

Function = ast.FunctionDef | ast.AsyncFunctionDef
Place = tuple[str, int]  # file, line
Row = tuple[str, str]  # title, value
DENSE = {
    "Conditional expressions": ast.IfExp,
    "Comprehensions": ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp,
    "`:=`": ast.NamedExpr,
}
NO_CODE = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT)
WORDS = {"sgd", "adam", "adamw", "adafactor", "galore", "natural", "muon", "apollo", "fira"}
WORDS |= {"lowrank", "lora", "relora"}
WORDS |= {"8bit", *(f"{word}8bit" for word in WORDS)}


@dataclass(frozen=True)
class Source:
    """A Python file is read and parsed once; ``name`` is its path inside the package."""

    path: Path
    name: str

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    def of(self, *kinds: Any) -> Iterator[Any]:
        """Each node of one of the kinds is yielded."""
        return (node for node in self.nodes if isinstance(node, kinds))


def layout(rooms: dict[Source, str], package: str) -> str:
    """Rooms, arrows, floors and circles are counted among files that were given to rooms."""
    arrows: dict[str, set[str]] = {room: set() for room in rooms.values()}
    for source, room in rooms.items():
        names = [alias.name for node in source.of(ast.Import) for alias in node.names]
        names += [f"{node.module}.{alias.name}" for node in source.of(ast.ImportFrom) for alias in node.names]
        for name in names:
            if name == package or name.startswith(f"{package}."):
                head = name.removeprefix(package).removeprefix(".").split(".")[0]
                arrows[room].add(head if head in arrows else "__init__")
        arrows[room].discard(room)
    reach = {room: set(targets) for room, targets in arrows.items()}
    for between, beyond in reach.items():
        for reached in reach.values():
            if between in reached:
                reached.update(beyond)
    circles = {frozenset(b for b in reach[a] if a in reach[b]) for a in reach if a in reach[a]}

    def floor(room: str) -> int:
        return 1 + max((floor(below) for below in reach[room] if room not in reach[below]), default=0)

    count = sum(map(len, arrows.values()))
    return f"{len(arrows)} rooms, {count} arrows, {max(map(floor, arrows))} floors, {len(circles)} circles"


def layouts(package: Path, sources: list[Source]) -> Iterator[Row]:
    """These rows describe the top level, the top level with the scripts as a room, and each folder with code."""
    scripts = [path for path in (package.parent / "scripts").glob("*.py") if path.name != "structure.py"]
    for folder in sorted({source.path.parent for source in sources}):
        within = folder.relative_to(package.parent).as_posix()
        inside = [source for source in sources if source.path.is_relative_to(folder)]
        rooms = {source: source.path.relative_to(folder).parts[0].removesuffix(".py") for source in inside}
        yield f"Rooms of `{within}/`", layout(rooms, within.replace("/", "."))
        if folder == package:
            rooms |= {Source(path, path.name): "scripts/" for path in scripts}
            yield f"Rooms of `{within}/`, and `scripts/` as one more", layout(rooms, package.name)


def parameters(function: Function) -> dict[str, str]:
    """Each parameter's name is mapped to its source text, annotation included."""
    every = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return {argument.arg: ast.unparse(argument) for argument in every}


def has_body(method: Function) -> bool:
    """A method has a body if it does something, and does not only wait to be overridden."""
    if any("abstract" in ast.unparse(decorator) for decorator in method.decorator_list):
        return False
    texts = [node for node in method.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return any(node not in texts and not isinstance(node, (ast.Pass, ast.Raise)) for node in method.body)


def concrete_classes(sources: list[Source], methods: dict[str, set[str]]) -> dict[str, str]:
    """Each class that has all ``methods``, with these parameters at least, is mapped to the file that defines it."""
    found: dict[str, str] = {}
    known = -1
    while known < len(found):  # a class may stand before the one that it is derived from
        known = len(found)
        for file, node in [(source.name, node) for source in sources for node in source.of(ast.ClassDef)]:
            bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
            own = [part for part in node.body if isinstance(part, Function) and has_body(part)]
            given = {part.name: parameters(part).keys() for part in own}
            fits = all(name in given and wanted <= given[name] for name, wanted in methods.items())
            if (fits or bases & found.keys()) and not bases & {"Protocol", "ABC"}:
                found[node.name] = file
    return found


def class_questions(sources: list[Source], classes: dict[str, str]) -> set[Place]:
    """Lines are collected that ask, outside of a class's own file, whether something is of that class."""
    found = set()
    for source in sources:
        asked = [(node, [node.cls]) for node in source.of(ast.MatchClass)]
        for node in source.of(ast.Call):
            if ast.unparse(node.func) in ("isinstance", "issubclass"):
                asked.append((node, node.args[1:]))
        for node in source.of(ast.Compare):
            if ast.unparse(node.left).startswith("type("):
                asked.append((node, node.comparators))
        for node, trees in asked:
            names = {ast.unparse(part).split(".")[-1] for tree in trees for part in ast.walk(tree)}
            if any(classes[name] != source.name for name in names & classes.keys()):
                found.add((source.name, node.lineno))
    return found


def is_method_name(node: ast.AST) -> bool:
    """A node is a method's name if it is a string that consists of `WORDS`."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return False
    words = set(node.value.replace("low_rank", "lowrank").split("_")) - {""}
    return bool(words) and words <= WORDS


def name_questions(sources: list[Source]) -> tuple[set[Place], set[Place]]:
    """Lines are collected that ask for a part of a method's name, and those that ask for a whole one."""
    parts, wholes = set(), set()
    for source in sources:
        for node in source.of(ast.Call):
            asks = isinstance(node.func, ast.Attribute) and node.func.attr in ("startswith", "endswith")
            if asks and any(is_method_name(part) for argument in node.args for part in ast.walk(argument)):
                parts.add((source.name, node.lineno))
        for node in source.of(ast.Compare):
            left, right = node.left, node.comparators[0]
            among = right.elts if isinstance(right, (ast.Tuple, ast.List, ast.Set)) else []
            is_membership = isinstance(node.ops[0], (ast.In, ast.NotIn))
            if is_membership and is_method_name(left):
                if isinstance(right, (ast.Name, ast.Attribute, ast.Subscript, ast.Call)):
                    parts.add((source.name, node.lineno))
            elif any(map(is_method_name, among if is_membership else (left, right))):
                wholes.add((source.name, node.lineno))
    return parts, wholes


def length(node: Any) -> int:
    """A definition is as long as its lines, without its decorators."""
    return int(node.end_lineno - node.lineno + 1)


def largest(sources: list[Source], kind: Any) -> str:
    """The longest definition of a kind is named, with its file and lines."""
    every = ((node, source.name) for source in sources for node in source.of(kind))
    node, file = max(every, key=lambda pair: length(pair[0]))
    return f"`{node.name}` in {file}, {length(node)} lines"


def density(sources: list[Source]) -> Iterator[Row]:
    """These rows say how much a line, a function and a class hold."""
    tokens = code = comments = 0
    for source in sources:
        documented = source.of(ast.Module, ast.ClassDef, Function)
        docstrings = {node.body[0].lineno for node in documented if ast.get_docstring(node) is not None}
        begun = set()
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            comments += token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
            is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings
            if token.type not in NO_CODE and not is_docstring:
                tokens += 1
                begun.add(token.start[0])
        code += len(begun)
    lines = [line for source in sources for line in source.text.removesuffix("\n").split("\n")]
    long = sum(len(line) > 100 for line in lines)
    functions = [node for source in sources for node in source.of(Function)]
    public = [node for node in functions if not node.name.startswith("_")]
    bare = sum(ast.get_docstring(node) is None for node in public)
    yield "Lines", f"{len(lines)}, {code} of them code"
    yield "Tokens a code line", f"{tokens / code:.2f}"
    for title, kinds in DENSE.items():
        count = 1000 * sum(1 for source in sources for _ in source.of(kinds))
        yield title, f"{count / code:.1f} in 1000 code lines, {count / len(lines):.1f} in 1000 lines of any kind"
    yield "Comments that fill a line", str(comments)
    yield "Lines over 100 characters", f"{long} ({long / len(lines):.0%})"
    yield "Median function", f"{statistics.median(map(length, functions)):g} lines, of {len(functions)} functions"
    yield "Public functions without a docstring", f"{bare} of {len(public)} ({bare / len(public):.0%})"
    yield "Longest function", largest(sources, Function)
    yield "Largest class", largest(sources, ast.ClassDef)


def gradient_ways(package: Path, sources: list[Source]) -> Iterator[Row]:
    """These rows say what one matrix passes through in its third update, between two refreshes of its basis.

    This part alone runs the package, and has to follow where names move.
    """
    sys.path.insert(0, str(package.parent))
    import torch

    from galore_pretrain.optim import RuleOptimizer
    from galore_pretrain.optim.build import build_rules
    from galore_pretrain.optim.execution import GlobalStep, Layerwise

    def calls_of(mode: Any, micro_batches: int, clip: float, dtype: torch.dtype) -> list[Any]:
        weight = torch.randn(48, 80).to(dtype).requires_grad_()
        rule, _ = build_rules("galore_adamw", "sound", rank=8, update_proj_gap=200)
        optimizer = RuleOptimizer([{"params": [weight], "rule": rule}], lr=1e-3)
        execution = mode(optimizer, clip, projected=True)
        calls = []

        def note(frame: Any, event: str, _: Any) -> None:
            if event == "call" and Path(frame.f_code.co_filename).is_relative_to(package):
                calls.append(frame.f_code)

        for number in (1, 2, 3):
            gradients = torch.randn(micro_batches, 48, 80).to(dtype)
            sys.setprofile(note if number == 3 else None)
            for micro_batch in range(micro_batches):
                execution.begin(micro_batch, micro_batches)
                torch.autograd.backward([weight], [gradients[micro_batch]])
            execution.complete()
            execution.outcome()
            sys.setprofile(None)
        return calls

    sizes = {}
    for source in sources:
        for node in source.of(Function):
            first = min(part.lineno for part in (node, *node.decorator_list))
            sizes[str(source.path), first] = (length(node), node.name)
    for title, *setting in (
        ("global, 1 micro-batch, fp32", GlobalStep, 1, 0.0, torch.float32),
        ("global, 1 micro-batch, bf16", GlobalStep, 1, 0.0, torch.bfloat16),
        ("layerwise, 1 micro-batch, fp32", Layerwise, 1, 0.0, torch.float32),
        ("layerwise, 2 micro-batches, fp32", Layerwise, 2, 0.0, torch.float32),
        ("layerwise, 2 micro-batches, clipped, bf16", Layerwise, 2, 1.0, torch.bfloat16),
    ):
        with patch.object(torch.cpu, "get_capabilities", dict):  # no fast bf16
            calls = calls_of(*setting)
        files = [call.co_filename for call in calls]
        changes = sum(a != b for a, b in itertools.pairwise(files))
        size, name = max(sizes.get((call.co_filename, call.co_firstlineno), (0, "")) for call in calls)
        value = f"{len(calls)} calls, {len(set(calls))} functions, {len(set(files))} files, {changes} changes of file"
        yield f"A gradient's way: {title}", f"{value}; longest `{name}`, {size} lines"


def config_rows(sources: list[Source]) -> Iterator[Row]:
    """These rows say who is handed the config, and how many of its fields each file reads by name."""
    functions, classes = Counter[str](), Counter[str]()
    fields: set[str] = set()
    read: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        for node in source.of(ast.ClassDef):
            annotated = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            members = {ast.unparse(part.target): ast.unparse(part.annotation) for part in annotated}
            fields |= members.keys() if node.name == "RunConfig" else set()
            classes[source.name] += "RunConfig" in members.get("config", "")
        for node in source.of(Function):
            functions[source.name] += "RunConfig" in parameters(node).get("config", "")
        for node in source.of(ast.Attribute):
            if ast.unparse(node.value).split(".")[-1] == "config":
                read[source.name].add(node.attr)
    files = len(+(functions + classes))
    yield "Handed the config", f"{functions.total()} functions, {classes.total()} classes, in {files} files"
    known = sorted(((len(names & fields), file) for file, names in read.items() if names & fields), reverse=True)
    yield f"Of its {len(fields)} fields, read in", ", ".join(f"{file} {number}" for number, file in known)


def main() -> None:
    """The table is printed, and then the places of the questions, if they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).parent.parent / "galore_pretrain"
    parser.add_argument("package", type=Path, nargs="?", default=beside, help="the package's folder")
    parser.add_argument("--list", action="store_true", help="say where each question stands")
    options = parser.parse_args()
    package = options.package.resolve()
    sources = [Source(path, path.relative_to(package).as_posix()) for path in sorted(package.rglob("*.py"))]
    rules = concrete_classes(sources, {"update": {"grad", "state", "step"}})
    stores = concrete_classes(sources, {"read": {"state"}, "write": {"state"}})
    parts, wholes = name_questions(sources)
    questions = {
        f"Questions for a rule's class ({', '.join(sorted(rules))})": class_questions(sources, rules),
        f"Questions for a store's class ({', '.join(sorted(stores))})": class_questions(sources, stores),
        "Questions for a part of a method's name": parts,
        "Questions for a method's whole name": wholes,
    }
    rows = [*layouts(package, sources), *((title, str(len(places))) for title, places in questions.items())]
    try:
        rows += gradient_ways(package, sources)
    except ImportError as error:  # the static counts are worth having while names move
        rows.append(("A gradient's way", f"not counted: {error}"))
    rows += [*config_rows(sources), *density(sources)]
    optim = [source for source in sources if source.name.startswith("optim/")]
    rows += [(f"In `optim/`: {title}", value) for title, value in density(optim)]
    print(f"| {package.name} | |\n|---|---|")
    for title, value in rows:
        print(f"| {title} | {value} |")
    for title, places in questions.items() if options.list else ():
        print(f"\n{title}:", *(f"  {file}:{line}" for file, line in sorted(places)), sep="\n")


if __name__ == "__main__":
    main()
