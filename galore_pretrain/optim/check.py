"""Checks that hold this project's own methods, for any method: ``galore-pretrain check-method METHOD``.

The same in pytest: ``pytest --pyargs galore_pretrain.optim.check --method METHOD``. A check builds a small model with
the method, trains it on prescribed gradients in two ways that must come to the same, and says what is likely wrong
where they do not. Checks know nothing of the rule inside, but for what every rule answers (`UpdateRule`).
"""

import gc
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from galore_pretrain.optim.execution import Execution, GlobalStep, Layerwise
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.own import told
from galore_pretrain.optim.pair import Pair
from galore_pretrain.optim.rule import UpdateRule
from galore_pretrain.optim.slots import Slot, initial_state, state_on_meta
from galore_pretrain.optim.trial import (
    DECAY,
    LR,
    SHAPES,
    CheckFailedError,
    NotCheckedError,
    Subject,
    Trial,
    gradients,
    load_subject,
    require_close,
    require_equal,
    require_near,
    require_same,
)
from galore_pretrain.optim.update import Step
from galore_pretrain.optim.wrapped import Wrapped
from galore_pretrain.tensors.ledger import Ledger, allocated_peak
from galore_pretrain.tensors.silence import silenced

_DTYPES = (torch.float32, torch.bfloat16)
_UPDATES = 5
_SUM_BOUND = 1e-5
_CLIP_BOUND = 1e-4
_RATE_BOUND = 1e-4
_DECAY_BOUND = 1e-5
_PLAN_BOUND = 0.03
_PLAN_SLACK = 16 * 1024  # bytes, for scalars


@dataclass(frozen=True)
class Finding:
    """Says what a check found: its ``status`` is ok, failed or not checked, and ``told`` says what of, or why."""

    method: str
    check: str
    status: str
    told: str

    def line(self) -> str:
        """Return the finding as a person reads it."""
        shown = {"ok": "ok", "failed": "FAILED", "not checked": "not checked"}[self.status]
        return f"{self.check:<13}{shown:<12}{self.told}".rstrip()


def check_methods(
    names: Sequence[str],
    *,
    numerics: str = "sound",
    options: Mapping[str, Any] | None = None,
    checks: Sequence[str] | None = None,
    device: str = "cpu",
) -> Iterator[Finding]:
    """Return what each of ``checks``, by default of all, finds of each method, as it is found.

    The checks of plans and of several processes are a CPU's; all others can be made on another ``device``. ValueError,
    before anything is checked, where a run would refuse a method or an option.
    """
    subjects = [load_subject(name, numerics, options, device) for name in names]
    return _findings(subjects, checks or list(CHECKS))


def _findings(subjects: Sequence[Subject], checks: Sequence[str]) -> Iterator[Finding]:
    """Yield what each of ``checks`` finds of each of ``subjects``."""
    pair = Pair(subjects)
    for subject in subjects:
        for check in checks:
            yield run_check(check, subject, pair)


def run_check(check: str, subject: Subject, pair: Pair) -> Finding:
    """Return what the check of that name finds; whatever the method raises is a failure."""
    status = "failed"
    with torch.random.fork_rng(devices=[]):
        try:
            text = pair.check(subject) if check == PROCESSES else CHECKS[check](subject)
            status = "ok"
        except CheckFailedError as error:
            text = str(error)
        except NotCheckedError as error:
            status = "not checked"
            text = str(error)
        except Exception as error:  # whatever a method raises
            text = f"the method raises {told(error)}"
    return Finding(subject.name, check, status, text)


# Backward meets the last weights first, `step` the first ones. So a rule that remembers something of another tensor's
# update comes to something else.
def check_layerwise(subject: Subject) -> str:
    """Hold that updates inside backward are those after it: bit for bit of one micro-batch, in fp32 and bf16.

    Of two micro-batches in fp32, they are at most 1e-5 of the way of each weight apart (0.01 with state of 8 bits):
    where a rule projects, one sums before and the other after.
    """
    likely = (
        "likely the rule keeps something outside its state (an attribute, a global), which depends on the order in "
        "which tensors are updated"
    )
    for dtype in _DTYPES:
        after = _trained(subject, GlobalStep, dtype, 1)
        inside = _trained(subject, Layerwise, dtype, 1)
        require_equal(after, inside, f"in {_short(dtype)}, layerwise against after backward", likely)
    after = _trained(subject, GlobalStep, torch.float32, 2)
    inside = _trained(subject, Layerwise, torch.float32, 2)
    require_close(
        after,
        inside,
        _SUM_BOUND,
        "layerwise against after backward, with two micro-batches",
        "likely `compress` is not linear in the gradient, or depends on more than the bases in use",
    )
    return f"one micro-batch bit for bit, two to {_SUM_BOUND:g} of the way"


