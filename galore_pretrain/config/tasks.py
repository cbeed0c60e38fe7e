"""The tasks that a model is fine-tuned on, and the published hyper-parameters of each. No torch in here."""

from collections.abc import Mapping
from typing import Any

from galore_pretrain.optim import method

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
"""The tasks of GLUE (arXiv 1804.07461) that GaLore's paper has: sentences, or pairs of them, with a label each."""
CHAT = "chat"
"""Conversations, of which the answers are learnt."""
TASKS = (*GLUE, CHAT)

ENCODER = "FacebookAI/roberta-base"
"""What GaLore's paper fine-tunes on GLUE."""
GLUE_DATA = "hub:nyu-mll/glue"
"""What ``--data`` is where it is left out: all tasks of GLUE, on the hub."""

_GALORE = "GaLore Table 7"
_GALORE_SCRIPT = "GaLore run_glue.py"
_LORA = "LoRA (arXiv 2106.09685) Table 9"
_NATURAL = "Natural GaLore (arXiv 2410.16029), its GLUE table; the rate is the middle one of its three"
_HERE = "chosen here, untuned"

# GaLore's table has a rank of 4 with α = 4, and a rank of 8 with α = 2. Between them stands what is nearer.
_GALORE_RATES: Mapping[int, Mapping[str, float]] = {
    4: dict.fromkeys(GLUE, 1e-5) | {"mrpc": 3e-5, "cola": 3e-5},
    8: dict.fromkeys(GLUE, 1e-5) | {"sst2": 2e-5, "mrpc": 2e-5, "qqp": 2e-5, "rte": 2e-5, "stsb": 3e-5},
}
_GALORE_SCALES = {4: 4.0, 8: 2.0}
_LORA_RATES = dict.fromkeys(GLUE, 5e-4) | dict.fromkeys(("mrpc", "cola", "qnli", "stsb"), 4e-4)
_LORA_EPOCHS = {"mnli": 30, "sst2": 60, "mrpc": 30, "cola": 80, "qnli": 25, "qqp": 25, "rte": 80, "stsb": 40}
_LORA_BATCHES = dict.fromkeys(GLUE, 16) | {"cola": 32, "qnli": 32, "rte": 32}
_FULL = {"lr": (2e-5, f"{_HERE}: between the rates of {_GALORE}")}
_NATURALLY = {"epochs": (3, _NATURAL), "total_batch_size": (32, _NATURAL), "lr": (2e-5, _NATURAL)}
_ON_GLUE: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "adamw": _FULL,
    "adamw8bit": _FULL,
    "natural_galore": _NATURALLY,
    "natural_galore8bit": _NATURALLY,
    "lora": {
        "rank": (8, _LORA),
        "lora_alpha": (8.0, _LORA),
        "lora_dropout": (0.0, _HERE),
        "epochs": (_LORA_EPOCHS, _LORA),
        "total_batch_size": (_LORA_BATCHES, _LORA),
        "lr": (_LORA_RATES, _LORA),
        "warmup_steps": (None, _LORA),  # a share of a length that is not known here: `warmup_share`
    },
}
"""What methods have of their own on GLUE: values, or a table of them by tasks, and their sources."""
_WARMUP_ON_GLUE = {"lora": 0.06}
"""The share of a run in which the rate rises (Table 9)."""
_TINY_AGENT = "TinyAgent (arXiv 2409.00608)"
_ON_CHAT: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "adamw": {"lr": (2e-5, _HERE)},
    "adamw8bit": {"lr": (2e-5, _HERE)},
    "lora": {"lr": (7e-5, _TINY_AGENT), "rank": (16, _HERE)},
}
"""What methods have of their own on conversations."""

_OF_TEXT = ("layout", "documents", "text_key", "bos", "bad_data", "max_unknown", "eval_data", "eval_tokens")
_NOT_OF_GLUE = {
    **dict.fromkeys(_OF_TEXT, "a task has examples of its own, each a row"),
    "max_tokens": "a task's length is told in --epochs, or in --steps",
    "compile": "rows are as long as the longest of an update, and each length would be compiled anew",
}
_NOT_OF_CHAT = {
    "text_key": "a conversation is a whole line, with messages, or with prompt and completion",
    "bos": "the tokenizer's template says how a conversation begins",
}


def class_names(task: str) -> tuple[str, ...]:
    """Return the names of a GLUE task's classes; none where its labels are numbers."""
    from galore_pretrain.text.glue import TASKS as OF_GLUE  # numpy

    return OF_GLUE[task].class_names


def meaningless_for(task: str) -> Mapping[str, str]:
    """Return the flags that have no meaning for a task, each with the reason."""
    if task in GLUE:
        return _NOT_OF_GLUE
    return _NOT_OF_CHAT


def replaced_defaults(task: str) -> dict[str, tuple[Any, str]]:
    """Return, for flags whose default is that of pretraining, the value that a task has, and its source."""
    if task == CHAT:
        return {
            "layout": ("pack", "task chat"),
            "documents": ("separate", "task chat"),
            "max_length": (1024, _HERE),
            "eval_tokens": (200_000, _HERE),
        }
    return {
        "data": (GLUE_DATA, "task"),
        "max_length": (512, _GALORE),
        "scheduler": ("linear", _GALORE_SCRIPT),
        "dtype": ("float32", _GALORE_SCRIPT),
    }


def task_recipe(task: str, optim: str, rank: int | None) -> dict[str, tuple[Any, str]]:
    """Return the hyper-parameters of a method on a task, each with its source.

    GaLore's rank is 4 unless ``rank`` says otherwise. A method that no paper has on GLUE gets no learning rate.
    """
    if task == CHAT:
        return _of_chat(optim)
    values: dict[str, tuple[Any, str]] = {
        "epochs": (30, _GALORE),
        "total_batch_size": (32 if task == "cola" else 16, _GALORE),
        "warmup_steps": (0, _GALORE_SCRIPT),
        "weight_decay": (0.0, _GALORE_SCRIPT),
        "grad_clip": (0.0, _GALORE_SCRIPT),
    }
    entry = method(optim)
    if entry.projects:
        near = 4 if rank is None or rank < 6 else 8
        values["rank"] = (4, _GALORE)
        values["galore_scale"] = (_GALORE_SCALES[near], _GALORE)
        values["update_proj_gap"] = (500, "GaLore README")
        values["lr"] = (_GALORE_RATES[near][task], f"{_GALORE}, rank {near}")
    of_method = _ON_GLUE.get(optim, {})
    return values | {name: (_of_task(value, task), source) for name, (value, source) in of_method.items()}


def _of_task(value: Any, task: str) -> Any:
    """Return the value that a table by tasks has for a task; any other value is all tasks'."""
    return value[task] if isinstance(value, Mapping) else value


def warmup_share(task: str, optim: str) -> float:
    """Return the share of a run by epochs in which the learning rate rises."""
    if task == CHAT:
        return 0.1
    return _WARMUP_ON_GLUE.get(optim, 0.0)


def _of_chat(optim: str) -> dict[str, tuple[Any, str]]:
    """Return the hyper-parameters of conversations: length and batch are TinyAgent's, the rest is chosen here."""
    values: dict[str, tuple[Any, str]] = {
        "epochs": (3, _TINY_AGENT),
        "total_batch_size": (32, _TINY_AGENT),
        "grad_clip": (1.0, _HERE),
    }
    if method(optim).projects:
        values["lr"] = (2e-5, _HERE)
        values["galore_scale"] = (2.0, f"{_GALORE}, rank 8")
    return values | dict(_ON_CHAT.get(optim, {}))
