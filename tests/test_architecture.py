"""Who may import whom, and that the tables agree."""

import ast
import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import galore_pretrain
from galore_pretrain.config.options import FLAGS, shipped_models
from galore_pretrain.config.recipes import recipe

PACKAGE = Path(galore_pretrain.__file__).parent
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}

ROOMS: dict[str, str] = {  # a room, and what it may import
    "errors": "",
    "signals": "",
    "meters": "",
    "tensors": "",
    "optim": "tensors",
    "config": "errors optim text",
    "text": "errors",
    "model": "config errors optim tensors",
    "dist": "config errors",
    "train": "config dist errors meters model optim tensors text",
    "rundir": "config dist errors meters model optim tensors text train",
    "planning": "config dist errors meters model optim tensors train",
    "study": "config errors model optim planning signals",
    "run": "config dist errors meters model optim planning rundir signals tensors text train",
    "check": "config errors meters model optim planning rundir signals tensors text train",
    "pytest_plug": "",
    "trainers": "optim",
    "cli": "check config dist errors optim planning run rundir signals study text train",
    "__main__": "cli",
    "__init__": "model",
}
"""The package's rooms, a folder or a file of its top level each. A file of a room may import its own room too. Of
``optim``, others may import what `galore_pretrain.optim` names, but none of its files."""


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """The modules that a file imports, and the names that it imports from them; not those for types alone."""
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The same of this package alone, without its name."""
    return {name.removeprefix("galore_pretrain.") for name in imports(path) if name.startswith("galore_pretrain.")}


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_room_imports_what_it_may(file: str) -> None:
    room = file.partition(".")[0]
    assert room in ROOMS, f"{room} is a new room: say in ROOMS what it may import"
    for name in ours(FILES[file]):
        other = name.partition(".")[0]
        if other not in {Path(path).parts[0] for path in map(str, (f.replace(".", "/") for f in FILES))}:
            continue  # a name of the package itself, such as __version__
        assert other == room or other in ROOMS[room].split(), f"{file} imports {name}"
        if other == "optim" != room:
            assert name not in FILES, f"{file} imports {name}: only what galore_pretrain.optim names is for others"


def test_the_trainer_gets_its_parts_built() -> None:
    forbidden = ("galore_pretrain.optim", "galore_pretrain.text", "galore_pretrain.rundir", "wandb", "datasets")
    assert not [i for i in imports(FILES["train.trainer"]) if i.startswith(forbidden)]


def test_heavy_libraries_have_one_place_and_are_lazy() -> None:
    homes = {
        "wandb": "train.metrics",
        "datasets": "text.sources",
        "bitsandbytes": "optim.moments",
        "matplotlib": "study.pictures",
        "scipy": "train.scores",
        "sklearn": "train.scores",
    }
    for name, path in FILES.items():
        for library, home in homes.items():
            if any(i.split(".")[0] == library for i in imports(path)):
                assert name == home, f"{name} imports {library}"
            assert library not in {i.split(".")[0] for i in imports(path, top_level=True)}, f"{name} is not lazy"


def test_help_needs_no_torch() -> None:
    rooms = (
        "cli",
        "check.parts",
        "config",
        "errors",
        "optim.methods",
        "text.glue",
        "text.hub",
        "text.sources",
        "text.tables",
        "text.tokenizer",
        "study.sweep",
    )
    rooms += ("study.results", "study.paper", "__init__")
    for name in [file for file in FILES if file.startswith(rooms)]:
        assert not {"torch", "transformers"} & {i.split(".")[0] for i in imports(FILES[name], top_level=True)}, name


def test_nothing_asks_a_methods_name() -> None:
    """What a method is and can do is in its entry of the table of methods."""
    place = spec_from_file_location("structure", Path(__file__).parents[1] / "scripts" / "structure.py")
    assert place is not None
    assert place.loader is not None
    place.loader.exec_module(structure := module_from_spec(place))
    sources = [structure.Source(path, name) for name, path in FILES.items()]
    assert structure.name_questions(sources) == (set(), set())


def test_recipes_name_models_and_flags() -> None:
    table = json.loads((PACKAGE / "configs" / "recipes.json").read_text())
    flags = FLAGS.keys() | {"source"}
    assert set(table["models"]) == {*shipped_models(), "other"}
    for name, entry in table["models"].items():
        assert entry["source"], name
        assert set(entry) <= flags, name
    assert recipe("llama_7b", "galore_adamw")["lr"] == (0.005, "GaLore scripts/benchmark_c4/llama_7b.sh")
    assert recipe("llama_60m", "galore_adamw")["rank"][0] == 128