def check_accumulation(subject: Subject) -> str:
    """Hold that an update of three micro-batches is that of one batch with their sum (fp32, to 1e-5 of the way)."""
    summed = subject.build(torch.float32)
    parts = subject.build(torch.float32)
    by_sum = Layerwise(summed.optimizer)
    by_parts = Layerwise(parts.optimizer)
    for number in range(1, _UPDATES + 1):
        summed.update(by_sum, [_sum(_micro_batches(number, 3))])
    for number in range(1, _UPDATES + 1):
        parts.update(by_parts, _micro_batches(number, 3))
    require_close(
        summed,
        parts,
        _SUM_BOUND,
        "of three micro-batches against one of their sum",
        "likely `compress` is not linear in the gradient, so that what is summed is not what one batch gives",
    )
    return f"to {_SUM_BOUND:g} of the way"


def check_gradients(subject: Subject) -> str:
    """Hold that ``step`` leaves ``p.grad`` as it is, where the rule does not project: it is the caller's."""
    trial = subject.build(torch.float32)
    for number in range(1, 4):
        grads = gradients(number)
        trial.step(grads)
        for name, p in trial.params.items():
            if trial.optimizer.rule_of(p).projects:
                continue
            assert p.grad is not None
            require_same(
                p.grad,
                grads[name],
                f"the gradient of {name} after an update",
                "likely the rule writes into the gradient (an operation whose name ends in _): work on a copy",
            )
    return ""


# Sizes differ from update to update, so that a rule that forgets sizes would notice: the second gradients are large and
# the third small enough not to be clipped.
# Bases are found before the norm of all gradients is known, and some depend on a gradient's size: tracked ones turn by
# it. So none is renewed here.
def check_clipping(subject: Subject) -> str:
    """Hold that a clipped update, layerwise or not, is the update by gradients times min(1, clip / norm of all)."""
    subject = subject.without_refreshes()
    sizes = [1.0, 4.0, 0.25, 2.0, 1.0]
    clip = 0.5 * float(_norm(gradients(1)))
    for place, execution in (("after backward", GlobalStep), ("layerwise", Layerwise)):
        clipped = subject.build(torch.float32)
        updates = execution(clipped.optimizer, clip)
        all_scaled: list[dict[str, Tensor]] = []
        for number, size in enumerate(sizes, 1):
            grads = {name: size * grad for name, grad in gradients(number).items()}
            clipped.update(updates, [grads])
            norm = _clipped_norm(updates, grads, place)
            factor = (clip / (norm + 1e-6)).clamp(max=1.0)
            all_scaled.append({name: factor * grad for name, grad in grads.items()})
        expected = subject.build(torch.float32)
        for scaled in all_scaled:
            expected.step(scaled)
        require_close(
            expected,
            clipped,
            _CLIP_BOUND,
            f"clipped, {place}, against clipped gradients",
            "likely the rule's bases or its compressed gradient depend on the gradient's size, which is clipped later",
        )
    return f"to {_CLIP_BOUND:g} of the way"


def _clipped_norm(updates: Execution, grads: Mapping[str, Tensor], place: str) -> Tensor:
    """Return the norm that was clipped, fp32; CheckFailedError where it is not that of all gradients."""
    norm = updates.outcome().grad_norm
    expected = float(_norm(grads))
    if norm is None or abs(norm - expected) > _CLIP_BOUND * expected:
        raise CheckFailedError(f"{place}, the norm {norm} was clipped, and that of all gradients is {expected}")
    return torch.tensor(norm)


def check_skipping(subject: Subject) -> str:
    """Hold that a gradient that is not finite changes no bit of its weight and state, and is counted.

    The updates of the other tensors are made: those of the first such update are those of an undisturbed run.
    """
    for dtype in _DTYPES:
        clean = subject.build(dtype)
        for number in (1, 2):
            clean.step(gradients(number))
        trial = subject.build(dtype)
        for number in range(1, _UPDATES + 1):
            grads = gradients(number)
            bad = []
            if number > 1:
                bad = [name for place, name in enumerate(SHAPES) if place % 2 == number % 2]
            weights = trial.weights()
            states = trial.states()
            for name in bad:
                grads[name].view(-1)[3] = torch.inf if number % 3 else torch.nan
            with silenced(1):  # MKL prints what a decomposition of such a gradient meets
                trial.step(grads)
            _require_skipped(trial, bad, weights, states)
            if number == 2:
                _require_made(trial, clean, bad)
    return ""


