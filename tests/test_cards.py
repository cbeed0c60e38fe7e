"""Which method for a card: what the table says to fit, fits, and it says what is left out and why."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import LlamaConfig

from galore_pretrain.cli import cli
from galore_pretrain.config.resolve import left_out, resolve
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim.methods import METHODS
from galore_pretrain.planning.budget import budgets_of_cards
from galore_pretrain.planning.largest import LEAST_ROWS, Guide, Largest, executed, largest_updates
from galore_pretrain.planning.plan import measure
from galore_pretrain.study import cards
from galore_pretrain.study.cards import Row
from pretrained import LLAMA3_ROPE, SMALL


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "llama_60m.json"  # by its name one of the paper's tables
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 1024, "tie_word_embeddings": False}
    shape = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    path.write_text(json.dumps(config | shape | {"num_hidden_layers": 2}))
    return str(path)


def largest(model: str, budget: int, row: str, **given: Any) -> Largest:
    flags = {"model": model, "optim": row, "rank": 8, "max_length": 64, "device": "cuda", "total_batch_size": 8}
    unused = left_out(row)
    config, _ = resolve({name: value for name, value in (flags | given).items() if name not in unused}, {})
    return largest_updates(config, budget, load_model_config(model), Guide())


@pytest.mark.parametrize("row", ["scale", "galore_adamw8bit"])
def test_the_largest_updates_fit_and_larger_ones_do_not(row: str, small: str) -> None:
    architecture = load_model_config(small)
    budget = 6 * 2**20
    found = largest(small, budget, row)
    assert found.fits
    for plan in (found.least, found.at_once, found.on_device, found.on_host):
        if plan is not None:
            assert measure(plan.config, architecture).peak_bytes <= budget
    assert found.at_once is not None
    size = found.at_once.config.batch_size
    assert found.at_once.config.total_batch_size == size >= LEAST_ROWS
    more = executed(replace(found.at_once.config, undecided=frozenset()), size + 1, size + 1)
    assert more is not None
    assert measure(more, architecture).peak_bytes > budget
    assert found.on_device is not None
    assert found.on_device.config.total_batch_size == 8
    assert found.on_device.config.batch_size == 4  # one micro-batch of all 8 sums nothing


def test_what_a_flag_says_stays(small: str) -> None:
    found = largest(small, 24 * 2**20, "scale", layerwise=False, activation_checkpointing=False)
    assert found.least is not None
    assert (found.least.config.layerwise, found.least.config.activation_checkpointing) == (False, False)


def test_few_rows_are_not_said_to_fit(small: str) -> None:
    peaks = {rows: measure(config, load_model_config(small)).peak_bytes for rows, config in at_once(small).items()}
    found = largest(small, peaks[LEAST_ROWS] - 1, "scale", total_batch_size=1)
    assert not found.fits
    assert found.at_once is not None
    assert found.at_once.config.batch_size == LEAST_ROWS - 1
    assert largest(small, peaks[LEAST_ROWS], "scale", total_batch_size=1).fits
    nothing = largest(small, 1000, "scale")
    assert not nothing.fits
    assert nothing.at_least > 1000


def at_once(model: str) -> dict[int, Any]:
    flags = {"model": model, "optim": "scale", "max_length": 64, "device": "cuda", "total_batch_size": 1}
    config, _ = resolve(flags, {})
    return {rows: executed(config, rows, rows) for rows in (1, LEAST_ROWS)}


def test_the_table_from_the_command_line(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["plan", "--model", small, "--optim", "all", "--rank", "128", "--max-length", "64", "--steps", "100"]
    words += ["--total-batch-size", "1", "--device", "cuda", "--memory-budget", "1.607GB"]
    picture = tmp_path / "cards.png"
    monkeypatch.setattr(cards, "METHODS", {name: METHODS[name] for name in ("galore_adamw", "scale")})
    text = (
        CliRunner()
        .invoke(cli, [*words, "--weights", "dense", "--picture", str(picture)], catch_exceptions=False)
        .stdout
    )
    assert "llama_60m in 0.01 GiB (--memory-budget 1.50 GiB" in text
    assert "| `galore_adamw --rank 128` | bfloat16 |" in text
    assert "Table 2" not in text  # a file of one's own, whatever its name
    assert "| `scale` | bfloat16 |" in text  # which has no rank
    assert picture.read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(cards, "METHODS", {"adamw": METHODS["adamw"]})
    words[words.index("--device") : words.index("--memory-budget")] = ["--time", "4090"]
    answer = json.loads(CliRunner().invoke(cli, [*words, "--json"], catch_exceptions=False).stdout)
    int8, dense = answer["rows"]
    assert (int8["weights"], dense["weights"]) == ("int8", "bfloat16")
    assert int8["peak_bytes"] < dense["peak_bytes"] < answer["budget_bytes"]
    assert dense["tokens_per_update"] == dense["tokens_at_once"] >= 16 * 64
    least, most = dense["days"]
    assert 0 < least < most


def test_the_table_of_a_model_of_which_the_config_alone_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name may have a dot. A card of 8 GB is one of those that a budget names."""
    folder = tmp_path / "Llama-3.2-1B"
    LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE).save_pretrained(
        folder
    )
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    monkeypatch.setattr(cards, "METHODS", {"scale": METHODS["scale"]})
    words = ["plan", "--init", str(folder), "--optim", "all", "--weights", "dense", "--lr", "1e-4", "--steps", "100"]
    words += ["--max-length", "16", "--total-batch-size", "1", "--device", "cuda", "--memory-budget", "8GB"]
    text = CliRunner().invoke(cli, words, catch_exceptions=False).stdout
    assert "Llama-3.2-1B in 6.27 GiB (a card of 8 GB shows 7.76 GiB, less 1.49 for what is no tensor)" in text
    assert re.search(r"\| `scale` \| bfloat16 \| 0.00 \| 512 × 16 or more \|", text), text


