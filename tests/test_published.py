"""Configs as others publish them: what changes the model is obeyed or refused, and all else is passed over."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.llama_config import _OF_OTHERS, _ONE_VALUE, load_model_config
from galore_pretrain.planning.plan import measure

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 3.1": {"rope_scaling": {"factor": 8.0, **LLAMA_3, "rope_type": "llama3"}, "rope_theta": 500000.0},
    "Llama 3.2": {
        "rope_scaling": {"factor": 32.0, **LLAMA_3, "rope_type": "llama3"},
        "rope_theta": 500000.0,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "an Instruct of Llama 3": {"bos_token_id": 0, "eos_token_id": [1, 2, 3], "rope_scaling": None},
    "a long Vicuna": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "a dynamic scale": {"rope_scaling": {"type": "dynamic", "factor": 4}},
    "a YaRN": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "finetuned": True,
        }
    },
    "a scale as transformers writes it today": {
        "rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 5e4}
    },
    "older transformers": {"num_key_value_heads": None, "head_dim": None, "torch_dtype": None, "pretraining_tp": 1},
    "SmolLM": {
        "attention_dropout": 0.0,
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Mistral v0.1": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096},
    "Mistral v0.3": {"model_type": "mistral", "sliding_window": None, "attention_dropout": 0.0, "head_dim": None},
    "Qwen2.5": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 28,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "a Qwen2 with a window": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
    "Qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 32,
        "max_window_layers": 28,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "a Qwen3 that says nothing of heads": {"model_type": "qwen3"},
    "generation in the config": {"temperature": 0.7, "do_sample": True, "max_length": 4096},
}


def written(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


def difference_from_transformers(path: str) -> float:
    """The largest difference of logits from those of the model that transformers makes of the same file."""
    ours = build_model(load_model_config(path), dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32).eval()
    theirs.load_state_dict(ours.state_dict())
    input_ids = torch.arange(200)[None] % 256  # longer than the positions, where dynamic scales change
    with torch.no_grad():
        difference = ours(input_ids).logits - theirs(input_ids).logits
    return float(difference.abs().max())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_model_of_transformers(name: str, tmp_path: Path) -> None:
    assert difference_from_transformers(written(tmp_path, SMALL | PUBLISHED[name])) == 0


def test_a_scale_is_not_passed_over(tmp_path: Path) -> None:
    """Else the comparison above would say nothing."""
    input_ids = torch.arange(60)[None]
    plain = build_model(load_model_config(written(tmp_path, SMALL)), dtype=torch.float32)
    scaled = build_model(load_model_config(written(tmp_path, SMALL | PUBLISHED["Llama 3.1"])), dtype=torch.float32)
    assert (plain(input_ids).logits - scaled(input_ids).logits).abs().max() > 0.01


factors = st.floats(1, 64)
positions = st.integers(16, 127)
scales = st.one_of(
    st.fixed_dictionaries({"rope_type": st.sampled_from(["linear", "dynamic"]), "factor": factors}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": factors,
            "low_freq_factor": st.floats(0.5, 2),
            "high_freq_factor": st.floats(3, 8),
            "original_max_position_embeddings": positions,
        }
    ),
    st.fixed_dictionaries(
        {"type": st.just("yarn"), "factor": factors, "original_max_position_embeddings": positions},
        optional={"beta_fast": st.floats(16, 64), "truncate": st.booleans(), "attention_factor": st.floats(0.5, 2)},
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("longrope"),
            "factor": factors,
            "original_max_position_embeddings": positions,
            "short_factor": st.lists(factors, min_size=8, max_size=8),
            "long_factor": st.lists(factors, min_size=8, max_size=8),
        }
    ),
)


@settings(max_examples=25, deadline=None)
@given(scales, st.sampled_from(["rope_scaling", "rope_parameters"]), st.floats(1e3, 1e6))
def test_any_scale_is_that_of_transformers(scale: dict[str, Any], key: str, theta: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), SMALL | {key: scale, "rope_theta": theta})
        assert difference_from_transformers(path) == 0


@settings(max_examples=60, deadline=None)
@given(
    scales,
    st.dictionaries(
        st.sampled_from(["factor", "rope_type", "low_freq_factor", "short_factor", "rope_theta", "fator"]),
        st.one_of(st.none(), st.integers(-1, 2), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)),
        min_size=1,
        max_size=2,
    ),
)
def test_a_mutated_scale_is_obeyed_or_one_line(scale: dict[str, Any], change: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), SMALL | {"rope_scaling": scale | change})
        try:
            config = load_model_config(path)
        except InputError as error:
            message = str(error)
        else:
            message = path
            assert "fator" not in change
            build_model(config, device="meta")
    assert path in message
    assert "\n" not in message


json_values = st.one_of(st.booleans(), st.integers(), st.text(), st.lists(st.integers()), st.just({"a": 1}))


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from([*_OF_OTHERS, "temperature", "top_p", "num_beams"]), json_values, min_size=1))
def test_keys_that_change_nothing_are_passed_over(more: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = load_model_config(written(Path(folder), SMALL))
        assert load_model_config(written(Path(folder), SMALL | more)).to_dict() == plain.to_dict()


def test_what_is_passed_over_is_one_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, SMALL | PUBLISHED["SmolLM"] | {"quantization_config": None})
    with caplog.at_level(logging.INFO):
        load_model_config(path)
        load_model_config(path)
    (record,) = caplog.records
    assert record.message.startswith(path)
    assert record.message.endswith(": is_llama_config, quantization_config, transformers.js_config")
    caplog.clear()
    load_model_config(written(tmp_path, SMALL | PUBLISHED["Llama 3.1"]))
    assert not caplog.records


@pytest.mark.parametrize("key", _ONE_VALUE)
def test_a_key_that_would_change_the_model_is_refused(key: str, tmp_path: Path) -> None:
    assert load_model_config(written(tmp_path, SMALL | {key: _ONE_VALUE[key]}))
    with pytest.raises(InputError, match=f"{key} is 2; a LLaMA with"):
        load_model_config(written(tmp_path, SMALL | {key: 2}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 2}, "unknown key 'n_kv_heads'; here it is 'num_key_value_heads'"),
        ({"num_kv_heads": 2}, "here it is 'num_key_value_heads'"),
        ({"dim": 64}, "here it is 'hidden_size'"),
        ({"norm_eps": 1e-5}, "here it is 'rms_norm_eps'"),
        ({"rope_scalling": {}}, "did you mean 'rope_scaling'?"),
        ({"attention_dropuot": 0.1}, "did you mean 'attention_dropout'?"),
        ({"quantization_config": {"bits": 4}}, "unknown key 'quantization_config'"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is [1, '2']; a list must hold int"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_scaling is of type 'spiral'; choose from default, linear"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling of type default has no key 'factor'"),
        ({"rope_scaling": {"type": "linear", "fator": 2.0}}, "no key 'fator'; did you mean 'factor'?"),
        ({"rope_scaling": {"type": "linear"}}, "Missing required keys in `rope_scaling`"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "no frequencies come of rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "no frequencies come of rope_parameters"),
        ({"head_dim": 3}, "heads are 3 wide, by head_dim; rotary embeddings need an even width"),
        ({"hidden_size": 12}, "heads are 3 wide, by num_attention_heads 4 of hidden_size 12"),
        ({"hidden_size": 66, "head_dim": 16}, "num_attention_heads 4 does not divide hidden_size 66"),
        ({"vocab_size": 10**400}, "vocab_size has 401 digits; an integer must be below 2**63"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps has 401 digits"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "not positive and finite"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "a LLaMA's turn whole"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "rope_theta is 6.0, and 5.0 in rope_parameters"),
        (
            {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters and rope_scaling differ",
        ),
        ({"auto_map": {"AutoModel": "own.Model"}}, "unknown key 'auto_map'; it names code of the model's own"),
        ({"sliding_window": 4096}, "unknown key 'sliding_window'; a LLaMA's attention is over all that went before"),
        (
            {"model_type": "own", "auto_map": {"AutoModel": "own.Model"}},
            "llama, mistral, qwen2, qwen3 are built here; auto_map: it",
        ),
        (
            {"model_type": "gemma", "sliding_window": 4096},
            "'gemma'; llama, mistral, qwen2, qwen3 are built here; sliding_window: a",
        ),
        (
            {"model_type": "mistral", "attention_bias": True},
            "attention_bias is True; a Mistral with False is all that is built here",
        ),
        ({"model_type": "qwen2", "attention_bias": True}, "unknown key 'attention_bias'"),
        ({"added_tokens": [], "model": {"type": "BPE"}}, "is of a tokenizer; give its folder with --tokenizer"),
        ({"tokenizer_class": "x", "added_tokens_decoder": {}}, "is of a tokenizer; give its folder with --tokenizer"),
        ({"max_sequence_length": 64}, "max_position_embeddings is 128 and max_sequence_length is 64"),
    ],
)
def test_what_would_be_ignored_is_refused_with_the_right_key(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, SMALL | change)
    with pytest.raises(InputError) as error:
        load_model_config(path)
    assert message in str(error.value)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
@pytest.mark.parametrize("factors", [[], [1.0], [1.0] * 7, [1.0] * 16, 1.0])
def test_a_list_of_factors_is_as_long_as_there_are_frequencies(name: str, factors: Any, tmp_path: Path) -> None:
    """Heads of 16 have 8 of them. transformers warns its developers, and takes one number for all."""
    scale = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 32}
    scale |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    assert load_model_config(written(tmp_path, SMALL | {"rope_scaling": scale})).head_dim == 16
    with pytest.raises(InputError, match=f"rope_scaling has .* as {name}; give 8 numbers, half the width of a head"):
        load_model_config(written(tmp_path, SMALL | {"rope_scaling": scale | {name: factors}}))


@pytest.mark.parametrize("factor", [0.0, -1.0, "1", True, None, float("inf"), float("nan")])
def test_a_factor_is_a_positive_number(factor: Any, tmp_path: Path) -> None:
    scale = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 32}
    scale |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 7 + [factor]}
    with pytest.raises(InputError, match=r"rope_scaling has long_factor .*; all must be finite and greater than 0"):
        load_model_config(written(tmp_path, SMALL | {"rope_scaling": scale}))


def test_an_unknown_name_may_be_a_path_as_well() -> None:
    with pytest.raises(InputError, match=r"--model llama3: no such model .*or give the path of a JSON config, or of a"):
        load_model_config("llama3")


def test_a_window_that_is_not_set_is_passed_over(tmp_path: Path) -> None:
    """Configs that a program has written name it with null, and that it is not used."""
    assert load_model_config(written(tmp_path, SMALL | {"sliding_window": None, "use_sliding_window": False}))


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn", "linear", "llama3"])
def test_every_scale_is_planned_as_a_plain_model_is(kind: str, tmp_path: Path) -> None:
    """Some ask how long a text is, which nothing has that is planned."""
    scale: dict[str, Any] = {"rope_type": kind, "factor": 2.0}
    if kind not in ("dynamic", "linear"):
        scale["original_max_position_embeddings"] = 32
    if kind == "longrope":
        scale |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    if kind == "llama3":
        scale |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    peaks: list[int] = []
    for more in ({}, {"rope_scaling": scale}):
        path = written(tmp_path, SMALL | more)
        given = {"model": path, "data": "sample", "optim": "adamw", "lr": 0.01, "steps": 4, "max_length": 32}
        config, _ = resolve(given | {"total_batch_size": 2, "memory_budget": 2**34}, {})
        peaks.append(measure(config, load_model_config(path)).peak_bytes)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)
