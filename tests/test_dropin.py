"""The drop-in classes: galore_torch's groups and arguments, its numbers under reference, and transformers' Trainer."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from galore_pretrain.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, NaturalGaLoreAdamW
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.galore import is_projected
from galore_pretrain.optim.optimizer import RuleOptimizer
from prescribed import gradients, parameters, train

galore_torch = pytest.importorskip("galore_torch", reason="the authors' package is a dev dependency")
CLASSES = [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor, NaturalGaLoreAdamW]
KWARGS: dict[Any, dict[str, Any]] = {GaLoreAdafactor: {"scale_parameter": False, "relative_step": False}}
GROUP = {"rank": 6, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("GaLoreAdamW", {"lr": 0.01, "weight_decay": 0.1, "no_deprecation_warning": True}),
        ("GaLoreAdamW", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-4, "no_deprecation_warning": True}),
        ("GaLoreAdafactor", {"lr": 0.01, "scale_parameter": False, "relative_step": False, "weight_decay": 0.1}),
        ("GaLoreAdafactor", {"lr": 0.01, "scale_parameter": False, "relative_step": False, "beta1": 0.9}),
    ],
)
def test_one_import_is_all_that_changes(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """The same arguments give the same numbers under reference numerics, also while the learning rate varies."""
    import galore_pretrain.optim as ours

    results = []
    for module, extra in ((galore_torch, {}), (ours, {"numerics": "reference"})):
        params = parameters([(24, 40), (40, 24), (17,)], dtype)
        groups = [{"params": params[2:]}, {"params": params[:2], **GROUP}]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(getattr(module, name)(groups, **kwargs, **extra), params, 12, lambda i: 0.01 / (1 + i))
        results.append(params)
    for theirs, mine in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_state_is_tensors_and_numbers(optimizer_class: Any, tmp_path: Path) -> None:
    params = parameters([(96, 80), (17,)], torch.bfloat16)

    def build(params: list[Tensor], rank: int = 64) -> Any:
        groups = [{"params": params[1:]}, {"params": params[:1], **GROUP, "rank": rank}]
        return optimizer_class(groups, lr=0.01, **KWARGS.get(optimizer_class, {}))

    optimizer = build(params)
    train(optimizer, params, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    copies = [p.detach().clone().requires_grad_() for p in params]
    restored = build(copies)
    restored.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert restored.param_groups[1]["rank"] == 64
    with pytest.raises(ValueError, match=r"rank=32.* cannot go on as .*rank=64"):
        build(copies, rank=32).load_state_dict(optimizer.state_dict())
    for grads in gradients(params, 3):
        for p, q, grad in zip(params, copies, grads, strict=True):
            p.grad = q.grad = grad
        optimizer.step()
        restored.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_settings_of_a_group_hold() -> None:
    """galore_torch reads them from the group, so they must not be ignored."""
    results = []
    for settings in ({}, {"betas": (0.5, 0.6), "eps": 1.0}):
        p = parameters([(24, 40), (40, 24)])
        train(GaLoreAdamW([{"params": p, **GROUP, **settings}], lr=0.01), p, 3)
        q = parameters([(24, 40), (40, 24)])
        train(GaLoreAdamW([{"params": q, **GROUP}], lr=0.01, **settings), q, 3)
        assert torch.equal(p[0], q[0])
        results.append(p[0])
    assert not torch.equal(*results)


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_settings_live_in_the_groups(optimizer_class: Any) -> None:
    """As in torch: what stands there holds from the next step on, is saved, and comes back with a saved state."""

    def build(**more: Any) -> tuple[Tensor, Any]:
        p = parameters([(24, 40)])
        return p[0], optimizer_class([{"params": p, **GROUP}], lr=0.01, **KWARGS.get(optimizer_class, {}), **more)

    changed = {"scale": 0.5, "update_proj_gap": 2}
    if optimizer_class is not GaLoreAdafactor:
        changed |= {"betas": (0.5, 0.6), "eps": 1e-3}
    before, plain = build()
    train(plain, [before], 4)
    p, optimizer = build()
    train(optimizer, [p], 2)
    optimizer.param_groups[0] |= changed
    train(optimizer, [p], 2)
    assert not torch.equal(p, before)

    q, other = build(moments="project", basis="svd")
    other.load_state_dict(optimizer.state_dict())
    assert {name: other.param_groups[0][name] for name in changed} == changed
    q.data.copy_(p.data)
    train(optimizer, [p], 3)
    train(other, [q], 3)
    assert torch.equal(p, q)

    other.param_groups[0]["rank"] = 3
    with pytest.raises(ValueError, match="its state has another shape"):
        other.step()


@pytest.mark.parametrize("optimizer_class", [GaLoreAdamW, GaLoreAdamW8bit, NaturalGaLoreAdamW])
def test_schedulers_that_cycle_momentum(optimizer_class: Any) -> None:
    params = parameters([(24, 40)])
    optimizer = optimizer_class([{"params": params, **GROUP}], lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=4)
    betas = []
    for grads in gradients(params, 3):
        params[0].grad = grads[0]
        optimizer.step()
        betas.append(optimizer.rule_of(params[0]).inner.betas if optimizer_class is not NaturalGaLoreAdamW else None)
        scheduler.step()
    assert betas[0] is None or (betas[0] == (0.95, 0.999) and betas[1] != betas[0])


def test_a_foreign_or_unfit_state_changes_nothing() -> None:
    params = parameters([(24, 40)])
    optimizer = GaLoreAdamW([{"params": params, **GROUP}], lr=0.01)
    train(optimizer, params, 2)
    before = optimizer.state_dict()
    foreign = torch.optim.AdamW(parameters([(24, 40)]))
    train(foreign, foreign.param_groups[0]["params"], 1)
    for state in (
        foreign.state_dict(),
        GaLoreAdafactor([{"params": params, **GROUP}], **KWARGS[GaLoreAdafactor], lr=1),
    ):
        with pytest.raises(ValueError, match="the saved"):
            optimizer.load_state_dict(state if isinstance(state, dict) else state.state_dict())
    assert str(optimizer.state_dict()) == str(before)


def test_hooks_of_a_step_are_called_once() -> None:
    params = parameters([(24, 40)])
    RuleOptimizer([{"params": parameters([(4,)]), "rule": Adam()}])  # torch wraps a class's step at its first instance
    optimizer, calls = GaLoreAdamW([{"params": params, **GROUP}], lr=0.01), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, params, 1)
    assert calls == ["before", "after"]


def test_a_copy_goes_on_alike() -> None:
    params = parameters([(24, 40)])
    optimizer = GaLoreAdamW([{"params": params, **GROUP}], lr=0.01)
    train(optimizer, params, 2)
    copied, (p,) = copy.deepcopy((optimizer, params))
    train(optimizer, params, 2)
    train(copied, [p], 2)
    assert torch.equal(p, params[0])


def test_nothing_to_project_is_said() -> None:
    params = parameters([(24, 40), (40,)])
    with pytest.warns(UserWarning, match="GaLoreAdamW projects nothing"):
        train(GaLoreAdamW(params, lr=0.01), params, 1)


def test_refusals() -> None:
    p = parameters([(8, 8)])
    with pytest.raises(ValueError, match="relative_step=True is not supported"):
        GaLoreAdafactor(p, lr=0.1, scale_parameter=False)
    with pytest.raises(ValueError, match="needs lr="):
        GaLoreAdafactor(p, scale_parameter=False, relative_step=False)
    with pytest.raises(ValueError, match="correct_bias, which holds for the whole"):
        GaLoreAdamW([{"params": p, "correct_bias": False}])
    with pytest.raises(ValueError, match="betas"):
        GaLoreAdamW(p, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"torch\.float16"):
        GaLoreAdamW(parameters([(8, 8)], torch.float16))
    with pytest.raises(ValueError, match="percentile_clipping=5"):
        GaLoreAdamW8bit(p, percentile_clipping=5)
    with pytest.raises(TypeError, match="takes no rank; name it in a parameter group"):
        GaLoreAdamW(p, rank=128)
    with pytest.raises(TypeError, match=r"takes no foreach$"):
        GaLoreAdamW(p, foreach=True)
    with pytest.raises(ValueError, match=r"rank 8\.0 must be a whole number"):
        GaLoreAdamW([{"params": p, "rank": 8.0}])
    with pytest.raises(ValueError, match="numerics reference of a group"):
        GaLoreAdamW([{"params": p, "rank": 8, "numerics": "reference"}])
    sparse = torch.nn.Embedding(8, 4, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    optimizer = GaLoreAdamW([{"params": p, "rank": 8}, {"params": sparse.parameters()}])
    with pytest.raises(ValueError, match="only dense ones"):
        optimizer.step()
    with pytest.raises(ValueError, match="scale but no rank"):
        GaLoreAdamW([{"params": p, "scale": 0.5}])
    with pytest.raises(ValueError, match="projects matrices"):
        GaLoreAdamW([{"params": parameters([(8,)]), **GROUP}])
    with pytest.raises(ValueError, match="lr -1"):
        GaLoreAdamW(p, lr=-1)
    assert isinstance(GaLoreAdamW(p).param_groups[0]["params"][0], Tensor)  # bare tensors: no projection, as theirs


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.arange(16).add(i).remainder(60)
        return {"input_ids": ids, "labels": ids}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, max_position_embeddings=32, **sizes))


def groups_of(net: LlamaForCausalLM) -> list[dict[str, Any]]:
    names = {f"{name}.weight" for name, module in net.named_modules() if is_projected(name, module)}
    rest = [p for name, p in net.named_parameters() if name not in names]
    return [{"params": rest}, {"params": [p for n, p in net.named_parameters() if n in names], **GROUP}]


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_inside_transformers_trainer(optimizer_class: Any, how: str, tmp_path: Path) -> None:
    """Trains, falls, and goes on from its checkpoint to the weights of an undisturbed run."""
    pytest.importorskip("accelerate")

    def trainer(folder: str) -> Trainer:
        net = model()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=8, learning_rate=0.01, per_device_train_batch_size=4,
            save_steps=4, logging_steps=1, report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        if how == "optimizers":
            optimizer = optimizer_class(groups_of(net), lr=0.01, **KWARGS.get(optimizer_class, {}))
            given: dict[str, Any] = {"optimizers": (optimizer, None)}
        else:
            kwargs = {"params": groups_of(net), "lr": 0.01, **KWARGS.get(optimizer_class, {})}
            given = {"optimizer_cls_and_kwargs": (optimizer_class, kwargs)}
        return Trainer(model=net, args=arguments, train_dataset=Rows(), **given)

    whole = trainer("whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1

    again = trainer("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer_class", CLASSES)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rnk": 4}, "rnk=4, which is not supported; did you mean rank?"),
        ({"maximize": True}, "maximize=True, which is not supported; a note of your own goes into param_groups"),
        ({"amsgrad": True}, "amsgrad=True, which is not supported"),
        ({"fused": True}, "fused=True, which is not supported"),
        ({"momentum": 0.9}, "momentum=0.9, which is not supported"),
        ({"update_gap": 4}, "did you mean update_proj_gap?"),
    ],
)
def test_a_setting_of_a_group_is_obeyed_or_refused(setting: dict[str, Any], message: str, optimizer_class: Any) -> None:
    """As the constructor refuses it: nothing would follow it."""
    more = KWARGS.get(optimizer_class, {})
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        optimizer_class([{"params": parameters([(24, 40)]), **GROUP, **setting}], lr=0.01, **more)
    with pytest.raises((TypeError, ValueError)):
        optimizer_class([{"params": parameters([(24, 40)]), **GROUP}], lr=0.01, **more, **setting)


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_what_torch_and_schedulers_leave_in_a_group_is_no_setting(optimizer_class: Any) -> None:
    off = dict.fromkeys(["amsgrad", "maximize", "foreach", "fused"], False)
    group = {"params": parameters([(24, 40)]), **GROUP, **off, "name": "matrices", "initial_lr": 0.01}
    optimizer = optimizer_class([group], lr=0.01, **KWARGS.get(optimizer_class, {}))
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    assert optimizer_class(optimizer.param_groups, lr=0.01, **KWARGS.get(optimizer_class, {}))
