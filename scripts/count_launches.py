"""Count the operations that an update dispatches on a GPU, on fake tensors: each is a launch, or several small ones.

    python scripts/count_launches.py                       # llama_60m and llama_7b, one micro-batch, clipped
    python scripts/count_launches.py --model llama_350m --optim adamw --layerwise

Views and other operations that launch nothing are left out. With ``--names``, each operation is told with its number.
"""

import argparse
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from galore_pretrain.config.resolve import resolve
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.planning.plan import faked, make_update
from galore_pretrain.planning.work import LAUNCH_NOTHING
from galore_pretrain.train.build import execution_for


class Counted(TorchDispatchMode):
    """Counts operations by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation and do it."""
        del types
        name = func.overloadpacket.__name__
        if name not in LAUNCH_NOTHING:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def of_update(values: dict[str, Any], micro_batches: int = 1) -> tuple[Counter[str], Counter[str]]:
    """Return the operations of forward and backward, and of what follows: of one update, with no basis due.

    Layerwise, updates are made in backward, and counted there.
    """
    given = {"device": "cuda", "memory_budget": 80 * 2**30, "batch_size": 8, "total_batch_size": 8, "grad_clip": 1.0}
    given |= values
    config, _ = resolve(given, dict.fromkeys(given, "flag"))
    architecture = load_model_config(config.model)
    with faked(config, architecture) as (model, optimizer):
        execution = execution_for(config, optimizer)
        dues = [optimizer.next_due(p, 1) for p in optimizer.state]
        count = max((due for due in dues if due is not None), default=1) + 1
        _begin_at(count, optimizer)
        while any(optimizer.is_due(p) for p in optimizer.state):  # a lazy refresh has probes
            count += 1
            _begin_at(count, optimizer)
        complete = execution.complete
        with Counted() as before:
            after = Counted()

            def counted() -> None:
                with after:
                    complete()

            execution.complete = counted  # type: ignore[method-assign]
            make_update(config, model, execution, micro_batches)
    return before.names - after.names, after.names


def _begin_at(count: int, optimizer: RuleOptimizer) -> None:
    """Let the next update be number ``count``."""
    for state in optimizer.state.values():
        state["step"] = count - 1


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--optim", default="galore_adamw")
    parser.add_argument("--layerwise", action="store_true")
    parser.add_argument("--names", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    models = [arguments.model] if arguments.model else ["llama_60m", "llama_7b"]
    for model in models:
        values = {"model": model, "optim": arguments.optim, "layerwise": arguments.layerwise}
        if model == "llama_7b":
            values |= {"activation_checkpointing": True, "batch_size": 1, "total_batch_size": 1}
        backward, update = of_update(values)
        print(f"{model}, {arguments.optim}: {backward.total()} of forward and backward, {update.total()} of the update")
        if arguments.names:
            for name, number in update.most_common():
                print(f"    {number:6} {name}")


if __name__ == "__main__":
    main()
