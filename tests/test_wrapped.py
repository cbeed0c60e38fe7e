"""Any class of torch.optim as a rule: it is the class's own update, or it is refused with the reason."""

import inspect
import itertools
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from galore_pretrain.optim import METHODS, load_method
from galore_pretrain.optim.execution import Layerwise
from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.rule import Scope, describe
from galore_pretrain.optim.wrapped import UPDATES, Wrapped, is_linear_in_rate
from prescribed import gradients, parameters, train

TRAINED: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True}, "Adam": {"betas": (0.8, 0.95), "amsgrad": True}, "AdamW": {},
    "Adamax": {}, "NAdam": {}, "RAdam": {}, "RMSprop": {"momentum": 0.5, "centered": True}, "Rprop": {},
    "Adagrad": {"initial_accumulator_value": 0.1}, "Adadelta": {}, "Muon": {},
}  # fmt: skip
"""The classes that train, each with options for one of two tests."""
REFUSED = {
    "ASGD": "ASGD reads the weight",
    "Adafactor": "Adafactor reads the weight",
    "LBFGS": r"evaluates the loss itself \(closure\)",
    "SparseAdam": "cannot be updated by gradients alone: RuntimeError: SparseAdam does not support dense",
}


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675) as somebody would write it."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((mean * first + p.grad * (1 - first)).sign(), alpha=-group["lr"])
                mean.lerp_(p.grad, 1 - second)


class Shared(Lion):
    """Divides by the norm of all gradients."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = self.param_groups[0]["params"]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p.data -= self.param_groups[0]["lr"] * p.grad / norm


class Counting(Lion):
    """Counts its updates in an attribute."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count = getattr(self, "count", 0) + 1
        for p in self.param_groups[0]["params"]:
            p.data -= self.param_groups[0]["lr"] * p.grad / self.count


class Rateless(torch.optim.SGD):
    """Has no learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1.0)


class Listing(Lion):
    """Keeps a list of what it has seen."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("seen", []).append(p.grad.sum())
            p.data -= self.param_groups[0]["lr"] * p.grad


class Plain(Lion):
    """Counts in a plain number of its state, as older classes do, and steps less each time."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            count = self.state[p]["step"] = self.state[p].get("step", 0) + 1
            assert isinstance(count, int)
            p.data -= self.param_groups[0]["lr"] * p.grad / count


class Late(Lion):
    """Counts its updates in an attribute, which matters from the fifth on."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count = getattr(self, "count", 0) + 1
        for p in self.param_groups[0]["params"]:
            p.data -= self.param_groups[0]["lr"] * p.grad / (1 if self.count < 5 else 2)


class Lookahead(Lion):
    """Goes back half of the way to where it was five updates ago, which is in its state."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.setdefault("slow", p.detach().clone())
            state["count"] = state.get("count", 0) + 1
            p.data -= self.param_groups[0]["lr"] * p.grad
            if state["count"] % 5 == 0:
                state["slow"].lerp_(p.data, 0.5)
                p.data.copy_(state["slow"])


class Second(Lion):
    """Begins to keep something at its second update."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if "count" in state:
                state["before"] = p.grad.clone()
            state["count"] = 1
            p.data -= self.param_groups[0]["lr"] * p.grad


class Needs(Lion):
    """Has an argument without a default."""

    def __init__(self, params: Any, beta: float, lr: float = 1e-4) -> None:
        super().__init__(params, lr=lr)


class Bounded(Lion):
    """Bounds its steps by its first rate, as AdaBound does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data -= (self.param_groups[0]["lr"] * p.grad).clamp(-1e-3, 1e-3)


class Factored(Lion):
    """Keeps row means of large matrices alone."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            is_large = p.ndim == 2 and min(p.shape) >= 16
            square = p.grad.square().mean(1, keepdim=True) if is_large else p.grad.square()
            mean = self.state[p].setdefault("square", torch.zeros_like(square))
            mean.lerp_(square, 0.1)
            p.data -= self.param_groups[0]["lr"] * p.grad / (mean.sqrt() + 1e-8)


class Overwrites(Lion):
    """Changes the gradient in place."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data -= self.param_groups[0]["lr"] * p.grad.mul_(2)


class CountsElements(Lion):
    """Counts, in whole numbers, how often each gradient was positive."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            counts = self.state[p].setdefault("counts", torch.zeros_like(p, dtype=torch.int64))
            counts += p.grad > 0
            p.data -= self.param_groups[0]["lr"] * p.grad.sign()


def _class(name: str) -> Any:
    return getattr(torch.optim, name)


