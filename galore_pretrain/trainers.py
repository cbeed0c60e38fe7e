"""In other people's trainers: transformers' ``Trainer`` and those derived from it, TRL's ``SFTTrainer`` for one.

from galore_pretrain.trainers import set_optimizer

trainer = SFTTrainer(model, args=SFTConfig(optim="galore_adamw", optim_args="rank=64", …), …)
set_optimizer(trainer)

The trainer keeps what is its own: the loop, the schedule of the learning rate, checkpoints. Where updates are not
layerwise, it also sums gradients and clips them, and nothing but its optimizer is another. Layerwise, a callback does
those two. ``galore_torch`` need not be installed.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import TrainerCallback
from transformers import trainer as transformers_trainer
from transformers.trainer_utils import check_target_module_exists

from galore_pretrain.optim import Layerwise, RuleOptimizer, build_optimizer, is_projected, load_method, resolve_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

_CLIP_NORMS = ("full", "projected")
_BETAS = (0.9, 0.999)
_EPS = 1e-8
"""What transformers sets where nobody asked for betas or an epsilon: the method's own hold then."""
_WAIT_FOR_BACKWARD = {
    "fp16": "scales the loss, and gradients with it, until backward is over",
    "enable_jit_checkpoint": "may save a checkpoint when backward is over, as of an update that is still to be made",
    "auto_find_batch_size": "begins again where memory does not suffice, which may be after some weights were updated",
}
"""Arguments of the trainer that count on weights which do not change during backward, and what they do."""


def set_optimizer(
    trainer: "Trainer",
    optim: str | None = None,
    *,
    layerwise: bool | None = None,
    clip_norm: str = "full",
    **options: Any,
) -> None:
    """Have ``trainer`` train by a method of this package. Call it once, before ``trainer.train()``.

    What the trainer's own arguments (``trainer.args``) say holds: ``optim`` and ``optim_args``,
    ``optim_target_modules`` (by default attention and MLP), ``learning_rate``, ``weight_decay`` of the parameters that
    the trainer would decay, ``seed``, ``max_grad_norm``, and ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` where
    they are not transformers' defaults.

    ``optim`` names a method that transformers has no name for, such as ``"fira"`` or ``"mine.py:MyRule"``; one that
    ends in ``_layerwise`` makes layerwise updates, as ``layerwise`` does. ``options`` are those of `build_optimizer`,
    and count before the trainer's arguments. ``clip_norm="projected"`` has ``max_grad_norm`` compared with the norm of
    compressed gradients, which layerwise updates of several micro-batches need: they know no other.

    Raises ValueError for what cannot be done, with the way out.
    """
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            "the trainer has an optimizer already: leave out optimizers= and optimizer_cls_and_kwargs=, and call "
            "set_optimizer once, before train()"
        )
    asked = optim or str(trainer.args.optim.value)
    name, is_layerwise = resolve_name(asked)
    if layerwise is None:
        layerwise = is_layerwise
    _check(trainer, layerwise)
    _check_clipping(trainer.args, name, layerwise, clip_norm)

    def build(model: "PreTrainedModel") -> RuleOptimizer:
        return _built(trainer, model, name, options)

    def factory() -> Callable[..., RuleOptimizer]:  # what is no class, a trainer calls, and what that returns too
        return build

    build(trainer.model)  # what is wrong with the options is said here, and not when training begins
    trainer.optimizer_cls_and_kwargs = (factory, {})
    if layerwise:
        callback = LayerwiseUpdates(projected=clip_norm == "projected")
        trainer.callback_handler.callbacks.insert(0, callback)  # before those that report what it corrects


def _check(trainer: "Trainer", layerwise: bool) -> None:
    """Raise ValueError for a trainer whose way to train does not go together with these updates."""
    args = trainer.args
    if not hasattr(transformers_trainer, "is_optimizer_factory"):
        raise ValueError(
            f"transformers {transformers.__version__} makes optimizers of classes alone, which do not know the model: "
            "update it to 5.6 or later"
        )
    fsdp_plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    is_fsdp1 = trainer.is_fsdp_enabled and getattr(fsdp_plugin, "fsdp_version", 1) == 1
    if trainer.is_deepspeed_enabled or is_fsdp1:
        raise ValueError(
            "DeepSpeed and FSDP 1 keep parameters flattened, without the shapes of matrices: train without them, or "
            "with fsdp_version 2"
        )
    if not layerwise:
        return
    mode = args.parallel_mode.value
    if mode != "not_parallel":
        raise ValueError(
            f"layerwise updates are made by one process on one device, and the trainer's mode is {mode}: name a method "
            "without _layerwise"
        )
    for argument, what in _WAIT_FOR_BACKWARD.items():
        if getattr(args, argument, False):
            raise ValueError(
                f"{argument}=True {what}, and layerwise updates are made before that: leave it out (bf16=True is "
                "fine), or name a method without _layerwise"
            )


