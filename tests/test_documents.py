"""`--documents separate`: packed documents are what each of them is by itself, in the model, in rows and in runs."""

import itertools
import json
import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from conftest import TINY
from galore_pretrain.check import documents as check
from galore_pretrain.check.part import Part, Settings
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.model.documents import document_mask, mask_bytes
from galore_pretrain.model.families import CausalLM
from galore_pretrain.model.head import mean_loss, token_losses
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.planning.choice import lower_bound, upper_bound
from galore_pretrain.planning.plan import measure, static_bytes
from galore_pretrain.planning.work import EVALUATION, FORWARD, count_work
from galore_pretrain.text.batches import TokenRows, TrainingData, stack, validation_rows
from galore_pretrain.text.sources import in_turn, open_source
from galore_pretrain.train.inputs import check_length
from pretrained import transformers_loss
from runs import COMMAND_LINE, KILLED, TRACED, command, lines, python, run
from test_data import Letters, Lists
from test_dist import case, compare, run_all
from test_plan import config_for, real_peak

FULL = bool(os.environ.get("FULL"))
LENGTH = 40
STARTS = ((0, 1, 17, 33), (0,), (0, 20))
"""Where the documents of three rows begin; the first one is a token alone."""
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 48},
    "Qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True},
}
SEPARATE = ("--layout", "pack", "--documents", "separate")


def places_of(starts: Sequence[Sequence[int]], length: int = LENGTH) -> Tensor:
    rows = []
    for row in starts:
        ends = (*row[1:], length)
        rows.append([place for a, b in zip(row, ends, strict=True) for place in range(b - a)])
    return torch.tensor(rows)


def model_of(family: str, **more: Any) -> CausalLM:
    """Its weights are larger than those that a run begins with: what a token attends to decides what follows."""
    values = TINY | {"initializer_range": 0.3} | FAMILIES[family] | more
    return build_model(getattr(transformers, f"{family}Config")(**values), dtype=torch.float32, seed=1)


def tokens_of(starts: Sequence[Sequence[int]], length: int = LENGTH) -> Tensor:
    return torch.randint(0, TINY["vocab_size"], (len(starts), length + 1), generator=torch.Generator().manual_seed(2))