def test_what_was_published_is_of_the_same_model_rank_and_weights() -> None:
    def published(**given: Any) -> float | None:
        config, _ = resolve({"model": "llama_7b", "optim": "galore_adamw8bit"} | given, {})
        cell = Row(config, Largest(0), None).published()
        return None if cell is None else cell.perplexity

    assert published() == 14.65
    assert published(rank=512) is None
    assert published(weights="int8") is None
    assert published(model="llama_60m", optim="galore_adamw") == 34.88
    assert published(model="llama_3b") is None


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--batch-size", "4"), "finds the largest micro-batch"),
        (("--accumulate-on", "host"), "has both places"),
        (("--fit", "anything"), "is of what fits"),
        (("--compare", "scale"), "has all rows"),
        (("--gpus-per-node", "2"), "of one process"),
        (("--flops", "100T"), "give --time"),
    ],
)
def test_the_table_refuses_what_it_finds_out_itself(flags: tuple[str, ...], why: str) -> None:
    words = ["plan", "--model", "llama_60m", "--optim", "all", *flags]
    with pytest.raises(InputError, match=why):
        CliRunner().invoke(cli, words, standalone_mode=False, catch_exceptions=False)


def test_only_a_plan_is_of_all() -> None:
    with pytest.raises(InputError, match="only plan makes a table of all methods"):
        resolve({"model": "llama_60m", "optim": "all"}, {})


def test_budgets_of_cards_are_those_that_a_plan_has() -> None:
    in_gib = {name: round(budget / 2**30, 2) for name, budget in budgets_of_cards().items()}
    assert in_gib == {"8 GB": 6.27, "10 GB": 8.29, "12 GB": 10.27, "16 GB": 14.21, "24 GB": 22.15}


def test_a_picture_has_ten_bars_at_most(small: str) -> None:
    found = largest(small, 6 * 2**20, "scale", total_batch_size=1)
    config, _ = resolve({"model": small, "optim": "scale", "total_batch_size": 4}, {})
    rows = [Row(replace(config, optim=f"method{number}"), found, None) for number in range(25)]
    shown = list(cards.bars(rows))
    assert len(shown) == 10
    assert [shown[0], shown[-1]] == ["method0\nbfloat16 weights", "method24\nbfloat16 weights"]