def _theirs(name: str, params: list[Tensor], lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the class's own optimizer, without the decay that some have by default."""
    optimizer = _class(name)
    without_decay = {"weight_decay": 0.0} if "weight_decay" in inspect.signature(optimizer).parameters else {}
    built: torch.optim.Optimizer = optimizer(params, lr=lr, **without_decay, **options)
    return built


@pytest.mark.parametrize("has_options", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_a_class_of_torch_updates_as_it_does_itself(name: str, has_options: bool) -> None:
    """From weights that are not zero, over 20 updates, to 1e-6; the rate is that of our group."""
    options = TRAINED[name] if has_options else {}
    shapes: list[tuple[int, ...]] = [(12, 20), (20, 7)]
    if name != "Muon":
        shapes += [(9,), (3, 4, 5)]
    ours, theirs = parameters(shapes), parameters(shapes)
    rule = Wrapped(_class(name), tuple(options.items()))
    train(RuleOptimizer([{"params": ours, "rule": rule}], lr=0.01), ours, 20)
    train(_theirs(name, theirs, 0.01, options), theirs, 20)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


def test_a_changing_rate_is_that_of_the_class_where_updates_are_linear_in_it() -> None:
    ours, theirs = parameters([(12, 20)]), parameters([(12, 20)])
    rate = lambda i: 0.1 / (i + 1)  # noqa: E731
    train(RuleOptimizer([{"params": ours, "rule": Wrapped(torch.optim.NAdam)}], lr=1.0), ours, 12, rate)
    train(torch.optim.NAdam(theirs, lr=1.0), theirs, 12, rate)
    assert torch.allclose(ours[0], theirs[0], rtol=0, atol=1e-6)


def test_decay_is_decoupled_and_ours() -> None:
    ours, theirs = parameters([(12, 20)]), parameters([(12, 20)])
    train(RuleOptimizer([{"params": ours, "rule": Wrapped(torch.optim.AdamW)}], lr=0.01, weight_decay=0.3), ours, 20)
    train(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.3), theirs, 20)
    assert torch.allclose(ours[0], theirs[0], rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_that_wants_more_than_gradients_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        Wrapped(_class(name))


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (Shared, "Shared couples parameters"),
        (Counting, r"Counting remembers more than state\[p\] holds"),
        (Rateless, "Rateless takes no lr"),
        (Late, r"Late remembers more than state\[p\] holds"),
        (Lookahead, r"Lookahead remembers more than state\[p\] holds"),
        (Second, "Second cannot be updated .* begins to keep before after its first update only"),
        (Needs, "Needs needs beta when it is built: give it a default"),
    ],
)
def test_a_class_whose_updates_would_be_others_here_is_refused(optimizer: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Wrapped(optimizer)


def test_state_that_no_checkpoint_could_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="Listing keeps seen, which is neither a tensor nor a number but list"):
        Wrapped(Listing).init(torch.zeros(3, 4))


def test_a_class_of_ones_own_and_one_that_counts_in_plain_numbers() -> None:
    for optimizer in (Lion, Plain):
        ours, theirs = parameters([(12, 20), (5,)]), parameters([(12, 20), (5,)])
        train(RuleOptimizer([{"params": ours, "rule": Wrapped(optimizer)}], lr=0.01), ours, 20)
        train(optimizer(theirs, lr=0.01), theirs, 20)
        for p, q in zip(ours, theirs, strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-6)


def test_what_a_class_sees_of_a_tensor_is_found_by_trial() -> None:
    assert Wrapped(torch.optim.Adam).scope is Scope.PARTS
    assert Wrapped(torch.optim.Muon).scope is Scope.WHOLE
    assert describe(Wrapped(torch.optim.Muon)) == "Muon"


def test_what_depends_on_the_size_is_seen_at_a_larger_one() -> None:
    assert Wrapped(Factored).scope is Scope.WHOLE


def test_a_rate_that_does_more_than_to_multiply_is_told(recwarn: pytest.WarningsRecorder) -> None:
    for name in TRAINED:
        assert is_linear_in_rate(_class(name), ()) == (name != "Rprop")  # whose rate is its first step
    assert not is_linear_in_rate(Bounded, ())
    load_method("torch.optim:Rprop")
    assert "torch.optim:Rprop: the class does more with its rate" in str(recwarn.pop(UserWarning).message)
    del METHODS["torch.optim:Rprop"]


def test_whole_numbers_in_the_state_stay_whole() -> None:
    (p,) = parameters([(6, 8)], torch.bfloat16)
    optimizer = RuleOptimizer([{"params": [p], "rule": Wrapped(CountsElements)}], lr=0.01)
    for _ in range(600):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.tensors(p)["counts"].unique().tolist() == [600]