def gradients(model: CausalLM, pieces: Sequence[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """Of all pieces together: tokens with the one that follows, and places."""
    model.zero_grad()
    for tokens, places in pieces:
        mean_loss(model, tokens[:, :-1], tokens[:, 1:], 100, places).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def one_by_one(tokens: Tensor, starts: Sequence[Sequence[int]]) -> list[tuple[Tensor, None]]:
    pieces = []
    for row, begins in zip(tokens, starts, strict=True):
        ends = (*begins[1:], tokens.shape[1] - 1)
        pieces += [(row[None, a : b + 1], None) for a, b in zip(begins, ends, strict=True)]
    return pieces


def off(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_a_time", [512, 2])
def test_the_mask_is_what_it_says(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galore_pretrain.model.documents._LINES", at_a_time)
    places = torch.tensor([[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]])
    mask = document_mask(places, torch.bfloat16)
    assert (mask.shape, mask.dtype, mask.nbytes) == ((2, 1, 5, 5), torch.bfloat16, mask_bytes(2, 5, torch.bfloat16))
    seen = [[0], [0, 1], [2], [3], [3, 4]]
    for token, attended in enumerate(seen):
        line = mask[0, 0, token]
        assert line.isneginf().nonzero().flatten().tolist() == [i for i in range(5) if i not in attended]
        assert (line[attended] == 0).all()
    assert torch.equal(mask[1, 0] == 0, torch.ones(5, 5).tril().bool())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_is_what_it_is_by_itself(family: str, checkpointing: bool) -> None:
    """Losses and gradients in fp32; and where documents see each other, both are others."""
    model = model_of(family)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    tokens, places = tokens_of(STARTS), places_of(STARTS)
    alone = gradients(model, one_by_one(tokens, STARTS))
    assert off(gradients(model, [(tokens, places)]), alone) < 1e-5
    assert off(gradients(model, [(tokens, None)]), alone) > 0.1
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    pieces = one_by_one(tokens, STARTS)
    expected = [token_losses(model, piece[:, :-1], piece[:, 1:]).flatten() for piece, _ in pieces]
    losses = token_losses(model, inputs, labels, places)
    torch.testing.assert_close(losses.flatten(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert (token_losses(model, inputs, labels) - losses)[0, 17:].abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_sees_what_follows_or_another_document(family: str) -> None:
    model, tokens, places = model_of(family), tokens_of(STARTS), places_of(STARTS)
    labels = tokens[:, 1:]
    before = token_losses(model, tokens[:, :-1], labels, places)
    for row, token in ((0, 0), (0, 5), (0, 20), (1, 39), (2, 19), (2, 20)):
        changed = tokens[:, :-1].clone()
        changed[row, token] = (changed[row, token] + 1) % TINY["vocab_size"]
        moved = (token_losses(model, changed, labels, places) - before).abs() > 1e-5
        end = min([start for start in STARTS[row] if start > token], default=LENGTH)
        assert moved.nonzero().tolist(), (row, token)
        assert {(r, token <= t < end) for r, t in moved.nonzero().tolist()} == {(row, True)}


def shifted(places: Tensor, dtype: torch.dtype) -> Tensor:
    """Documents that begin a token late."""
    return document_mask(places.roll(1, 1).clamp(max=torch.arange(places.shape[1])), dtype)


def of_the_first_row(places: Tensor, dtype: torch.dtype) -> Tensor:
    return document_mask(places[:1].expand_as(places), dtype)


def causal_alone(places: Tensor, dtype: torch.dtype) -> Tensor:
    return document_mask(torch.arange(places.shape[1]).expand_as(places), dtype)


def not_causal(places: Tensor, dtype: torch.dtype) -> Tensor:
    mask = document_mask(places, dtype)
    return torch.maximum(mask, mask.mT)


FAULTS = [shifted, of_the_first_row, causal_alone, not_causal]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_mask_is_found(
    fault: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tests above, and by the part of `galore-pretrain check`, which finds nothing without one."""
    part = Part(Settings("cpu", "sample", "sample", str(tmp_path)), tmp_path / "found.jsonl", 60)
    check.documents(part)
    assert len(part.found.checks) == 6
    assert all(entry.ok for entry in part.found.checks), part.found.checks
    monkeypatch.setattr("galore_pretrain.model.head.document_mask", fault)
    tokens = tokens_of(STARTS)
    model = model_of("Llama")
    alone = gradients(model, one_by_one(tokens, STARTS))
    assert off(gradients(model, [(tokens, places_of(STARTS))]), alone) > 1e-2
    check.documents(part)
    wrong = [entry.name for entry in part.found.checks if not entry.ok]
    for dtype in ("float32", "bfloat16"):
        assert f"{dtype}: gradients of packed documents, from each by itself" in wrong


# -- rows -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc\x01", max_size=25), max_size=25), st.integers(2, 9))
def test_rows_say_where_documents_begin(documents: list[str], length: int) -> None:
    """Rows are those of joined documents. A document may spell the end marker (1), and ends nowhere by that."""
    documents = [*documents, "xyxyxyxyxy"]
    expected, begins = [], []
    for text in documents:
        if text:
            begins.append(len(expected))
            expected += [*map(ord, text), 1]
    joined = validation_rows(Lists([documents]), TokenRows(Letters(), "pack", length), 10**6)
    rows = validation_rows(Lists([documents]), TokenRows(Letters(), "pack", length, separate=True), 10**6)
    for i, (row, as_joined) in enumerate(zip(rows, joined, strict=True)):
        assert row.input_ids.tolist() == as_joined.input_ids.tolist()
        assert row.labels.tolist() == as_joined.labels.tolist()
        assert (row.after, row.offset, as_joined.starts) == (as_joined.after, as_joined.offset, None)
        first = i * length
        inside = {begin - first for begin in begins if first <= begin < first + length}
        assert row.starts is not None
        assert row.starts.tolist() == sorted(inside | {0})
    places = stack(rows).places
    assert places is not None
    assert (places.dtype, places.shape) == (torch.int64, (len(rows), length))
    assert torch.equal(places, places_of([row.starts.tolist() for row in rows if row.starts is not None], length))
    assert stack(joined).places is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("abc", max_size=40), min_size=3, max_size=30), st.integers(2, 17), st.data())
def test_rows_go_on_anywhere(documents: list[str], length: int, data: st.DataObject) -> None:
    def stream(size: int = 1, rank: int = 0) -> TrainingData:
        rows = TokenRows(Letters(), "pack", length, separate=True)
        return TrainingData(Lists([[*documents, "abcabc"]]), rows, 4, 3, rank=rank, size=size)

    whole = list(islice(stream(), 12))
    cut = data.draw(st.integers(0, 10))
    again = stream()
    again.load_state_dict(json.loads(json.dumps(whole[cut].state)))
    halves = [list(islice(stream(2, rank), 12)) for rank in range(2)]
    for i, batch in enumerate(whole):
        assert batch.places is not None
        both = [half[i].places for half in halves]
        assert torch.equal(torch.cat([places for places in both if places is not None]), batch.places)
    for batch, other in zip(whole[cut + 1 :], again, strict=False):
        assert batch.places is not None
        assert other.places is not None
        assert torch.equal(batch.places, other.places)


# -- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "layerwise", "checkpointing", "size", "dtype"),
    [
        ("galore_adamw", True, True, 1, "bfloat16"),
        ("galore_adamw", False, False, 4, "float32"),
        ("adamw", True, False, 2, "float32"),
        ("scale", False, True, 4, "bfloat16"),
    ],
)
def test_the_plan_has_the_mask(
    row: str, layerwise: bool, checkpointing: bool, size: int, dtype: str, tmp_path: Path
) -> None:
    """Within 3 % of the allocator, of rows so long that the mask weighs; and the quick bounds hold."""
    values = TINY | {"max_position_embeddings": 512, "num_key_value_heads": 2}
    model = tmp_path / "long.json"
    model.write_text(json.dumps(values))
    given = {"layerwise": layerwise, "activation_checkpointing": checkpointing, "batch_size": size, "dtype": dtype}
    config = config_for(str(model), row, max_length=512, layout="pack", documents="separate", grad_clip=0.0, **given)
    architecture = load_model_config(str(model))
    planned, static = measure(config, architecture), static_bytes(config, architecture)
    assert planned.peak_bytes == pytest.approx(real_peak(config), rel=0.03)
    assert lower_bound(config, architecture, static) <= planned.peak_bytes <= upper_bound(config, architecture, static)
    joined = config_for(str(model), row, max_length=512, layout="pack", grad_clip=0.0, **given)
    in_last_layer = [
        sum(plan.highs["forward of layer 1"].values()) for plan in (planned, measure(joined, architecture))
    ]
    assert in_last_layer[0] - in_last_layer[1] >= mask_bytes(size, 512, getattr(torch, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("documents", ["joined", "separate"])
@pytest.mark.parametrize("length", [2048, 4096, *[8192] * FULL])
def test_the_plan_of_long_rows_is_what_the_allocator_says(documents: str, length: int, tmp_path: Path) -> None:
    values = TINY | {"max_position_embeddings": length}
    model = tmp_path / "long.json"
    model.write_text(json.dumps(values))
    config = config_for(
        str(model), "galore_adamw", max_length=length, layout="pack", documents=documents, dtype="bfloat16",
        layerwise=True, activation_checkpointing=True, batch_size=1, total_batch_size=1, grad_clip=0.0,
    )  # fmt: skip
    planned = measure(config, load_model_config(str(model)))
    assert planned.peak_bytes == pytest.approx(real_peak(config), rel=0.03)


def test_the_plan_of_a_card_has_the_scores_that_deterministic_attention_keeps(tmp_path: Path) -> None:
    """With a mask, or in fp32, no kernel of a GPU is deterministic but plain products."""
    model = tmp_path / "long.json"
    model.write_text(json.dumps(TINY | {"max_position_embeddings": 512}))
    peaks = {}
    for documents, dtype, deterministic in itertools.product(
        ("joined", "separate"), ("bfloat16", "float32"), (False, True)
    ):
        config = config_for(
            str(model), "adamw", max_length=512, layout="pack", documents=documents, batch_size=4, device="cuda",
            dtype=dtype, deterministic=deterministic, memory_budget=24 * 2**30,
        )  # fmt: skip
        architecture = load_model_config(str(model))
        peaks[documents, dtype, deterministic] = measure(config, architecture).peak_bytes
        bound = upper_bound(config, architecture, static_bytes(config, architecture))
        assert peaks[documents, dtype, deterministic] <= bound
    scores = TINY["num_hidden_layers"] * mask_bytes(4 * TINY["num_attention_heads"], 512, torch.bfloat16)
    for documents, dtype in itertools.product(("joined", "separate"), ("bfloat16", "float32")):
        more = peaks[documents, dtype, True] - peaks[documents, dtype, False]
        if (documents, dtype) == ("joined", "bfloat16"):
            assert more == 0
        else:
            assert more > scores


def test_a_cards_time_counts_the_mask(tmp_path: Path) -> None:
    """It is read once for each head of each layer."""
    model = tmp_path / "long.json"
    model.write_text(json.dumps(TINY | {"max_position_embeddings": 512}))
    moved = []
    for documents in ("joined", "separate"):
        config = config_for(
            str(model), "adamw", max_length=512, layout="pack", documents=documents, batch_size=2, total_batch_size=4,
            device="cuda", memory_budget=24 * 2**30, layerwise=False, activation_checkpointing=False, dtype="bfloat16",
        )  # fmt: skip
        work = count_work(config)
        moved.append([work[part].product_bytes for part in (FORWARD, EVALUATION)])
    layers, heads = TINY["num_hidden_layers"], TINY["num_attention_heads"]
    mask = mask_bytes(2, 512, torch.bfloat16)
    more = [separate - joined for joined, separate in zip(*moved, strict=True)]
    assert more == [2 * layers * heads * mask, layers * heads * mask]


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def short_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags of a run whose text is the sample's sentences: several to a row."""
    file = tmp_path_factory.mktemp("texts") / "sentences.jsonl"
    sentences = [part for _, _, text in in_turn(open_source("sample", "train")) for part in text.split(". ")]
    file.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences[:2000]))
    return ("--data", str(file), "--tokenizer", "sample", "--layout", "pack")


def test_a_killed_run_goes_on_bit_for_bit(tiny_config: str, short_texts: tuple[str, ...], tmp_path: Path) -> None:
    """And its documents are apart: joined ones have other losses, and the same tokens."""
    whole, killed, joined = (tmp_path / name for name in ("whole", "killed", "joined"))
    flags = (*short_texts, "--batch-size", "2")
    apart = ("--documents", "separate")
    for output, more in ((whole, apart), (joined, ())):
        done = run(tiny_config, output, *flags, *more)
        assert done.returncode == 0, done.stderr
    died = python(KILLED, *command(tiny_config, killed, *flags, *apart)[3:])
    assert died.returncode == -9, died.stderr
    refused = run(tiny_config, killed, *flags)
    assert refused.returncode == 2
    assert "--documents joined (was separate)" in refused.stderr
    done = run(tiny_config, killed, *flags, *apart)
    assert done.returncode == 0, done.stderr
    assert "at update 4" in done.stderr
    assert lines(killed) == lines(whole)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    pairs = list(zip(lines(whole), lines(joined), strict=True))
    assert all(one["tokens_seen"] == other["tokens_seen"] for one, other in pairs)
    assert all(one["loss"] != other["loss"] for one, other in pairs)


def test_a_run_of_before_was_joined() -> None:
    """Its checkpoint says nothing of documents: it goes on as it was, and no other way."""
    values = {"model": "llama_1m", "optim": "adamw", "data": "sample", "steps": 10, "layout": "pack"}
    config, _ = resolve(values, {})
    saved = config.values()
    assert saved.pop("documents") == "joined"
    assert config.differences(saved) == []
    separate, _ = resolve(values | {"documents": "separate", "output": config.output}, {})
    assert separate.differences(saved) == ["--documents separate (was joined)"]


def test_a_run_is_evaluated_as_it_was_trained(tiny_config: str, tmp_path: Path) -> None:
    """By its checkpoint and by what it exports; a row of the latter is what transformers makes of each document."""
    output = tmp_path / "run"
    done = run(tiny_config, output, *SEPARATE)
    assert done.returncode == 0, done.stderr
    last = json.loads((output / "summary.json").read_text())["eval_loss"]

    def evaluated(place: Path, *flags: str) -> float:
        told = python(COMMAND_LINE, "eval", str(place), "--json", *flags)
        assert told.returncode == 0, told.stderr
        return float(json.loads(told.stdout)["eval_loss"])

    rows = ("--max-length", "48", "--eval-tokens", "2000")
    assert evaluated(output) == pytest.approx(last, rel=1e-6)
    assert evaluated(output / "model", *SEPARATE, *rows, "--data", "sample") == pytest.approx(last, rel=1e-6)
    joined = evaluated(output, "--documents", "joined")
    assert joined != pytest.approx(last, rel=1e-5)
    assert evaluated(output, "--layout", "pad") == pytest.approx(transformers_loss(output / "model"), rel=1e-5)
    told = python(COMMAND_LINE, "eval", str(output))
    assert "--layout pack --max-length 48 --documents separate: loss" in told.stdout
    for place, flags in ((output, ("--layout", "pad")), (output / "model", rows)):
        refused = python(COMMAND_LINE, "eval", str(place), *flags, "--documents", "separate")
        assert refused.returncode == 2
        assert "--documents separate: --layout pad has a document a row" in refused.stderr


@pytest.mark.parametrize("optim", ["galore_adamw", "lora", "scale"])
def test_every_execution_computes_the_same(
    optim: str, tiny_config: str, short_texts: tuple[str, ...], tmp_path: Path
) -> None:
    """Layerwise, checkpointed, row by row: the losses of a plain run, but for roundings."""
    losses = []
    ways: dict[str, tuple[str, ...]] = {
        "plain": ("--no-layerwise", "--no-activation-checkpointing", "--batch-size", "4"),
        "other": ("--layerwise", "--activation-checkpointing", "--batch-size", "1"),
    }
    for name, way in ways.items():
        flags = case(tiny_config, tmp_path / name, optim, *short_texts, "--documents", "separate")
        done = python(COMMAND_LINE, *flags, "--grad-clip", "0", *way)  # the last of a flag counts
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in lines(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_two_processes_are_one(tiny_config: str, short_texts: tuple[str, ...], tmp_path: Path) -> None:
    flags = (*short_texts, "--documents", "separate")
    alone = {tmp_path / "1": case(tiny_config, tmp_path / "1", "galore_adamw", *flags)}
    shared = {}
    for shard in ("full", "none"):
        output = tmp_path / f"2-{shard}"
        shared[output] = case(tiny_config, output, "galore_adamw", *flags, "--layerwise", "--shard", shard)
    run_all(1, alone, tmp_path)
    run_all(2, shared, tmp_path)
    found = [compare(tmp_path / "1", output, 1e-5) for output in shared]
    assert not [told for told in found if told]


@pytest.mark.slow
def test_compiled_layers_take_the_mask(tiny_config: str, short_texts: tuple[str, ...], tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        flags = (*short_texts, "--documents", "separate", *more)
        done = python(COMMAND_LINE if FULL else TRACED, *command(tiny_config, tmp_path / name, *flags)[3:])
        assert done.returncode == 0, done.stderr
    pairs = zip(lines(tmp_path / "plain"), lines(tmp_path / "compiled"), strict=True)
    assert all(one["loss"] == pytest.approx(other["loss"], rel=1e-4) for one, other in pairs)


def test_the_rows_of_a_skipped_update_say_where_documents_begin(tiny_config: str, tmp_path: Path) -> None:
    done = run(tiny_config, tmp_path / "run", *SEPARATE, "--max-loss", "0.001")
    assert done.returncode == 1
    rows = load_file(sorted((tmp_path / "run" / "skipped").iterdir())[0])
    assert rows["places"].shape == rows["input_ids"].shape
    assert (rows["places"][:, 0] == 0).all()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_document_a_row_is_apart_already() -> None:
    with pytest.raises(InputError, match="--documents separate: --layout pad has a document a row"):
        resolve({"model": "llama_1m", "optim": "adamw", "data": "sample", "documents": "separate"}, {})


def test_heads_that_turn_by_the_longest_document_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tmp_path / "model.json"
    model.write_text(json.dumps(TINY | {"rope_scaling": rope}))
    architecture = load_model_config(str(model))
    for length, documents, is_refused in ((33, "separate", True), (32, "separate", False), (33, "joined", False)):
        config = config_for(str(model), "adamw", max_length=length, layout="pack", documents=documents)
        if not is_refused:
            check_length(config, architecture)
            continue
        with pytest.raises(InputError, match=r"turn by the longest text of a batch \(longrope, beyond 32 tokens\)"):
            check_length(config, architecture)


def test_longer_rows_than_positions_are_told_the_way_out(tmp_path: Path) -> None:
    words = ["plan", "--model", "llama_1m", "--optim", "adamw", "--data", "sample", "--max-length", "8192"]
    words += ["--total-batch-size", "1", "--memory-budget", "24GiB", "--json"]
    told = python(COMMAND_LINE, *words)
    assert told.returncode == 0, told.stderr
    assert "a run is refused: --max-length 8192 exceeds the " in told.stderr
    assert "name a copy of its JSON with max_position_embeddings 8192" in told.stderr
    planned = json.loads(told.stdout)
    values = load_model_config("llama_1m").to_diff_dict() | {"max_position_embeddings": 8192}
    longer = tmp_path / "longer.json"
    longer.write_text(json.dumps(values))
    words[2] = str(longer)
    told = python(COMMAND_LINE, *words)
    assert told.returncode == 0, told.stderr
    assert "refused" not in told.stderr
    assert json.loads(told.stdout)["peak_bytes"] == planned["peak_bytes"]
