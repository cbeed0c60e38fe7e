"""Shared fixtures: no network, no wandb, one tiny model."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers of one thread beat one of two, here and in subprocesses

import hypothesis
import pytest
import torch
from transformers import LlamaForCausalLM

from galore_pretrain import run as program
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import METHODS, own
from runs import known_peak, run
from warm import WarmHub

hypothesis.settings.register_profile("whatever the load", deadline=None)
hypothesis.settings.load_profile("whatever the load")

# Those run by Triton's interpreter, in a process that test_kernels.py starts with TRITON_INTERPRET=1.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

TINY = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first, so that no worker has one to do when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Who measures what the allocator gives out looks for garbage first: not among a million objects of libraries."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Some libraries count at the end what was not freed."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a model small enough for a test to train: square, tall and wide matrices, the sample's vocabulary."""
    path: Path = tmp_path_factory.mktemp("configs") / "llama_tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.fixture(autouse=True)
def own_methods_are_forgotten() -> Iterator[None]:
    """The table of methods is what it is when the program starts, whatever a test has loaded from outside.

    A file that was named from a test's working folder is another one in the next test's.
    """
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)
    for place in [place for place in own._modules if not Path(place).is_absolute()]:
        del own._modules[place]


@pytest.fixture(autouse=True, scope="session")
def runs_end_without_a_plan() -> Iterator[None]:
    """A run in this process plans its memory for its summary no more than one that `runs.run` forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "_planned_peak", known_peak)
        yield


@pytest.fixture(scope="session")
def build_tiny(tiny_config: str) -> Callable[..., LlamaForCausalLM]:
    """Builds that model: ``build_tiny(dtype=..., seed=...)``."""

    def build(**kwargs: Any) -> LlamaForCausalLM:
        return build_model(load_model_config(tiny_config), **({"dtype": torch.float32} | kwargs))

    return build


@pytest.fixture(scope="session")
def warm_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmHub]:
    """A hub for tests to fill, and processes that know its address."""
    with WarmHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub
        hub.stop()


@pytest.fixture(scope="session")
def finished(tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed. To be copied, not changed."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    result = run(tiny_config, output, planned=True)
    assert result.returncode == 0, result.stderr
    return output