def test_the_callers_gradient_is_left_alone() -> None:
    (p,) = parameters([(6, 8)])
    grad = torch.ones(6, 8)
    p.grad = grad
    RuleOptimizer([{"params": [p], "rule": Wrapped(Overwrites)}], lr=0.01).step()
    assert torch.equal(grad, torch.ones(6, 8))


def test_options_are_the_classs_arguments() -> None:
    rule, used = Wrapped(torch.optim.SGD).configured({"momentum": 0.5, "rank": 4})
    assert (rule.options, used) == ((("momentum", 0.5),), {"momentum"})
    assert "momentum" in rule.option_names()
    assert "lr" not in rule.option_names()
    for option, why in (("weight_decay", "use --weight-decay"), ("lr", "use --lr"), ("rank", "has no argument rank")):
        with pytest.raises(ValueError, match=why):
            Wrapped(torch.optim.SGD, ((option, 1),))


def test_a_class_refuses_a_shape_in_its_own_words() -> None:
    with pytest.raises(ValueError, match=r"Muon refuses a parameter of shape \(8,\): Muon only supports 2D"):
        Wrapped(torch.optim.Muon).init(torch.zeros(8))


class TestFirstUpdate:
    """A class sets its state up at its first update: one that was dropped must not count as that."""

    shapes: ClassVar[list[tuple[int, ...]]] = [(6, 8)]

    @pytest.mark.parametrize("name", ["Rprop", "NAdam", "Adagrad"])
    def test_a_dropped_update_leaves_all_as_it_was(self, name: str) -> None:
        ours, theirs = parameters(self.shapes), parameters(self.shapes)
        optimizer = RuleOptimizer([{"params": ours, "rule": Wrapped(_class(name))}], lr=0.01)
        reference = _theirs(name, theirs, 0.01, {})
        for number, (grad,) in enumerate(gradients(ours, 8)):
            is_dropped = number in (0, 1, 5)
            ours[0].grad = torch.full_like(grad, torch.nan) if is_dropped else grad.clone()
            optimizer.step()
            if not is_dropped:
                theirs[0].grad = grad.clone()
                reference.step()
        assert float(optimizer.tensors(ours[0])[UPDATES]) == 5
        assert torch.allclose(ours[0], theirs[0], rtol=0, atol=1e-6)


def test_layerwise_updates_a_saved_state_and_bf16() -> None:
    """The same bits layerwise, and after a state was saved and loaded; bf16 state rounded stochastically."""
    for dtype in (torch.float32, torch.bfloat16):
        whole, layered, resumed = (parameters([(12, 20), (9,)], dtype) for _ in range(3))
        rule = Wrapped(torch.optim.RAdam)
        at_once = RuleOptimizer([{"params": whole, "rule": rule}], lr=0.01)
        in_backward = RuleOptimizer([{"params": layered, "rule": rule}], lr=0.01)
        execution = Layerwise(in_backward)
        optimizer = RuleOptimizer([{"params": resumed, "rule": rule}], lr=0.01)
        for number, grads in enumerate(gradients(whole, 9)):
            for params in (whole, resumed):
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad.clone()
            at_once.step()
            optimizer.step()
            execution.begin(0, 1)
            torch.autograd.backward(layered, grads)
            execution.complete()
            if number == 4:
                saved = optimizer.state_dict()
                optimizer = RuleOptimizer([{"params": resumed, "rule": rule}], lr=0.01)
                optimizer.load_state_dict(saved)
        for p, q, r in zip(whole, layered, resumed, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(p, r)
        assert {value.dtype for p in whole for name, value in at_once.tensors(p).items() if "exp" in name} == {dtype}


def test_rows_and_columns_can_be_updated_by_themselves() -> None:
    """As processes that share a tensor out do, where the scope is PARTS."""
    generator = torch.Generator().manual_seed(3)
    grads = torch.randn(5, 6, 8, generator=generator)
    for name, dim in itertools.product(("Adam", "Rprop", "Adagrad"), (0, 1)):
        whole = torch.zeros(6, 8)
        halves = [half.clone() for half in whole.chunk(2, dim)]
        together = RuleOptimizer([{"params": [whole], "rule": Wrapped(_class(name))}], lr=0.1)
        apart = RuleOptimizer([{"params": halves, "rule": Wrapped(_class(name))}], lr=0.1)
        for grad in grads:
            whole.grad = grad.clone()
            together.step()
            for half, part in zip(halves, grad.chunk(2, dim), strict=True):
                half.grad = part.clone()
            apart.step()
        assert torch.allclose(whole, torch.cat(halves, dim), rtol=0, atol=1e-7)
