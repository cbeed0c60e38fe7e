"""Who may import whom, and that the tables agree."""

import ast
import json
from pathlib import Path

import galore_pretrain
from galore_pretrain.config import RunConfig, shipped_models
from galore_pretrain.optim.names import METHODS
from galore_pretrain.recipes import recipe

PACKAGE = Path(galore_pretrain.__file__).parent
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
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


def test_optim_imports_nothing_else_of_the_project() -> None:
    for name, path in FILES.items():
        if name.startswith("optim"):
            ours = {i for i in imports(path) if i.startswith("galore_pretrain")}
            assert all(i.startswith("galore_pretrain.optim") for i in ours), name


def test_the_trainer_gets_its_parts_built() -> None:
    forbidden = (
        "galore_pretrain.optim",
        "galore_pretrain.data",
        "galore_pretrain.run",
        "galore_pretrain.checkpoint",
        "wandb",
        "datasets",
    )
    assert not [i for i in imports(FILES["trainer"]) if i.startswith(forbidden)]


def test_only_run_joins_and_only_cli_runs() -> None:
    for name, path in FILES.items():
        if name not in ("cli", "__main__"):
            assert "galore_pretrain.run" not in imports(path), name
        if name not in ("run", "build", "__init__") and not name.startswith("optim"):
            assert not {"galore_pretrain.optim", "galore_pretrain.trainer"} & imports(path), name


def test_heavy_libraries_have_one_place_and_are_lazy() -> None:
    homes = {"wandb": "metrics", "datasets": "sources", "bitsandbytes": "optim.moments", "matplotlib": "pictures"}
    for name, path in FILES.items():
        for library, home in homes.items():
            if any(i.split(".")[0] == library for i in imports(path)):
                assert name == home, f"{name} imports {library}"
            assert library not in {i.split(".")[0] for i in imports(path, top_level=True)}, f"{name} is not lazy"


def test_help_needs_no_torch() -> None:
    for name in ("cli", "config", "recipes", "errors", "hub", "sources", "tokenizer", "__init__"):
        assert not {"torch", "transformers"} & {i.split(".")[0] for i in imports(FILES[name], top_level=True)}, name


def test_recipes_name_rows_models_and_flags() -> None:
    table = json.loads((PACKAGE / "configs" / "recipes.json").read_text())
    flags = set(RunConfig.__dataclass_fields__) | {"source"}
    assert set(table["optimizers"]) == set(METHODS)
    assert set(table["models"]) == {*shipped_models(), "other"}
    for section in ("models", "optimizers", "cells"):
        for name, entry in table[section].items():
            assert entry["source"], name
            assert set(entry) <= flags, name
    assert recipe("llama_7b", "galore_adamw")["lr"] == (0.005, "GaLore scripts/benchmark_c4/llama_7b.sh")
    assert recipe("llama_60m", "galore_adamw")["rank"][0] == 128
