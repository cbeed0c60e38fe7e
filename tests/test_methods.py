"""The table of methods: its entries are complete and true, and an entry is all that a new method takes."""

import itertools
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from galore_pretrain.config.options import FLAGS, RunConfig, shipped_models
from galore_pretrain.config.resolve import left_out, resolve, without_meaning
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import METHODS, OPTIONS, REGISTRY, build_optimizer, method, resolve_name
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.build import build_rules, composition_of, rules_by_role
from galore_pretrain.optim.compositions import Composition
from galore_pretrain.optim.methods import MOMENT_STORES, NUMERICS, Companion, Method, Recipe
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import Decay, Direction, UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.study.pictures import _PALETTE, styles_of
from galore_pretrain.tensors.shards import Shard
from galore_pretrain.train.build import optimizer_for

VALUES: dict[str, Any] = {
    "rank": 4, "update_proj_gap": 7, "scale": 0.5, "proj_type": "left", "basis": "svd", "basis_store": "int8",
    "refresh": "together", "moments": "project", "natural_history": 3, "natural_damping": 0.5, "betas": (0.5, 0.6),
    "eps": 1e-3, "moment_store": "8bit",
}  # fmt: skip
"""A value for each option of rules."""


@pytest.mark.parametrize("name", METHODS)
def test_an_entry_is_complete(name: str) -> None:
    entry = METHODS[name]
    assert entry.name == name
    assert entry.description
    assert bool(entry.home) != bool(entry.factors_updated_by)
    assert set(entry.options) <= set(OPTIONS)
    assert len(set(entry.options)) == len(entry.options)
    assert entry.colour is None or entry.colour in _PALETTE
    if entry.factors_updated_by:
        assert METHODS[entry.factors_updated_by].home
        assert entry.companion is None
        assert not entry.projects
        assert entry.moments_8bit == METHODS[entry.factors_updated_by].moments_8bit
        assert set(METHODS[entry.factors_updated_by].options) < set(entry.options)
    else:
        assert all(OPTIONS[flag].argument for flag in entry.options)


@pytest.mark.parametrize("name", METHODS)
def test_recipes_have_a_source_and_a_learning_rate(name: str) -> None:
    general, *others = METHODS[name].recipes
    assert general.model is None
    assert "lr" in general.values
    for own in (general, *others):
        assert own.source
        assert own.values.keys() <= FLAGS.keys()
        assert own.model in (None, *shipped_models())


def test_names_aliases_and_colours_are_told_apart() -> None:
    names = [*METHODS, *(alias for entry in METHODS.values() for alias in entry.aliases)]
    assert len(set(names)) == len(names)
    for name in names:
        assert resolve_name(name) == (method(name).name, False)
    lines = [(style.colour, style.strokes) for style in styles_of(list(METHODS)).values()]
    assert len(set(lines)) == len(lines)