def _require_skipped(
    trial: Trial, bad: Sequence[str], weights: Mapping[str, Tensor], states: Mapping[str, State]
) -> None:
    """Raise CheckFailedError where an update by ``bad`` gradients was made in part, or is not counted."""
    skipped = trial.optimizer.read_skips().skipped
    if skipped != len(bad):
        raise CheckFailedError(f"{len(bad)} gradients were not finite, and {skipped} skipped updates are counted")
    for name in bad:
        state = trial.optimizer.tensors(trial.params[name])
        for key, value in states[name].items():
            require_same(
                state[key],
                value,
                f"{key} of {name}, whose gradient was not finite",
                "likely the rule writes to its state itself: write through step.store or a moment store, which keep a "
                "value only if the gradient was finite",
            )
        require_same(
            trial.params[name].detach(),
            weights[name],
            f"{name}, whose gradient was not finite",
            "likely update_weight writes to the weight without asking step.valid",
        )


def _require_made(trial: Trial, clean: Trial, bad: Sequence[str]) -> None:
    """Raise CheckFailedError where the update of another tensor than the ``bad`` ones is not that of a clean run."""
    for name, p in trial.params.items():
        if name not in bad:
            require_same(
                p.detach(),
                clean.params[name].detach(),
                f"{name}, beside tensors whose gradients were not finite",
                "likely the rule keeps something outside its state, which the other tensors' updates have changed",
            )


def check_resume(subject: Subject) -> str:
    """Hold that a run goes on bit for bit from what was saved: before the first update, and between any two.

    Updates with new bases, and such without, lie on both sides of a saved state. The run that saved goes on first, so
    that what a rule keeps elsewhere is of a later update.
    """
    last = 6
    renewed = 0
    for dtype in _DTYPES:
        saved: dict[int, bytes] = {}
        trial = subject.build(dtype)
        for number in range(1, last + 1):
            if number in (1, 3, 5):
                saved[number] = _bytes([trial.optimizer.state_dict(), trial.weights()])
                renewed += sum(1 for p in trial.params.values() if _is_renewed(trial, p, number, last))
            trial.step(gradients(number))
        for first, content in saved.items():
            state, weights = torch.load(io.BytesIO(content), weights_only=True)
            resumed = subject.build(dtype)
            with torch.no_grad():
                for name, p in resumed.params.items():
                    p.copy_(weights[name])
            resumed.optimizer.load_state_dict(state)
            for number in range(first, last + 1):
                resumed.step(gradients(number))
            require_equal(
                trial,
                resumed,
                f"in {_short(dtype)}, gone on from a state saved before update {first}",
                "likely the rule keeps something outside its state (an attribute, a global), which no checkpoint has",
            )
    if renewed or all(rule.next_refresh(Step(1)) is None for rule in trial.optimizer.slots.rules):
        return ""
    return "no basis is renewed in these updates: give the rule a shorter period"


def _is_renewed(trial: Trial, p: Tensor, first: int, last: int) -> bool:
    """Return whether an update of ``p`` from number ``first`` to ``last`` begins with a new basis."""
    due = trial.optimizer.next_due(p, first)
    return due is not None and due <= last


def _bytes(value: Any) -> bytes:
    """Return what ``torch.save`` writes of a value."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


# The optimizer hands over a dict of its own. A new tensor that is put there is lost without a word, so a rule is also
# run by hand, where it can be seen.
def check_state(subject: Subject) -> str:
    """Hold that state tensors keep their names, shapes and dtypes, and are what the state on meta says; tell bytes."""
    sizes: list[str] = []
    for dtype in _DTYPES:
        trial = subject.build(dtype)
        optimizer = trial.optimizer
        forms: dict[str, Any] = {}
        for name, p in trial.params.items():
            forms[name] = _forms(state_on_meta(optimizer.slots[p], p))
            _require_kept(name, optimizer.slots[p], p)
        for number in range(_UPDATES + 1):
            if number:
                trial.step(gradients(number))
            for name, state in trial.states().items():
                if _forms(state) != forms[name]:
                    raise CheckFailedError(
                        f"the state of {name} after {number} updates is {_forms(state)}, and on meta {forms[name]}; "
                        "likely init asks for the device or for values, or an update resizes a tensor: plans, "
                        "checkpoints and shards count on shapes that follow from the parameter alone"
                    )
        weights = sum(p.numel() for p in trial.params.values())
        sizes.append(f"{optimizer.state_bytes() / weights:.2f} in {_short(dtype)}")
    return f"bytes a weight, of {weights:,}: {', '.join(sizes)}"


def _forms(state: State) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and the dtype of each state tensor, by its name."""
    return {key: (tuple(value.shape), _short(value.dtype)) for key, value in sorted(state.items())}


