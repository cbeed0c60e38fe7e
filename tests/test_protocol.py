"""torch.optim's protocol, where others hold the optimizer: schedulers, accelerate, torch.compile, autocast.

What pytorch asks of all its optimizers in ``test/test_optim.py`` is asked here of the drop-in classes, in own words.
"""

import copy
import json
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from galore_pretrain.optim import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GlobalStep,
    Layerwise,
    NaturalGaLoreAdamW,
    build_optimizer,
)
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.moments import Blockwise8bit
from galore_pretrain.optim.sgd import SGD
from galore_pretrain.optim.update import Step
from prescribed import gradients, meant_for, parameters, train
from test_dist import forked

CLASSES = [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor, NaturalGaLoreAdamW]
SHAPES: list[tuple[int, ...]] = [(24, 40), (40, 24), (17,)]
GROUP = {"rank": 6, "update_proj_gap": 4}


def build(optimizer_class: Any, params: list[Tensor], **more: Any) -> Any:
    """Project the matrices among ``params``."""
    matrices = [p for p in params if p.ndim == 2]
    groups = [{"params": [p for p in params if p.ndim != 2]}, {"params": matrices, **GROUP}]
    if optimizer_class is GaLoreAdafactor:
        more |= {"scale_parameter": False, "relative_step": False}
    return optimizer_class([group for group in groups if group["params"]], **{"lr": 0.01, **more})


def assert_equal(params: list[Tensor], others: list[Tensor]) -> None:
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_processes_save_and_load_what_they_share(tmp_path: Path) -> None:
    """FSDP2 and tensor parallelism, by torch.distributed.checkpoint: a run that was stopped goes on alike."""
    forked(2, "protocols", tmp_path)


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_a_compiled_step_makes_the_same_update(optimizer_class: Any) -> None:
    params, others = parameters(SHAPES), parameters(SHAPES)
    plain, compiled = build(optimizer_class, params), build(optimizer_class, others)
    step = torch.compile(compiled.step, backend="eager")  # type: ignore[no-untyped-call]
    for grads in gradients(params, 4):
        for p, q, grad in zip(params, others, grads, strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        plain.step()
        step()
    assert_equal(params, others)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("execution_class", [GlobalStep, Layerwise])
def test_compiled_passes_between_begin_and_complete_make_the_same_update(
    execution_class: Any, micro_batches: int
) -> None:
    weights = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.ModuleDict({"mlp": nn.Linear(16, 24), "head": nn.Linear(24, 4)})
        optimizer = build_optimizer(model, "galore_adamw", lr=0.01, rank=4, update_proj_gap=3)
        execution = execution_class(optimizer)

        def passes(x: Tensor, model: Any = model) -> None:
            model["head"](model["mlp"](x).relu()).square().mean().backward()

        called: Any = torch.compile(passes, backend="eager") if is_compiled else passes
        for seed in range(6):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
            for i, part in enumerate(x.chunk(micro_batches)):
                execution.begin(i, micro_batches)
                called(part)
            execution.complete()
        weights.append([p.detach() for p in model.parameters()])
    assert_equal(*weights)


@pytest.mark.parametrize("execution_class", [GlobalStep, Layerwise])
def test_a_compiled_training_step_makes_the_same_update(execution_class: Any) -> None:
    weights = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({"mlp": nn.Linear(16, 24), "head": nn.Linear(24, 4)})
        optimizer = build_optimizer(model, "galore_adamw", lr=0.01, rank=4, update_proj_gap=3)
        execution = execution_class(optimizer)

        def step(x: Tensor, model: Any = model, execution: Any = execution) -> None:
            execution.begin(0, 1)
            model["head"](model["mlp"](x).relu()).square().mean().backward()
            execution.complete()

        called: Any = torch.compile(step, backend="eager") if is_compiled else step
        for seed in range(4):
            called(torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)))
        weights.append([p.detach() for p in model.parameters()])
    assert_equal(*weights)