def test_options_are_flags_of_a_run() -> None:
    assert OPTIONS.keys() <= FLAGS.keys()
    assert {option.argument for option in OPTIONS.values() if option.fields} == VALUES.keys()
    for option in OPTIONS.values():
        assert option.why
        assert option.argument or not option.fields


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("name", REGISTRY)
def test_an_entry_says_what_its_rules_do(name: str, numerics: str) -> None:
    """Which options they take, whether they project, and in how many bits they keep moments."""
    values = VALUES | ({"basis_store": "dense"} if numerics == "reference" else {})
    for flag, option in OPTIONS.items():
        if not option.fields:
            continue
        if flag in METHODS[name].options:
            assert build_rules(name, numerics, **{option.argument: values[option.argument]}) is not None
        else:
            with pytest.raises(ValueError, match=f"{option.argument} .* has no meaning for optimizer {name}; leave"):
                build_rules(name, numerics, **{option.argument: values[option.argument]})
    rule, companion = build_rules(name, numerics)
    state = rule.init(torch.zeros(256, 5000))
    assert METHODS[name].projects == rule.projects
    assert METHODS[name].moments_8bit == any(key.endswith("_absmax") for key in state)
    assert companion.init(torch.zeros(256)).keys() is not None  # it takes a vector


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("name", REGISTRY)
def test_a_moment_store_is_that_of_the_row_with_such_moments(name: str, numerics: str) -> None:
    """Where the other form of a method is a row, it is that row; else the rule's stores are exchanged."""
    entry = METHODS[name]
    if "moment_store" not in entry.options:
        for store in MOMENT_STORES:
            with pytest.raises(ValueError, match=f"moment_store {store} has no meaning for optimizer {name}; leave"):
                build_rules(name, numerics, moment_store=store)
        return
    own, other = ("8bit", "dense") if entry.moments_8bit else ("dense", "8bit")
    assert rules_by_role(name, numerics, moment_store=own) == rules_by_role(name, numerics)
    rules = rules_by_role(name, numerics, moment_store=other)
    if entry.other_store:
        assert METHODS[entry.other_store].other_store == name
        assert METHODS[entry.other_store].moments_8bit != entry.moments_8bit
        assert rules == rules_by_role(entry.other_store, numerics)
    states = [rule.init(torch.zeros(256, 5000)) for rule in rules.values()]
    is_8bit = any(key.endswith("_absmax") for state in states for key in state)
    assert is_8bit == (other == "8bit")