def _require_kept(name: str, slot: Slot, p: Tensor) -> None:
    """Raise CheckFailedError where updates, made by hand, put other tensors into the state than were there."""
    state = initial_state(slot, p)
    before = dict(state)
    for number in range(1, 4):
        step = Step(number, lr=LR, seed=slot.seed, phase=slot.phase)
        slot.rule.full_update(gradients(number)[name].to(p.dtype), state, step)
        exchanged = [key for key in before.keys() | state.keys() if state.get(key) is not before.get(key)]
        if exchanged:
            raise CheckFailedError(
                f"update {number} of {name} puts another tensor into its state as {min(exchanged)}; it would be lost: "
                "write into the tensor that is there, by step.store or a moment store"
            )


# Fake tensors have sizes and no memory, and the ledger counts them; real ones are counted by torch's allocator. State,
# weight, gradient and the table of random bits exist before, so what is compared are an update's temporaries.
def check_plan(subject: Subject) -> str:
    """Hold that one update, counted on fake tensors as a plan does, takes what torch's allocator gives out for it.

    They may be 3 % and 16 KiB apart, and weights below 16 KiB are left out. Where bases are found, an fp32 copy of the
    gradient is allowed too: a library's decomposition works in such, of which no plan knows.
    """
    checked: set[Any] = set()
    not_checked: set[str] = set()
    largest = 0
    with _known_garbage():
        for dtype in _DTYPES:
            trial = subject.build(dtype)
            for name, p in trial.params.items():
                rule = trial.optimizer.rule_of(p)
                key = (rule, p.shape, dtype)
                if isinstance(rule, Wrapped):
                    not_checked.add(rule.label)
                elif key not in checked and p.nbytes >= _PLAN_SLACK:
                    checked.add(key)
                    numbers = {1, trial.optimizer.next_due(p, 2) or 1}
                    sizes = [_require_planned(name, trial, number) for number in sorted(numbers)]
                    largest = max(largest, *sizes)
    if not_checked:
        raise NotCheckedError(f"what {', '.join(sorted(not_checked))} allocates is the class's own")
    return f"to {_PLAN_BOUND:.0%}; an update takes {largest:,} bytes beside weight, gradient and state at most"