# The trainer clips what it finds in p.grad once backward is over. Layerwise, nothing is left there.
def _check_clipping(args: "TrainingArguments", name: str, layerwise: bool, clip_norm: str) -> None:
    """Raise ValueError where the norm that is to be clipped is not known, or ``clip_norm`` has no meaning."""
    if clip_norm not in _CLIP_NORMS:
        raise ValueError(f"clip_norm {clip_norm!r} is unknown; choose from {', '.join(_CLIP_NORMS)}")
    projects = load_method(name).projects
    clips = bool(args.max_grad_norm)
    if clip_norm == "projected":
        if not (layerwise and projects and clips):
            raise ValueError(
                "clip_norm 'projected' has a meaning for layerwise updates of a method that projects, with a "
                "max_grad_norm, alone: leave it out"
            )
    elif layerwise and projects and clips and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"layerwise updates of {args.gradient_accumulation_steps} micro-batches keep low-rank sums, which do not "
            f"tell the norm of the full gradient that max_grad_norm={args.max_grad_norm:g} is compared with: set "
            'max_grad_norm=0 in the arguments, call set_optimizer(trainer, clip_norm="projected"), or name a method '
            "without _layerwise"
        )


def _built(trainer: "Trainer", model: "PreTrainedModel", name: str, options: dict[str, Any]) -> RuleOptimizer:
    """Return the optimizer of ``model`` that the trainer's arguments ask for, as they are now."""
    args = trainer.args
    decayed = set(trainer.get_decay_parameter_names(model))
    undecayed: list[str] = []
    for parameter, _ in model.named_parameters():
        if parameter not in decayed:
            undecayed.append(parameter)
    settings: dict[str, Any] = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "undecayed": undecayed,
        "targets": _targets(args),
        "seed": args.seed,
    }
    betas = (args.adam_beta1, args.adam_beta2)
    if betas != _BETAS:
        settings["betas"] = betas
    if args.adam_epsilon != _EPS:
        settings["eps"] = args.adam_epsilon
    settings |= _parsed(args.optim_args)
    settings |= options
    return build_optimizer(model, name, **settings)


def _targets(args: "TrainingArguments") -> Callable[[str, torch.nn.Module], bool]:
    """Return which modules ``optim_target_modules`` means, of the linear ones: where it is None, the paper's."""
    wanted = args.optim_target_modules
    if wanted is None:
        return is_projected
    is_all = isinstance(wanted, str) and wanted.replace("_", "-") == "all-linear"

    def is_target(name: str, module: torch.nn.Module) -> bool:
        if not isinstance(module, torch.nn.Linear):
            return False
        return is_all or bool(check_target_module_exists(wanted, name))

    return is_target


def _parsed(optim_args: str | None) -> dict[str, Any]:
    """Return the options of a text such as ``"rank=64, scale=0.1"``. ValueError where a part of it is none."""
    options: dict[str, Any] = {}
    for part in (optim_args or "").split(","):
        if not part.strip():
            continue
        name, equals, text = part.partition("=")
        if not equals:
            raise ValueError(f'optim_args has {part.strip()!r}; write NAME=VALUE, as in "rank=64, scale=0.1"')
        options[name.strip()] = _value(text.strip())
    return options


def _value(text: str) -> Any:
    """Return the whole number, the number, or True or False that ``text`` is; any other text as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


# A trainer tells a callback when an update begins, when a micro-batch of it is over and another one follows, and when
# all are. An update at the end of an epoch may have fewer micro-batches than the arguments say. Then none of them is
# known to be the last before its backward pass, and all of the update is made by `complete`.
class LayerwiseUpdates(TrainerCallback):  # type: ignore[misc]
    """Makes the updates of a trainer inside its backward passes, and sums and clips gradients in its stead.

    ``projected`` has the norm of compressed gradients clipped. The trainer finds no gradients any more, and would log a
    norm of 0. In its place stands the norm that was clipped, or none; and, where tensors were skipped since the last
    line because their gradients were not finite, ``skipped_tensors`` counts them.
    """

    def __init__(self, *, projected: bool = False) -> None:
        self._projected = projected
        self._execution: Layerwise | None = None
        self._micro_batch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gradients of the trainer's optimizer from now on."""
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        assert isinstance(optimizer, RuleOptimizer)
        optimizer.discard()  # what a training that was broken off has left
        self._execution = Layerwise(optimizer, args.max_grad_norm or 0.0, projected=self._projected)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin an update."""
        self._begin(0, args.gradient_accumulation_steps)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the next micro-batch."""
        self._begin(self._micro_batch + 1, args.gradient_accumulation_steps)

    def _begin(self, micro_batch: int, micro_batches: int) -> None:
        """Say which backward pass is next."""
        assert self._execution is not None
        self._micro_batch = micro_batch
        self._execution.begin(micro_batch, micro_batches)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make what is left of an update. The optimizer's own step, which follows, finds nothing to do."""
        assert self._execution is not None
        self._execution.complete()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what came of the updates where the trainer wrote its norm of no gradients."""
        logs = kwargs["logs"]
        if self._execution is None or "grad_norm" not in logs:
            return
        outcome = self._execution.outcome()
        for line in (logs, state.log_history[-1]):
            if outcome.grad_norm is None:
                del line["grad_norm"]
            else:
                line["grad_norm"] = outcome.grad_norm
            if outcome.skipped:
                line["skipped_tensors"] = outcome.skipped

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave gradients to whoever wants them."""
        self._execution = None
