"""What makes a run fit the memory: found in the order of what it costs, planned, named, and taken where asked."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.resolve import left_out, resolve
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.planning import changes, choice, fit, layers
from galore_pretrain.planning.budget import budget_of
from galore_pretrain.planning.changes import changed, cheapest_change
from galore_pretrain.planning.choice import choose
from galore_pretrain.planning.fit import fitted, planned
from galore_pretrain.planning.layers import measure_by_layers, uncertain_bytes
from galore_pretrain.planning.plan import OUTSIDE, Outline, Plan, measure
from runs import lines, run

SHAPE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}


def model_of(folder: Path, layers: int) -> str:
    path = folder / f"llama_{layers}.json"
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 1024, "tie_word_embeddings": False}
    path.write_text(json.dumps(config | SHAPE | {"num_hidden_layers": layers}))
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_of(tmp_path_factory.mktemp("model"), 7)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_of(tmp_path_factory.mktemp("model"), 2)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_of(tmp_path_factory.mktemp("model"), 1)


@pytest.fixture(autouse=True, scope="module")
def planned_once() -> Iterator[None]:
    """What searches plan is planned once: they ask for the same plans again and again. Tests measure anew."""
    plans: dict[str, Plan] = {}

    def once(config: RunConfig, architecture: Any, *more: Any, **options: Any) -> Plan:
        key = f"{config} {architecture.to_json_string()}"
        if key not in plans:
            plans[key] = measure(config, architecture, *more, **options)
        return plans[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (choice, changes, fit, layers):
            patch.setattr(module, "measure", once)
        yield


def config_for(model: str, row: str, **given: Any) -> RunConfig:
    flags = {"model": model, "optim": row, "rank": 8, "steps": 100, "max_length": 64, "device": "cpu"} | given
    unused = left_out(row)
    config, _ = resolve({name: value for name, value in flags.items() if name not in unused}, {})
    return config


@pytest.mark.parametrize(
    ("row", "given"),
    [
        ("scale", {"total_batch_size": 4, "batch_size": 4, "layerwise": True, "activation_checkpointing": True}),
        ("q_galore", {"total_batch_size": 16, "batch_size": 4, "layerwise": True, "activation_checkpointing": True}),
        ("fira", {"total_batch_size": 8, "batch_size": 2, "grad_clip": 1.0, "activation_checkpointing": True}),
        (
            "natural_galore",
            {"total_batch_size": 8, "batch_size": 1, "refresh": "together", "activation_checkpointing": True},
        ),
        ("muon", {"total_batch_size": 2, "batch_size": 1}),
        ("galore_adamw8bit", {"total_batch_size": 8, "batch_size": 2, "device": "cuda", "accumulate_on": "host"}),
        ("relora", {"total_batch_size": 2, "batch_size": 1, "activation_checkpointing": True}),
    ],
)
def test_three_layers_and_four_tell_of_all(row: str, given: dict[str, Any], small: str) -> None:
    checkpointed = {"device": "cuda", "activation_checkpointing": True, "layerwise": True}
    config = config_for(small, row, **given | checkpointed)
    architecture = load_model_config(small)
    outline = Outline.of(config, architecture)
    whole, extended = measure(config, architecture, outline=outline), measure_by_layers(config, architecture, outline)
    assert abs(extended.peak_bytes - whole.peak_bytes) <= uncertain_bytes(config, outline)
    assert extended.host_bytes == pytest.approx(whole.host_bytes, abs=uncertain_bytes(config, outline))
    is_exact = row in ("scale", "relora", "muon") or given.get("refresh") == "together"
    assert (uncertain_bytes(config, outline) == 0) == is_exact
    assert sum(extended.parts.values()) == extended.peak_bytes


def least(config: RunConfig) -> int:
    """The least peak that any execution of a run has."""
    peak = 2**62
    plan = choose(config, 1).plan
    while plan is not None and plan.peak_bytes < peak:
        peak = plan.peak_bytes
        plan = choose(config, peak - 1).plan
    return peak


FOUND: dict[tuple[str, float, int, bool | None], str] = {
    ("adamw", 0.9, 1, None): "--moment-store 8bit",
    ("galore_adamw", 0.8, 4, False): "--layerwise --moment-store 8bit",
    ("scale", 0.9, 4, False): "--total-batch-size 1",
    ("fira", 0.95, 1, None): "--moment-store 8bit",
    ("lora", 0.8, 1, False): "--moment-store 8bit --rank 2",
}
"""What helps each example below, by its arguments."""


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("FUZZ", "1")),
    deadline=None,
    phases=[Phase.explicit, *[Phase.generate] * ("FUZZ" in os.environ)],
)
@given(
    row=st.sampled_from(["adamw", "galore_adamw", "scale", "fira", "lora"]),
    share=st.floats(0.5, 0.99),
    total=st.sampled_from([1, 4, 16]),
    layerwise=st.sampled_from([None, False]),
)
@example(row="adamw", share=0.9, total=1, layerwise=None)
@example(row="galore_adamw", share=0.8, total=4, layerwise=False)
@example(row="scale", share=0.9, total=4, layerwise=False)
@example(row="fira", share=0.95, total=1, layerwise=None)
@example(row="lora", share=0.8, total=1, layerwise=False)
def test_what_is_said_to_fit_fits(row: str, share: float, total: int, layerwise: bool | None, single: str) -> None:
    """Of each row once; with FUZZ=20, of twenty random ones too.

    All is in fp32. In bf16, a CPU's table of random bits is larger than all that can be saved of so small a model.
    """
    flags = {"total_batch_size": total} | ({} if layerwise is None else {"layerwise": layerwise})
    config = config_for(single, row, dtype="float32", **flags)
    budget = int(share * least(config))
    change = cheapest_change(config, budget)
    expected = FOUND.get((row, share, total, layerwise))
    if change is None:
        assert expected is None
        return
    assert expected in (change.words(), None)
    assert change.plan.peak_bytes <= budget
    assert measure(change.plan.config, load_model_config(single)).peak_bytes == change.plan.peak_bytes
    for name, value in change.flags.items():
        assert getattr(change.plan.config, name) == value
    taken = planned(replace(config, fit="anything"), budget)
    assert taken.plan.fits(budget)
    assert {name for name, _, _ in taken.plan.config.taken} == change.flags.keys()


@pytest.mark.slow
def test_what_costs_the_result_least_comes_first(shallow: str) -> None:
    config = config_for(shallow, "galore_adamw", total_batch_size=2, batch_size=2, activation_checkpointing=False)
    first = cheapest_change(config, least(config) - 1)
    assert first is not None
    assert first.words() == "--batch-size 1"  # which changes nothing but the order of roundings
    open_config = config_for(shallow, "galore_adamw", total_batch_size=2)
    second = cheapest_change(open_config, least(open_config) - 1)
    assert second is not None
    assert second.words() == "--moment-store 8bit"  # and not one micro-batch an update
    eighth = config_for(shallow, "galore_adamw", total_batch_size=2, moment_store="8bit", weights="int8", bases="int4")
    third = cheapest_change(eighth, least(eighth) - 1)
    assert third is not None
    assert third.words() == "--rank 6"


def test_a_change_that_does_not_go_with_the_rest_is_none(shallow: str) -> None:
    reference = config_for(shallow, "galore_adamw", total_batch_size=4, numerics="reference")
    assert changed(reference, {"weights": "int8"}) is None
    assert cheapest_change(reference, 1000) is None


@pytest.mark.slow
def test_7b_of_rank_1024_is_told_of_rank_768_on_a_card_of_12_gb() -> None:
    flags = {"model": "llama_7b", "optim": "q_galore", "rank": 1024, "total_batch_size": 1, "device": "cuda"}
    config, _ = resolve(flags | {"memory_budget": 12 * 10**9}, {})
    change = cheapest_change(config, budget_of(config))
    assert change is not None
    assert change.told() == "--rank 768: 10.03 GiB planned"


@pytest.mark.slow
def test_a_run_takes_the_change_says_so_and_goes_on_with_it(tiny_config: str, tmp_path: Path) -> None:
    flags = {"model": tiny_config, "optim": "galore_adamw", "rank": 4, "max_length": 48, "dtype": "float32"}
    flags |= {"steps": 12, "total_batch_size": 4, "update_proj_gap": 5}
    flags |= {"layerwise": True, "activation_checkpointing": True, "batch_size": 1}
    config, _ = resolve(flags, {})
    budget = OUTSIDE + least(config) - 1
    asked, _ = resolve(flags | {"memory_budget": budget}, {})
    words = r"what helps: --moment-store 8bit: 0.00 GiB planned \(--fit anything takes it\)"
    with pytest.raises(InputError, match=words):
        fitted(asked, Outline.of(asked, load_model_config(tiny_config)), runs_as_before=False)

    output = tmp_path / "taken"
    execution = ("--layerwise", "--activation-checkpointing", "--batch-size", "1")
    taken = run(tiny_config, output, *execution, "--memory-budget", str(budget), "--fit", "anything")
    assert taken.returncode == 0, taken.stderr
    assert "--fit anything takes --moment-store 8bit (asked for: None)" in taken.stderr
    values = json.loads((output / "config.json").read_text())["config"]
    assert values["moment_store"] == {"value": "8bit", "origin": "fit"}
    assert values["rank"] == {"value": 4, "origin": "flag"}
    summary = json.loads((output / "summary.json").read_text())
    assert summary["planned_peak_bytes"] < least(config)

    whole = lines(output)
    shutil.rmtree(output / "checkpoints" / "step_00000012")
    (output / "summary.json").unlink()
    again = run(tiny_config, output, *execution, "--fit", "anything")  # with all of the machine's memory
    assert again.returncode == 0, again.stderr
    assert "--fit anything took moment_store 8bit, as before" in again.stderr
    assert [line["loss"] for line in lines(output)] == [line["loss"] for line in whole]
    assert json.loads((output / "config.json").read_text())["config"]["moment_store"]["origin"] == "fit"
    (output / "summary.json").unlink()
    shutil.rmtree(output / "checkpoints" / "step_00000012")
    other = run(tiny_config, output, *execution)  # as asked: that is not what the folder holds
    assert other.returncode == 2
    assert "made with other options" in other.stderr