# `allocated_peak` looks for garbage first, among all that Python has. All that was there before needs it once.
@contextmanager
def _known_garbage() -> Iterator[None]:
    """Look for garbage among new objects alone meanwhile."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _require_planned(name: str, trial: Trial, number: int) -> int:
    """Return the bytes of update ``number`` of a parameter; CheckFailedError where a plan would say another number."""
    p = trial.params[name]
    rule = trial.optimizer.rule_of(p)
    rounding = trial.optimizer.rounding
    real = _SingleUpdate(rule, p, number, rounding)
    given_out = allocated_peak(real.make)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
            fake = _SingleUpdate(rule, torch.empty_like(p), number, rounding)
            planned = sum(ledger.episode(fake.make).values())
    except Exception as error:  # whatever fake tensors or the rule raise
        raise CheckFailedError(
            f"update {number} of {name} cannot be planned: {told(error)}; likely the rule looks at a tensor's values "
            "(.item(), if tensor:, numpy), which a plan has not, and for which a GPU is waited for"
        ) from error
    slack = _PLAN_SLACK
    if real.finds_bases:
        slack += 4 * p.numel()
    if abs(planned - given_out) > _PLAN_BOUND * given_out + slack:
        raise CheckFailedError(
            f"update {number} of {name} ({_short(p.dtype)}): a plan counts {planned:,} bytes, and torch's "
            f"allocator gave out {given_out:,}; likely the rule works otherwise on fake tensors, or allocates outside "
            "of torch's operations"
        )
    return given_out


# A plan does not know whether a gradient is finite, and counts what it takes to choose on the device. On a CPU a finite
# one is looked at, and nothing is chosen. So the real gradient is finite, and said to be none.
class _SingleUpdate:
    """Is one update of one parameter with all that it needs, ready to be made."""

    def __init__(self, rule: UpdateRule, like: Tensor, number: int, rounding: str) -> None:
        self._p = torch.zeros(like.shape, dtype=like.dtype).requires_grad_()
        group = {"params": [self._p], "rule": rule}
        self._optimizer = RuleOptimizer([group], lr=LR, weight_decay=DECAY, rounding=rounding)
        self._optimizer.allocate()
        self._optimizer.state[self._p]["step"] = number - 1
        self._optimizer.random_bits(self._p, number)
        self._grad = torch.randn(like.shape).to(like.dtype)  # held here, so that its end is not a part of the update
        self._p.grad = self._grad
        self._finite = torch.zeros((), dtype=torch.bool)
        self.finds_bases = self._optimizer.is_due(self._p)

    @torch.no_grad()
    def make(self) -> None:
        """Make the update."""
        self._optimizer.pending.accumulate(self._p, compress=False)
        pending = self._optimizer.pending.get(self._p)
        assert pending is not None
        pending.finite = self._finite
        self._optimizer.update_param(self._p)


def check_rate(subject: Subject) -> str:
    """Hold that a changed learning rate is used at once, 0 changes no weight, and decay is as the rule's ``decay``."""
    for dtype in _DTYPES:
        _require_still_at_0(subject, dtype)
    whole = subject.build(torch.float32, decay=0.0)
    half = subject.build(torch.float32, decay=0.0)
    for trial, factor in ((whole, 1.0), (half, 0.5)):
        for number in range(1, 4):
            trial.step(gradients(number))
        before = trial.weights()
        for group in trial.optimizer.param_groups:
            group["lr"] *= factor
        trial.step(gradients(4))
    for name, p in whole.params.items():
        expected = before[name] + 0.5 * (p.detach() - before[name])
        require_near(
            expected,
            half.params[name].detach(),
            before[name],
            _RATE_BOUND,
            f"{name}, after the learning rate was halved, against half the way",
            "likely the rule uses a learning rate of before, or another power of it: leave the rate to the optimizer, "
            "or take step.lr and say scaled",
        )
    return _require_decay(subject)


def _require_still_at_0(subject: Subject, dtype: torch.dtype) -> None:
    """Raise CheckFailedError where an update at the learning rate 0 changes a weight."""
    trial = subject.build(dtype)
    for number in range(1, 6):
        before = trial.weights()
        if number == 4:
            for group in trial.optimizer.param_groups:
                group["lr"] = 0.0
        trial.step(gradients(number))
        if number >= 4:
            for name, p in trial.params.items():
                require_same(
                    p.detach(),
                    before[name],
                    f"{name} in {_short(dtype)} at the learning rate 0",
                    "likely the rule uses a learning rate of before, or says scaled and does not multiply by step.lr",
                )


# Let W' be the weight without decay. Decay before the update makes it W' − lr·d·W, after the update W'(1 − lr·d). In
# the gradient (l2), it is the update without decay by G + d·W. New bases would be found in G alone.
def _require_decay(subject: Subject) -> str:
    """Raise CheckFailedError where the first update with decay is not what the rule's ``decay`` says."""
    decay = 0.5
    plain = subject.build(torch.float32, decay=0.0)
    decayed = subject.build(torch.float32, decay=decay)
    summed = subject.build(torch.float32, decay=0.0)
    grads = gradients(1)
    plain.step(grads)
    decayed.step(grads)
    summed.step({name: grad + decay * summed.before[name] for name, grad in grads.items()})
    left_out: list[str] = []
    for name, p in decayed.params.items():
        slot = decayed.optimizer.slots[p]
        before = decayed.before[name]
        rate = decayed.optimizer.param_groups[slot.group]["lr"] * decay
        if slot.decay == "before":
            expected = plain.params[name].detach() - rate * before
        elif slot.decay == "after":
            expected = plain.params[name].detach() * (1 - rate)
        else:
            expected = summed.params[name].detach()
        if slot.decay == "l2" and slot.rule.next_refresh(Step(1, phase=slot.phase)) == 1:
            left_out.append(name)
            continue
        require_near(
            expected,
            p.detach(),
            before,
            _DECAY_BOUND,
            f"{name}, with a weight decay of {decay} ({slot.decay})",
            "likely update_weight leaves the decay out or applies it elsewhere than the rule's `decay` says",
        )
    return f"decay of {', '.join(left_out)} was not checked" if left_out else ""


