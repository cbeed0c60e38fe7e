"""Shipped configs, initialization, the loss, and what a bad config is told."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from galore_pretrain.config.options import shipped_models
from galore_pretrain.errors import InputError
from galore_pretrain.model.head import mean_loss, token_losses
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.llama_config import load_model_config

PUBLISHED = {
    "llama_1m": 1_053_824, "llama_9m": 8_995_968, "llama_20m": 19_548_416, "llama_35m": 35_197_824,
    "llama_40m": 42_392_480, "llama_60m": 58_073_600, "llama_71m": 70_578_688, "llama_100m": 100_117_120,
    "llama_130m": 134_105_856, "llama_250m": 247_370_496, "llama_350m": 367_969_280, "llama_1b": 1_339_082_752,
    "llama_3b": 2_685_831_680, "llama_7b": 6_738_415_616,
}  # fmt: skip


def closed_form(config: dict[str, int]) -> int:
    h, i, layers, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    return 2 * vocab * h + layers * (4 * h * h + 3 * h * i + 2 * h) + h


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_config_has_its_published_size(name: str) -> None:
    config = load_model_config(name)
    model = build_model(config, device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert count == PUBLISHED[name] == closed_form(config.to_dict())
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in model.parameters())


def test_every_published_model_is_shipped() -> None:
    assert set(shipped_models()) == set(PUBLISHED)


def test_published_json_with_pad_minus_one_freezes_no_row(tmp_path: Path) -> None:
    """In the reference, −1 wraps to the last real token, whose embedding is then zero and never trained."""
    published = {
        "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
        "hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.02, "max_sequence_length": 128,
        "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 1, "pad_token_id": -1,
        "rms_norm_eps": 1e-06, "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 64,
    }  # fmt: skip
    path = tmp_path / "llama.json"
    path.write_text(json.dumps(published))
    config = load_model_config(str(path))
    assert config.max_position_embeddings == 128
    model = build_model(config, dtype=torch.float32)
    ids = torch.tensor([[63, 5, 63]])
    mean_loss(model, ids, ids, 3).backward()  # type: ignore[no-untyped-call]
    embedding = model.model.embed_tokens.weight
    assert embedding[63].abs().sum() > 0
    assert embedding.grad[63].abs().sum() > 0


def test_weights_depend_on_seed_and_name_alone() -> None:
    config = load_model_config("llama_1m")
    a, b = (build_model(config, seed=1, dtype=d) for d in (torch.float32, torch.bfloat16))
    c = build_model(config, seed=2)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q)
        if p.ndim == 2:
            assert not torch.equal(q, r)
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(p.mean()) < 0.02 * 5 / math.sqrt(p.numel())
        else:
            assert (p == 1).all()
    q, k = a.model.layers[0].self_attn.q_proj.weight, a.model.layers[0].self_attn.k_proj.weight
    assert not torch.equal(q, k)


def test_rotary_table_stays_fp32_in_a_bf16_model() -> None:
    model = build_model(load_model_config("llama_1m"))
    fresh = LlamaForCausalLM(load_model_config("llama_1m"))
    assert torch.equal(model.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "blocks"), [(3, 16), (5, 16), (5, 3)])
def test_loss_and_gradients_are_transformers_own(
    dtype: torch.dtype,
    rows: int,
    blocks: int,
    build_tiny: Callable[..., LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks included: rows of 40 tokens, ignored labels among them, in chunks of 32, or in three blocks."""
    monkeypatch.setattr("galore_pretrain.model.head._HEAD_CHUNK", 32)
    monkeypatch.setattr("galore_pretrain.model.head._BLOCKS", blocks)
    model, theirs = build_tiny(dtype=dtype), build_tiny(dtype=dtype)
    ids = torch.randint(0, 1024, (rows, 41), generator=torch.Generator().manual_seed(0))
    inputs, labels = ids[:, :-1], ids[:, 1:].clone()
    labels[1, 30:] = -100
    counted = int((labels >= 0).sum())
    loss = mean_loss(model, inputs, labels, counted)
    loss.backward()  # type: ignore[no-untyped-call]
    expected = theirs(inputs, labels=labels, shift_labels=labels, use_cache=False).loss
    expected.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        assert (p.grad.float() - q.grad.float()).norm() <= tolerance * q.grad.float().norm()
    losses = token_losses(model, inputs, labels)
    assert losses.shape == labels.shape
    assert (losses[labels < 0] == 0).all()
    assert losses.sum().item() / counted == pytest.approx(expected.item(), rel=1e-6)
    reference = F.cross_entropy(theirs(inputs).logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    assert torch.allclose(losses.flatten(), reference.detach(), rtol=1e-5, atol=1e-5)


def test_tied_embeddings_stay_tied(tmp_path: Path, tiny_config: str) -> None:
    path = tmp_path / "tied.json"
    path.write_text(json.dumps(json.loads(Path(tiny_config).read_text()) | {"tie_word_embeddings": True}))
    model = build_model(load_model_config(str(path)), dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(10)[None]
    mean_loss(model, ids, ids, 10).backward()  # type: ignore[no-untyped-call]
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_an_exported_config_is_a_config(tmp_path: Path) -> None:
    """What transformers writes into config.json, and what older programs wrote, means nothing here."""
    config = load_model_config("llama_1m")
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(values | {"_name_or_path": "x", "rope_scaling": None, "pretraining_tp": 1})
    )
    assert load_model_config(str(tmp_path / "config.json")).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 32"),
        ({"num_attention_heads": 32}, "heads are 1 wide"),
        ({"hiden_size": 32}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": "32000"}, "vocab_size is '32000'; it must be int"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers is 1001; at most 1000 layers are built"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0 does not divide"),
        ({"num_key_value_heads": -1}, "num_key_value_heads -1 does not divide"),
        ({"model_type": "gpt2"}, "'gpt2'; llama, mistral, qwen2, qwen3 are built"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2; a LLaMA with 1"),
        ({"hidden_act": "sillu"}, "sillu"),
    ],
)
def test_senseless_config_is_one_line(
    change: dict[str, object], message: str, tmp_path: Path, tiny_config: str
) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(Path(tiny_config).read_text()) | change))
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as error:
        load_model_config(str(path))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "", "\x00", "3"])
def test_not_a_json_object(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(InputError, match="a model config is one JSON object"):
        load_model_config(str(path))


def test_unknown_model_names_the_near_one() -> None:
    with pytest.raises(InputError, match="did you mean llama_60m"):
        load_model_config("llama60m")


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "hidden_size",
                "num_attention_heads",
                "head_dim",
                "rope_parameters",
                "rope_theta",
                "hidden_act",
                "eos_token_id",
            ]
        ),
        st.one_of(st.none(), st.booleans(), st.integers(-5, 70), st.floats(), st.text(max_size=4), st.just({})),
        max_size=3,
    )
)
@example({"hidden_size": 1, "head_dim": 2})
def test_mutated_config_builds_or_is_one_line(change: dict[str, object]) -> None:
    import tempfile

    from conftest import TINY

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(TINY | change, file)
        file.flush()
        try:
            build_model(load_model_config(file.name), device="meta")
        except InputError as error:
            message = str(error)
        else:
            message = ""
    assert "\n" not in message