def test_ranks_by_module_make_groups_of_one_rank(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    """A name is the last part of a module's, with or without _proj, or a pattern for all of it; the first counts."""
    factors = {"*.layers.0.self_attn.q_proj": 1.5, "down": 2.0, "q": 0.5, "k_proj": 0.5}
    optimizer = build_optimizer(build_tiny(), "galore_adamw", lr=0.01, rank=8, rank_by_module=factors)
    ranks: dict[str, int] = {}
    for group in optimizer.param_groups[:-1]:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            ranks[name.removesuffix(".weight")] = min(optimizer.tensors(p)[key].shape[i] for key, i in (
                ("left_basis", 1), ("right_basis", 0)) if key in optimizer.tensors(p))  # fmt: skip
    expected = {"q_proj": 4, "k_proj": 4, "down_proj": 16}
    for name, rank in ranks.items():
        by_pattern = 12 if name == "model.layers.0.self_attn.q_proj" else expected.get(name.split(".")[-1], 8)
        assert rank == by_pattern, name
    assert len(optimizer.param_groups) == 5  # of ranks 12, 4, 8, 16, and the rest
    plain = build_optimizer(build_tiny(), "galore_adamw", lr=0.01, rank=8)
    assert len(plain.param_groups) == 2


def test_ranks_by_module_that_fit_nothing_are_refused(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    with pytest.raises(ValueError, match=r"rank_by_module dwon fits no matrix .*; they are q_proj, k_proj, v_proj"):
        build_optimizer(build_tiny(), "galore_adamw", lr=0.01, rank=8, rank_by_module={"dwon": 2.0, "q": 0.5})
    with pytest.raises(ValueError, match="rank_by_module has no meaning for optimizer adamw"):
        build_optimizer(build_tiny(), "adamw", lr=0.01, rank_by_module={"q": 0.5})


@pytest.mark.parametrize("tied", [False, True])
def test_companions_take_embedding_head_and_vectors(
    monkeypatch: pytest.MonkeyPatch, tiny_config: str, tied: bool
) -> None:
    """Each is a group with its own rule and factor on the rate. A tied weight counts as the head."""
    of_roles = {
        "embedding": Companion("sgd"),
        "head": Companion("adafactor"),
        "vector": Companion("adamw", lr_scale=20),
    }
    entry = Method(
        name="own", description="", home=f"{__name__}:Sign", companions=of_roles, options=("betas",), matrix_options=()
    )
    monkeypatch.setitem(METHODS, "own", entry)
    config = load_model_config(tiny_config)
    config.tie_word_embeddings = tied
    model = build_model(config, dtype=torch.float32)
    optimizer = build_optimizer(model, "own", lr=0.01, betas=(0.5, 0.6), matrix_lr_scale=3.0)
    found: dict[str, str] = {}
    for name, p in model.named_parameters():
        found[name] = type(optimizer.rule_of(p)).__name__
    assert found["lm_head.weight" if not tied else "model.embed_tokens.weight"] == "Adafactor"
    assert tied or found["model.embed_tokens.weight"] == "SGD"
    assert {rule for name, rule in found.items() if "proj" in name} == {"Sign"}
    assert {rule for name, rule in found.items() if "norm" in name} == {"Adam"}
    rates = {type(optimizer.rule_of(group["params"][0])).__name__: group["lr"] for group in optimizer.param_groups}
    assert (rates["Sign"], rates["Adam"], rates["Adafactor"]) == pytest.approx((0.03, 0.2, 0.01))
    matrix = model.model.layers[0].mlp.up_proj.weight
    assert optimizer.rule_of(matrix) == Sign(momentum=0.9)  # betas do not reach it
    assert optimizer.rule_of(model.model.norm.weight) == Adam(betas=(0.5, 0.6))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_betas_of_scale_reach_the_head_and_vectors_alone(betas: tuple[float, float]) -> None:
    """Elsewhere a momentum would be another method, and a state of the embedding's size."""
    rules: dict[str, Any] = rules_by_role("scale", "sound", betas=betas)
    assert [rules[role].momentum for role in ("matrix", "embedding", "head")] == [0, 0, betas[0]]
    assert rules["vector"].betas == betas


# -- a method of one's own --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sign(UpdateRule):
    """The sign of a running mean, for matrices of attention and MLP: it refuses all else."""

    momentum: float = 0.9
    decay: ClassVar[Decay] = "before"

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        if like.ndim != 2 or 1024 in like.shape:
            raise ValueError(f"a tensor of shape {tuple(like.shape)} is no matrix of attention or MLP")
        return {"mean": torch.zeros_like(like)}

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        mean = step.working_copy(state["mean"]).lerp_(grad, 1 - self.momentum)
        step.store(state["mean"], mean)
        return Direction(mean.sign())


late_sign = Sign(momentum=0.99)
both_signs = Composition(Sign(momentum=0.8), Sign(momentum=0.7))


@pytest.fixture
def sign(monkeypatch: pytest.MonkeyPatch) -> Method:
    """The table with one more entry."""
    entry = Method(
        name="sign", description="the sign of a running mean", home=f"{__name__}:Sign", companion="adamw",
        aliases=("sign_momentum",), options=("betas",),
    )  # fmt: skip
    monkeypatch.setitem(METHODS, "sign", entry)
    return entry


@pytest.mark.parametrize("numerics", NUMERICS)
def test_one_entry_adds_a_method(
    sign: Method, numerics: str, build_tiny: Callable[..., LlamaForCausalLM], tiny_config: str
) -> None:
    """Its companion updates embeddings, norms and head under both numerics; options reach both rules."""
    assert build_rules("sign", numerics) == (Sign(), getattr(REGISTRY["adamw"], numerics))
    companion = replace(getattr(REGISTRY["adamw"], numerics), betas=(0.5, 0.6))
    assert build_rules("sign", numerics, betas=(0.5, 0.6)) == (Sign(momentum=0.5), companion)
    given = {"model": tiny_config, "data": "sample", "optim": "Sign-Momentum", "lr": 0.01, "betas": (0.5, 0.6)}
    config, _ = resolve(given | {"numerics": numerics, "weight_decay": 0.1, "dtype": "float32"}, {"lr": "flag"})
    assert (config.optim, config.lr, config.rank, config.eps) == ("sign", 0.01, None, None)
    model = build_tiny()
    optimizer = optimizer_for(config, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        model(torch.arange(40).view(2, 20), labels=torch.arange(40).view(2, 20)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert ("mean" in optimizer.state[p]) == ("proj" in name)
        assert not torch.equal(p, before[name])


@pytest.mark.parametrize(
    ("home", "sound", "reference"), [("Sign", 0.9, 0.9), ("late_sign", 0.99, 0.99), ("both_signs", 0.8, 0.7)]
)
def test_a_home_is_a_rule_its_class_or_a_composition(home: str, sound: float, reference: float) -> None:
    assert composition_of(f"{__name__}:{home}") == Composition(Sign(sound), Sign(reference))


def test_without_a_companion_a_rule_updates_everything(monkeypatch: pytest.MonkeyPatch, sign: Method) -> None:
    monkeypatch.setitem(METHODS, "alone", Method(name="alone", description="", home=sign.home))
    assert build_rules("alone", "sound") == (Sign(), Sign())


def test_what_it_cannot_use_is_refused_with_a_reason(
    sign: Method, build_tiny: Callable[..., LlamaForCausalLM], tiny_config: str
) -> None:
    given = {"model": tiny_config, "data": "sample", "optim": "sign", "lr": 0.01}
    for flag, value in (("rank", 4), ("eps", 1e-3), ("lora_alpha", 8.0)):
        dashed = flag.replace("_", "-")
        message = f"--{dashed} {value} has no meaning for --optim sign; {OPTIONS[flag].why}"
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            resolve(given | {flag: value}, {})
    with pytest.raises(InputError, match=r"^--clip-norm projected: sign keeps whole gradients; leave it out$"):
        resolve(given | {"grad_clip": 1.0, "clip_norm": "projected"}, {})
    with pytest.raises(ValueError, match=r"^rank 4 has no meaning for optimizer sign; leave it out$"):
        build_optimizer(build_tiny(), "sign", lr=0.01, rank=4)
    with pytest.raises(ValueError, match="signs is unknown; did you mean sign"):
        resolve_name("signs")
    assert without_meaning("sign").keys() == OPTIONS.keys() - {"betas"}
    assert left_out("sign_momentum").keys() == {*without_meaning("sign"), "reduce"}
    assert "reduce" not in left_out("galore")


def test_a_field_of_its_rule_is_an_option(sign: Method) -> None:
    assert build_rules("sign_momentum", "sound", momentum=0.3) == (Sign(momentum=0.3), Adam())


def test_what_no_recipe_has_is_asked_for(monkeypatch: pytest.MonkeyPatch, sign: Method, tiny_config: str) -> None:
    given = {"model": tiny_config, "data": "sample", "optim": "sign"}
    with pytest.raises(InputError, match=r"^--lr is missing: --optim sign has no recipe for it; give one, such as"):
        resolve(given, {})
    recipes = Recipe({"lr": 0.02, "grad_clip": 1.0}, "here"), Recipe({"lr": 0.03}, "here", model="llama_7b")
    entry = Method(name="sign", description="", home=sign.home, recipes=recipes)
    monkeypatch.setitem(METHODS, "sign", entry)
    config, origins = resolve(given, {})
    assert (config.lr, config.grad_clip, origins["lr"]) == (0.02, 1.0, "recipe: here")
    assert resolve(given | {"model": "llama_7b"}, {})[0].lr == 0.03


def test_types_of_a_config_are_true() -> None:
    """A field whose type knows no None holds none, whatever the method and the model."""
    hints = typing.get_type_hints(RunConfig)
    never_none = [name for name in FLAGS if type(None) not in typing.get_args(hints[name])]
    assert {"lr", "batch_size", "steps", "tokenizer"} - set(never_none) == {"steps"}
    for model, optim in itertools.product(shipped_models(), METHODS):
        given = {"model": model, "optim": optim, "data": "sample", "lr": 0.01}
        if METHODS[optim].projects or METHODS[optim].factors_updated_by:
            given["rank"] = 8
        config, _ = resolve(given, {})
        assert not [name for name in never_none if getattr(config, name) is None]


def test_the_entry_that_the_docs_show_is_one() -> None:
    page = (Path(__file__).parents[1] / "docs" / "adding-a-method.md").read_text()
    (entry,) = re.findall(r"```python\n(.*?)```", page.split("## To be shipped")[1], flags=re.DOTALL)
    made = eval(entry, {"Method": Method, "Recipe": Recipe})
    assert (made.name, made.home) == ("sign_momentum", "galore_pretrain.optim.sign_momentum:SignMomentum")