def check_seeds(subject: Subject) -> str:
    """Hold that a seed decides on every bit, whatever torch's own generator holds; tell what another seed changes."""
    for dtype in _DTYPES:
        one = subject.build(dtype)
        other = subject.build(dtype, torch_seed=1)
        for trial in (one, other):
            for number in range(1, _UPDATES + 1):
                trial.step(gradients(number))
        require_equal(
            one,
            other,
            f"in {_short(dtype)}, run twice with one seed",
            "likely the rule draws from torch's own generator, or from Python's: draw with a torch.Generator that is "
            "seeded from step.seed and step.count",
        )
    one = subject.build(torch.float32)
    other = subject.build(torch.float32, seed=1)
    for trial in (one, other):
        for number in range(1, _UPDATES + 1):
            trial.step(gradients(number))
    changed = [name for name, p in one.params.items() if not torch.equal(p, other.params[name])]
    if not changed:
        return "another seed changes nothing in fp32"
    return f"another seed changes {', '.join(changed)} in fp32"


def _check_processes(subject: Subject) -> str:
    """Hold that two processes, sharing tensors out by rows and columns or as replicas, come to what one comes to.

    It starts two processes for one method. `run_check` asks a pair that was started for all methods of a call instead.
    """
    return Pair([subject]).check(subject)


PROCESSES = "processes"
"""The check that is made of all methods of a call at once, since processes take long to start."""
CHECKS: dict[str, Callable[[Subject], str]] = {
    "layerwise": check_layerwise,
    "accumulation": check_accumulation,
    "gradients": check_gradients,
    "clipping": check_clipping,
    "skipping": check_skipping,
    "resume": check_resume,
    "state": check_state,
    "plan": check_plan,
    PROCESSES: _check_processes,
    "rate": check_rate,
    "seeds": check_seeds,
}
"""The checks by name. Each returns what there is to tell; CheckFailedError and NotCheckedError say why it could not."""


def _trained(subject: Subject, execution: type[GlobalStep | Layerwise], dtype: torch.dtype, parts: int) -> Trial:
    """Return a trial after updates of so many micro-batches by an execution."""
    trial = subject.build(dtype)
    updates = execution(trial.optimizer)
    for number in range(1, _UPDATES + 1):
        trial.update(updates, _micro_batches(number, parts))
    return trial


def _micro_batches(number: int, count: int) -> list[dict[str, Tensor]]:
    """Return the gradients of the micro-batches of update ``number``."""
    return [gradients(number + 100 * micro_batch) for micro_batch in range(count)]


def _sum(micro_batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sum of the micro-batches' gradients, which is exact."""
    total: dict[str, Tensor] = {}
    for name in SHAPES:
        total[name] = torch.stack([grads[name] for grads in micro_batches]).sum(0)
    return total


def _norm(grads: Mapping[str, Tensor]) -> Tensor:
    """Return the norm of all gradients together."""
    norms = torch.stack([grad.norm() for grad in grads.values()])
    return torch.as_tensor(norms.norm())


def _short(dtype: torch.dtype) -> str:
    """Return a dtype's name without the package's."""
    return str(dtype).removeprefix("torch.")


def pytest_generate_tests(metafunc: Any) -> None:
    """Make a test of each check and each method of ``--method``; UsageError without any, or where one is refused."""
    import pytest

    names = list(dict.fromkeys(metafunc.config.getoption("method", default=[])))
    if not names:
        raise pytest.UsageError("no method to check: add --method METHOD")
    try:
        subjects = [load_subject(name) for name in names]
    except ValueError as error:
        raise pytest.UsageError(f"--method {error}") from error
    pair = Pair(subjects)
    cases: list[tuple[str, Subject, Pair]] = []
    for subject in subjects:
        cases += [(check, subject, pair) for check in CHECKS]
    ids = [f"{subject.name}-{check}" for check, subject, _ in cases]
    metafunc.parametrize(("check", "subject", "pair"), cases, ids=ids)


def test_method(check: str, subject: Subject, pair: Pair) -> None:
    """Hold what the check holds; pytest calls this, and nothing else does."""
    import pytest

    finding = run_check(check, subject, pair)
    if finding.status == "not checked":
        pytest.skip(finding.told)
    if finding.status == "failed":
        pytest.fail(f"{subject.name}, {check}: {finding.told}", pytrace=False)