@pytest.mark.parametrize("row", ["drop-in", "global", "layerwise"])
def test_an_update_inside_autocast_is_that_outside(row: str) -> None:
    weights = []
    for is_inside in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({"mlp": nn.Linear(16, 24)})
        optimizer: Any = build_optimizer(model, "galore_adamw", lr=0.01, rank=4, update_proj_gap=3)
        if row == "drop-in":
            optimizer = build(GaLoreAdamW, list(model.parameters()))
        execution = {"global": GlobalStep, "layerwise": Layerwise}.get(row, lambda _: None)(optimizer)
        for seed in range(4):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model["mlp"](x).float().square().mean()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_inside):
                if execution:
                    execution.begin(0, 1)
                loss.backward()
                (execution.complete if execution else optimizer.step)()
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()])
    assert_equal(*weights)


# One optimizer a parameter, as layerwise recipes of others make them.


def alone(params: list[Tensor], **more: Any) -> list[Any]:
    return [GaLoreAdamW([{"params": [p], **({"rank": 2} if p.ndim == 2 else {})}], lr=0.01, **more) for p in params]


def test_optimizers_of_one_parameter_renew_bases_in_turn_and_warn_of_nothing() -> None:
    params = parameters([(16, 8)] * 8 + [(8,)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizers = alone(params)
        for p, optimizer in reversed(list(zip(params, optimizers, strict=True))):
            train(optimizer, [p], 1)
    due = {optimizer.next_due(p, 2) for p, optimizer in zip(params[:-1], optimizers, strict=False)}
    assert len(due) > 4


def test_optimizers_of_one_parameter_round_by_bits_of_their_own() -> None:
    """Of equal values too: norms are all ones."""
    params = [torch.ones(8, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    for p, optimizer in zip(params, alone(params, seed=3), strict=True):
        p.grad = torch.full_like(p, 1e-2)
        optimizer.param_groups[0]["lr"] = 1e-4
        optimizer.step()
    assert not torch.equal(*params)


def test_an_optimizer_of_one_parameter_repeats_a_training_in_the_same_place() -> None:
    params = [torch.ones(8, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    for p in params:
        train(GaLoreAdamW([{"params": [p], "rank": 2, "first_index": 5}], lr=0.01), [p], 3)
    assert_equal(params[:1], params[1:])


def test_an_optimizer_of_one_parameter_is_made_of_fake_tensors() -> None:
    with FakeTensorMode():
        (optimizer,) = alone([torch.ones(8, 64).requires_grad_()])
    assert "first_index" in optimizer.param_groups[0]


def test_a_bare_parameter_beside_optimizers_that_project_is_no_mistake() -> None:
    matrix, vector = parameters([(16, 8), (8,)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizers = [GaLoreAdamW([{"params": [matrix], "rank": 2}], lr=0.01), GaLoreAdamW([vector], lr=0.01)]
        for p, optimizer in zip((matrix, vector), optimizers, strict=True):
            train(optimizer, [p], 1)


def test_an_optimizer_of_one_parameter_goes_on_in_its_place() -> None:
    """By then, other values stand in the parameter."""
    (p,) = parameters([(16, 8)])
    (optimizer,) = alone([p])
    train(optimizer, [p], 3)
    q = p.detach().clone().requires_grad_()
    (other,) = alone([q])
    older = copy.deepcopy(optimizer.state_dict())
    del older["param_groups"][0]["first_index"]
    other.load_state_dict(older)
    assert other.slots[q].index == 0
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.next_due(q, 4) == optimizer.next_due(p, 4)
    train(optimizer, [p], 30)
    train(other, [q], 30)
    assert torch.equal(p, q)


# States that others make, change and load.


@pytest.mark.parametrize("optimizer_class", [GaLoreAdamW, GaLoreAdamW8bit, NaturalGaLoreAdamW])
@pytest.mark.parametrize("scheduler_class", [OneCycleLR, CyclicLR])
def test_a_state_loads_that_was_saved_after_a_scheduler_had_stepped(scheduler_class: Any, optimizer_class: Any) -> None:
    def scheduled(params: list[Tensor]) -> tuple[Any, Any]:
        optimizer = build(optimizer_class, params)
        options = {"max_lr": 0.01, "total_steps": 20} if scheduler_class is OneCycleLR else {"base_lr": 0, "max_lr": 1}
        return optimizer, scheduler_class(optimizer, **options)

    params = parameters(SHAPES)
    optimizer, scheduler = scheduled(params)
    for _ in range(3):
        train(optimizer, params, 1)
        scheduler.step()
    copies = [p.detach().clone().requires_grad_() for p in params]
    restored, _ = scheduled(copies)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, 2)
    train(restored, copies, 2)
    assert_equal(params, copies)


@pytest.mark.parametrize("row", ["adamw", "galore_adamw", "galore_adamw8bit"])
def test_schedulers_that_cycle_momentum_take_the_rows_of_the_table(row: str) -> None:
    def scheduled(seed: int) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(seed)
        model = nn.ModuleDict({"mlp": nn.Linear(16, 24)})
        options = meant_for(row, rank=4)
        optimizer = build_optimizer(model, row, lr=0.01, **options)
        return model, optimizer, OneCycleLR(optimizer, 0.01, total_steps=20)

    model, optimizer, scheduler = scheduled(0)
    params = list(model.parameters())
    used = []
    for _ in range(3):
        train(optimizer, params, 1)
        used.append(optimizer.param_groups[0]["settings"])
        scheduler.step()
    assert len(set(used)) == 3
    other, restored, _ = scheduled(1)
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, 2)
    train(restored, list(other.parameters()), 2)
    assert_equal(params, list(other.parameters()))
    adafactor = build_optimizer(model, "galore_adafactor", lr=0.01, rank=4)
    with pytest.raises(ValueError, match="momentum"):
        OneCycleLR(adafactor, 0.01, total_steps=20)


@pytest.mark.parametrize("make", ["row", "drop-in"])
@pytest.mark.parametrize("execution_class", [GlobalStep, Layerwise])
def test_an_execution_updates_by_the_betas_that_a_scheduler_has_left(execution_class: Any, make: str) -> None:
    def scheduled() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"mlp": nn.Linear(16, 24)})
        optimizer: Any = build_optimizer(model, "galore_adamw", lr=0.01, rank=4)
        if make == "drop-in":
            optimizer = build(GaLoreAdamW, list(model.parameters()))
        return model, optimizer, OneCycleLR(optimizer, 0.01, total_steps=20)

    def go_on(training: tuple[Any, Any, Any], updates: int, execution: Any = None) -> None:
        model, optimizer, scheduler = training
        params = list(model.parameters())
        for grads in gradients(params, updates):
            if execution:
                execution.begin(0, 1)
            torch.autograd.backward(params, grads)
            (execution.complete if execution else optimizer.step)()
            optimizer.zero_grad()
            scheduler.step()

    stepped, executed, resumed = scheduled(), scheduled(), scheduled()
    go_on(stepped, 4)
    go_on(executed, 4, execution_class(executed[1]))
    assert_equal(*[list(training[0].parameters()) for training in (stepped, executed)])
    for part, saved in zip(resumed, executed, strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    go_on(executed, 3, execution_class(executed[1]))
    go_on(resumed, 3, execution_class(resumed[1]))
    assert_equal(*[list(training[0].parameters()) for training in (executed, resumed)])


def test_lists_for_tuples_load() -> None:
    """JSON, YAML and torch's full state dicts make them."""
    params = parameters(SHAPES)
    optimizer = build(GaLoreAdamW, params)
    train(optimizer, params, 2)
    state = optimizer.state_dict()
    state["param_groups"] = json.loads(json.dumps(state["param_groups"]))
    restored = build(GaLoreAdamW, parameters(SHAPES))
    restored.load_state_dict(state)
    train(restored, [p for group in restored.param_groups for p in group["params"]], 1)


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_full_state_dicts_load_and_frozen_parameters_are_left_out(optimizer_class: Any) -> None:
    def model() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        base = nn.Linear(24, 24).requires_grad_(False).half()
        net = nn.ModuleDict({"base": base, "mlp": nn.Linear(24, 16)})
        return net, build(optimizer_class, list(net.parameters()))

    net, optimizer = model()
    for p in net["mlp"].parameters():  # type: ignore[index]
        p.grad = torch.ones_like(p)
    optimizer.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    assert set(saved["state"]) == {"mlp.weight", "mlp.bias"}
    other, restored = model()
    set_optimizer_state_dict(other, restored, saved, options=options)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert str(optimizer.state.get(p)) == str(restored.state.get(q))
    thawed = other["base"].float().requires_grad_().weight  # type: ignore[index]
    before = thawed.detach().clone()
    thawed.grad = torch.ones_like(thawed)
    restored.step()
    assert not torch.equal(thawed, before)


@pytest.mark.parametrize("change", ["cleared", "emptied", "popped", "replaced"])
def test_a_state_that_is_taken_away_begins_anew(change: str) -> None:
    params, others = parameters(SHAPES), parameters(SHAPES)
    optimizer = build(GaLoreAdamW, params)
    train(optimizer, params, 2)
    if change == "cleared":
        optimizer.state.clear()
    elif change == "replaced":
        optimizer.state = defaultdict(dict)
    else:
        for p in params:
            optimizer.state[p].clear() if change == "emptied" else optimizer.state.pop(p)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    train(optimizer, params, 2)
    train(build(GaLoreAdamW, others), others, 2)
    assert_equal(params, others)


def test_a_count_may_be_saved_as_a_tensor() -> None:
    params, others = parameters(SHAPES), parameters(SHAPES)
    optimizer, other = build(GaLoreAdamW, params), build(GaLoreAdamW, others)
    train(optimizer, params, 2)
    train(other, others, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for value in state["state"].values():
        value["step"] = torch.tensor(float(value["step"]))
    optimizer.load_state_dict(state)
    other.state[others[0]]["step"] = torch.tensor(2)
    train(optimizer, params, 2)
    train(other, others, 2)
    assert_equal(params, others)
    assert {type(value["step"]) for value in (*optimizer.state.values(), *other.state.values())} == {int}


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_a_look_at_a_fresh_state_changes_nothing(optimizer_class: Any, lr: Any) -> None:
    """torch.distributed.checkpoint looks by a step, of zero gradients at the rate 0."""
    weights = []
    for is_looked_at in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(24, 16)
        params = list(net.parameters())
        optimizer = build(optimizer_class, params, lr=lr)
        if is_looked_at:
            seen: Any = get_optimizer_state_dict(net, optimizer)
            assert seen["state"]["weight"]["step"] == 0
            assert len(seen["state"]["weight"]) > 2
        train(optimizer, params, 6)
        assert optimizer.state[params[0]]["step"] == 6
        weights.append(params)
    assert_equal(*weights)


def test_a_first_update_at_the_rate_0_is_made() -> None:
    """A warmup begins with it, and its gradients count."""
    params = parameters(SHAPES)
    optimizer = build(GaLoreAdamW, params, lr=0.0)
    train(optimizer, params, 1)
    assert [optimizer.state[p]["step"] for p in params] == [1] * 3


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("shape", [(300, 400), (4097,), (700, 800)])
def test_8_bit_moments_are_restored_as_they_were_read(shape: tuple[int, ...], name: str) -> None:
    """Also a block whose largest magnitude is negative, and one of zeros."""
    store, step = Blockwise8bit(), Step(1)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-20, 1, shape[-1])
    if name.endswith("_sq"):
        values = values.square()
    values.view(-1)[:256] = 0.0
    state = store.zeros(name, values)
    store.write(state, name, values.clone(), step)
    read = store.read(state, name, step).clone()
    assert (read.view(-1)[256:4096] != 0).any()
    restored = store.zeros(name, values)
    store.restore(restored, name, read.clone())
    assert torch.equal(store.read(restored, name, step), read)


def test_a_loaded_rate_is_a_copy() -> None:
    params = parameters(SHAPES)
    optimizer = build(GaLoreAdamW, params, lr=torch.tensor(0.01))
    saved = optimizer.state_dict()
    restored = build(GaLoreAdamW, parameters(SHAPES), lr=torch.tensor(0.5))
    restored.load_state_dict(saved)
    restored.param_groups[0]["lr"].fill_(0.25)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [pytest.approx(0.01)] * 2


@pytest.mark.parametrize("row", [True, False])
def test_a_saved_group_names_the_rule_that_its_settings_ask_for(row: bool) -> None:
    """A load compares both, so that what is no setting of a group is not thrown away."""

    def made() -> Any:
        torch.manual_seed(0)
        model = nn.ModuleDict({"mlp": nn.Linear(16, 24)})
        if row:
            return build_optimizer(model, "galore_adamw", lr=0.01, rank=4)
        return build(GaLoreAdamW, list(model.parameters()))

    optimizer = made()
    train(optimizer, [p for group in optimizer.param_groups for p in group["params"]], 1)
    scheduler = OneCycleLR(optimizer, 0.01, total_steps=20)
    scheduler.step()
    saved = copy.deepcopy(optimizer.state_dict())
    betas = tuple(saved["param_groups"][0]["betas"])
    assert f"betas={betas}" in saved["param_groups"][0]["settings"]
    restored = made()
    restored.load_state_dict(saved)
    assert restored.param_groups[0]["settings"] == saved["param_groups"][0]["settings"]
    for group in saved["param_groups"]:
        group["settings"] = group["settings"].replace("Adam(", "Adam(formula='other', ")
    with pytest.raises(ValueError, match="formula='other'"):
        made().load_state_dict(saved)


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_a_refused_load_leaves_the_groups_as_they_were(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, d = parameters([(8, 8)] * 4)
    optimizer = GaLoreAdamW([{"params": [a]}, {"params": [b], "rank": 2}], lr=0.01)
    other = GaLoreAdamW([{"params": [c], "rank": 2, "scale": 0.5}, {"params": [d], "betas": (0.5, 0.6)}], lr=0.02)
    train(optimizer, [a, b], 2)
    before, rules = str(optimizer.param_groups), optimizer.slots.rules
    if error is RuntimeError:
        other = GaLoreAdamW([{"params": [c], "betas": (0.1, 0.2)}, {"params": [d], "rank": 2}], lr=0.02)

        def fail(*_: Any) -> None:
            raise RuntimeError("a message was lost")

        monkeypatch.setattr("galore_pretrain.optim.optimizer.take_state_dict", fail)
    with pytest.raises(error):
        optimizer.load_state_dict(other.state_dict())
    assert str(optimizer.param_groups) == before
    assert optimizer.slots.rules == rules
    train(optimizer, [a, b], 1)
    assert [optimizer.rule_of(p) for p in (a, b)] == rules


def test_a_state_without_a_count_is_refused() -> None:
    params = parameters(SHAPES)
    optimizer = build(GaLoreAdamW, params)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["step"]
    with pytest.raises(ValueError, match="step, the count of updates, is missing"):
        optimizer.load_state_dict(saved)


def test_a_group_that_is_added_to_a_row_keeps_the_betas_of_its_rule() -> None:
    optimizer = build_optimizer(nn.ModuleDict({"mlp": nn.Linear(8, 8)}), "galore_adamw", lr=0.01, rank=2)
    params = parameters([(8,), (8,)])
    rules = [Adam(betas=(0.5, 0.6)), SGD()]
    for name, p, rule in zip(("one", "other"), params, rules, strict=True):
        optimizer.add_param_group({"params": [(name, p)], "rule": rule})
    train(optimizer, params, 1)
    assert [optimizer.rule_of(p) for p in params] == rules
    assert "betas" not in optimizer.param_groups[-1]


def test_a_hook_may_exchange_the_state_for_an_empty_one() -> None:
    optimizer = build(GaLoreAdamW, parameters(SHAPES))
    optimizer.register_load_state_dict_pre_hook(lambda *_: {})
    with pytest.raises(KeyError):
        optimizer.load_state_dict(optimizer.state_dict())


def test_hooks_of_loading_are_called_and_may_exchange_the_state() -> None:
    optimizer, calls = build(GaLoreAdamW, parameters(SHAPES)), []
    saved = optimizer.state_dict()

    def before(_: Any, state_dict: Any) -> Any:
        calls.append("before")
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    optimizer.load_state_dict(saved)
    assert calls == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == 0.5


# Groups that others change.


def test_a_parameter_that_is_exchanged_in_a_group_is_updated_in_its_place() -> None:
    """As accelerate does it for FSDP2, between making an optimizer and its first step."""
    params, others = parameters(SHAPES, torch.bfloat16), parameters(SHAPES, torch.bfloat16)
    plain, exchanged = build(GaLoreAdamW, params), build(GaLoreAdamW, parameters(SHAPES, torch.bfloat16))
    exchanged.param_groups[0]["params"] = others[2:]
    exchanged.param_groups[1]["params"][:] = others[:2]
    train(plain, params, 6)
    train(exchanged, others, 6)
    assert_equal(params, others)
    assert len(exchanged.state) == 3


def test_what_an_optimizer_was_given_is_free_once_it_is_exchanged() -> None:
    """accelerate has both models in memory otherwise."""
    import weakref

    params = parameters(SHAPES)
    optimizer = build(GaLoreAdamW, params)
    gone = [weakref.ref(p) for p in params]
    for group, new in zip(optimizer.param_groups, (parameters(SHAPES)[2:], parameters(SHAPES)[:2]), strict=True):
        group["params"] = new
    del params
    assert [reference() for reference in gone] == [None] * 3


def test_a_group_that_is_taken_out_leaves_others_their_settings() -> None:
    params = parameters(SHAPES)
    optimizer = build(GaLoreAdamW, params)
    optimizer.param_groups[1]["lr"] = 0.0
    train(optimizer, params, 1)
    del optimizer.param_groups[0]
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 1)
    assert_equal(params, before)
    optimizer.add_param_group({"params": params[2:], "lr": 0.1})
    train(optimizer, params, 1)
    assert not torch.equal(params[2], before[2])


def test_a_group_that_is_out_for_a_while_comes_back_with_its_rule() -> None:
    """Meanwhile, the other groups, which had the same rule, go on by other betas."""
    params, bias = parameters(SHAPES), parameters([(9,)])[0]
    groups = [{"params": params[:2], "rank": 4}, {"params": params[2:]}, {"params": [bias]}]
    optimizer = GaLoreAdamW(groups, lr=0.01)
    train(optimizer, [*params, bias], 1)
    rule = optimizer.rule_of(bias)
    group = optimizer.param_groups.pop()
    for number in range(3):
        for other in optimizer.param_groups:
            other["betas"] = (0.8, 0.9 + number / 100)
        train(optimizer, params, 1)
    optimizer.param_groups.append(group)
    train(optimizer, [*params, bias], 1)
    assert optimizer.rule_of(bias) == rule
    assert len(optimizer.slots._rules) == 3


def test_a_parameter_that_is_moved_is_updated_by_the_rule_of_its_group() -> None:
    a, b, c = parameters([(8, 8), (8, 8), (8, 8)])
    groups = [{"params": [c], "rank": 2}, {"params": [a]}, {"params": [b], "betas": (0.5, 0.6)}]
    optimizer = GaLoreAdamW(groups, lr=0.01)
    train(optimizer, [a, b, c], 2)
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[2]["params"].pop())
    train(optimizer, [a, b, c], 1)
    assert optimizer.rule_of(b) == optimizer.rule_of(a)
    assert optimizer.state[b]["step"] == 3
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    with pytest.raises(ValueError, match=r"another shape: del optimizer\.state"):
        train(optimizer, [a, b, c], 1)
    del optimizer.state[c]
    train(optimizer, [a, b, c], 1)
    assert [optimizer.state[p]["step"] for p in (a, b, c)] == [4, 4, 1]


def test_a_foreign_tensor_has_an_empty_state() -> None:
    optimizer = build(GaLoreAdamW, parameters(SHAPES))
    assert optimizer.state[parameters([(3,)])[0]] == {}


def test_a_group_that_does_not_fit_is_not_added() -> None:
    params = parameters(SHAPES)
    optimizer = build(GaLoreAdamW, params)
    with pytest.raises(ValueError, match="projects matrices"):
        optimizer.add_param_group({"params": parameters([(8,)]), "rank": 4})
    assert len(optimizer.param_groups) == 2
    train(optimizer, params, 1)


# pytorch's own tests of all its optimizers.


@pytest.mark.parametrize("optimizer_class", CLASSES)
class TestAsPytorchTestsItsOptimizers:
    def test_nothing_is_updated_without_a_gradient_and_no_state_is_made(self, optimizer_class: Any) -> None:
        params = parameters(SHAPES)
        optimizer = build(optimizer_class, params)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert_equal(params, before)
        assert not optimizer.state
        train(optimizer, params, 1)
        assert all(len(optimizer.state[p]) > 1 for p in params)

    @pytest.mark.parametrize("contiguous", [True, False])
    @pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)])
    def test_a_loss_goes_down(self, optimizer_class: Any, lr: Any, contiguous: bool) -> None:
        torch.manual_seed(0)
        weight, bias = torch.randn(10, 5), torch.randn(10)
        if not contiguous:
            weight = torch.randn(5, 10).T
        params = [weight.requires_grad_(), bias.requires_grad_()]
        optimizer = build(optimizer_class, params, lr=lr)
        x = torch.randn(5)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        first = closure().item()
        for _ in range(40):
            optimizer.step(closure)
        assert closure().item() < 0.9 * first

    def test_gradients_are_left_as_they_are(self, optimizer_class: Any) -> None:
        params = parameters(SHAPES)
        optimizer = build(optimizer_class, params, weight_decay=0.1)
        for grads in gradients(params, 5):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            kept = [grad.clone() for grad in grads]
            optimizer.step()
            assert_equal(kept, [p.grad for p in params])

    @pytest.mark.parametrize("groups", ["bare", "named", "a generator"])
    def test_parameters_may_come_in_any_form(self, optimizer_class: Any, groups: str) -> None:
        params = parameters(SHAPES)
        given: Any = params
        if groups == "named":
            given = [(f"p{i}", p) for i, p in enumerate(params)]
        elif groups == "a generator":
            given = iter(params)
        more = {"scale_parameter": False, "relative_step": False} if optimizer_class is GaLoreAdafactor else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = optimizer_class(given, lr=0.01, **more)
            train(optimizer, params, 1)
        assert repr(optimizer).startswith(optimizer_class.__name__)

    def test_a_copy_and_a_loaded_state_go_on_alike(self, optimizer_class: Any, tmp_path: Path) -> None:
        params = parameters(SHAPES)
        optimizer = build(optimizer_class, params)
        train(optimizer, params, 3)
        copied, copies = copy.deepcopy((optimizer, params))
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        others = [p.detach().clone().requires_grad_() for p in params]
        restored = build(optimizer_class, others, lr=1.0)
        restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        saved_again = copied.state_dict()
        assert str(saved_again) == str(optimizer.state_dict()) == str(restored.state_dict())
        for one, its in ((optimizer, params), (copied, copies), (restored, others)):
            train(one, its, 5)
        assert_equal(params, copies)
        assert_equal(params, others)

    def test_hooks_of_state_dicts_are_called_in_order(self, optimizer_class: Any) -> None:
        optimizer, calls = build(optimizer_class, parameters(SHAPES)), []
        optimizer.register_state_dict_pre_hook(lambda _: calls.append("before"))

        def after(_: Any, state_dict: Any) -> Any:
            calls.append("after")
            return {**state_dict, "more": 1}

        optimizer.register_state_dict_post_hook(after)
        assert optimizer.state_dict()["more"] == 1
        assert calls == ["before", "after"]

    def test_other_groups_are_refused(self, optimizer_class: Any) -> None:
        optimizer = build(optimizer_class, parameters(SHAPES))
        for state in (
            {"state": {}, "param_groups": optimizer.state_dict()["param_groups"][:1]},
            build(optimizer_class, parameters([(8, 8), (3,), (3,)])).state_dict(),
        ):
            with pytest.raises(ValueError, match="other parameter groups"):
                optimizer.load_state_dict(state)
        with pytest.raises(ValueError, match="empty parameter list"):
            build(optimizer_class, [])
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": optimizer.param_groups[0]["params"]})
