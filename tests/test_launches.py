"""How many operations an update dispatches on a GPU: each is a launch, for which a GPU waits where models are small."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def counting() -> Any:
    file = Path(__file__).parent.parent / "scripts" / "count_launches.py"
    place = spec_from_file_location("count_launches", file)
    assert place is not None
    assert place.loader is not None
    module = module_from_spec(place)
    place.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("model", "optim", "most"),
    [
        ("llama_60m", "galore_adamw", 350),
        ("llama_60m", "adamw", 350),
        ("llama_60m", "adamw8bit", 350),
        ("llama_60m", "natural_galore", 1500),
        ("llama_7b", "galore_adamw", 1500),
    ],
)
def test_an_update_takes_few_launches(counting: Any, model: str, optim: str, most: int) -> None:
    """No basis is due; one micro-batch, and the norm of all gradients is clipped."""
    values = {"model": model, "optim": optim}
    if model == "llama_7b":
        values |= {"activation_checkpointing": True, "batch_size": 1, "total_batch_size": 1}
    _, update = counting.of_update(values)
    assert update["adam_"] > 0
    assert update.total() <= most, update.most_common()


@pytest.mark.parametrize(
    ("optim", "weights", "most"),
    [("scale", "int8", 660), ("q_galore", None, 440), ("q_apollo_mini", None, 515), ("apollo", None, 565)],
)
def test_updates_of_codes_and_channels_take_few_launches(
    counting: Any, optim: str, weights: str | None, most: int, tmp_path: Path
) -> None:
    """Of a quarter of llama_7b's layers; 75 of them multiply a gradient by the clipping's coefficient.

    A launch more for each of seven matrices of a layer is 56 more.
    """
    architecture = json.loads((CONFIGS / "llama_7b.json").read_text())
    model = tmp_path / "llama_7b.json"
    model.write_text(json.dumps(architecture | {"num_hidden_layers": 8}))
    values: dict[str, Any] = {"model": str(model), "optim": optim, "activation_checkpointing": True}
    values |= {"batch_size": 1, "total_batch_size": 1}
    if weights:
        values["weights"] = weights
    _, update = counting.of_update(values)
    assert update.total() <= most, update.most_common()


def test_layerwise_updates_take_few_launches(counting: Any) -> None:
    values = {"model": "llama_60m", "optim": "galore_adamw8bit"}
    backward, update = counting.of_update(values)
    layerwise_backward, layerwise_update = counting.of_update(values | {"layerwise": True})
    more = layerwise_backward.total() + layerwise_update.total() - backward.total() - update.total()
    assert more <= 75  # a norm for each tensor, and not one for all


def test_summing_a_micro_batch_takes_few_launches(counting: Any) -> None:
    values = {"model": "llama_60m", "optim": "galore_adamw", "total_batch_size": 16}
    one, _ = counting.of_update(values | {"total_batch_size": 8})
    two, _ = counting.of_update(values, micro_batches=2)
    assert two["add_all_"] >= 1
    assert two.total() - 2 * one.total() <= 10, (two - one - one).most_common()


def test_dropout_takes_one_launch_a_layer(counting: Any) -> None:
    backward, _ = counting.of_update({"model": "llama_60m", "optim": "lora", "lora_dropout": 0.1})
    assert backward["dropout_mask"] == 8 * 7  # matrices
    assert not backward["random_"]


def test_the_loss_of_a_head_takes_one_launch(counting: Any) -> None:
    backward, _ = counting.of_update({"model": "llama_60m", "optim": "adamw"})
    assert backward["cross_entropy_"] == 1  # of 8 × 256 tokens
    assert not backward["_log_softmax"]
