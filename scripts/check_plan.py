"""Is the plan true? Peaks of real updates, by two means that know nothing of the planner, beside what it says.

    python scripts/check_plan.py --models llama_60m llama_130m --dtype float32      # a table in Markdown; hours for all
    python scripts/check_plan.py --models llama_60m --rows galore_adamw --modes layerwise
    python scripts/check_plan.py --models llama_60m --batches 4/16 --processes 2    # the first of two that share it

Each cell is measured in fresh processes: once with torch's profiler, whose allocator events are summed up, and once
without it, by how far the process's resident set grew beyond what it was before the model was built. The same updates
are made as in the plan: the first, and the one in which the largest matrices have a basis due.
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from galore_pretrain.config.options import Processes, RunConfig
from galore_pretrain.config.resolve import resolve
from galore_pretrain.dist import imagined, joined
from galore_pretrain.meters import process_peak_bytes
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.planning.ledger import allocated_peak
from galore_pretrain.planning.plan import make_heaviest_updates, measure
from galore_pretrain.train.build import execution_for, model_for, optimizer_for, prepare


def updates(config: RunConfig, mesh: Any) -> None:
    model = model_for(config, load_model_config(config.model), mesh=mesh)
    optimizer = optimizer_for(config, prepare(config, model), mesh)
    make_heaviest_updates(config, model, optimizer, execution_for(config, optimizer), config.micro_batches)


def events_peak(config: RunConfig, mesh: Any) -> int:
    """What torch's allocator gave out at most."""
    return allocated_peak(lambda: updates(config, mesh))


def process_growth(config: RunConfig, mesh: Any) -> int:
    """How far the process's peak exceeded its size before there was a model."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what libraries freed while they were loaded would be used again
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    updates(config, mesh)
    return process_peak_bytes() - before


MEANS = {
    "events": events_peak,
    "process": process_growth,
    "plan": lambda c, mesh: measure(c, load_model_config(c.model), mesh).peak_bytes,
}


def in_fresh_process(means: str, values: dict[str, Any], threads: int, processes: int) -> int:
    command = [sys.executable, __file__, "--one", means, json.dumps(values)]
    if processes > 1 and means != "plan":
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command[1:1] = launch
    # Large blocks go back to the system when they are freed: else the peak of the process is the allocator's habit.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    environment |= {"OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()[-1])


def one(means: str, values: dict[str, Any]) -> int:
    warnings.simplefilter("ignore")
    processes = Processes.started()
    config, _ = resolve(values, dict.fromkeys(values, "flag"), processes)
    small = {"model": "llama_1m", "total_batch_size": processes.total, "batch_size": 1, "rank": None, "max_length": 8}
    if means == "plan":
        with imagined(config) as mesh:
            return MEANS[means](config, mesh)
    with joined(config) as world:
        updates(resolve(values | small, {}, processes)[0], world.mesh)  # libraries load their kernels at first use
        return MEANS[means](config, world.mesh) if world.is_main else MEANS["process"](config, world.mesh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama_60m", "llama_130m"])
    parser.add_argument(
        "--rows", nargs="+", default=["adamw", "adamw8bit", "adafactor", "galore_adamw", "galore_adamw8bit"]
    )
    parser.add_argument("--modes", nargs="+", default=["global", "layerwise"])
    parser.add_argument("--checkpointing", nargs="+", default=["no", "yes"])
    parser.add_argument("--batches", nargs="+", default=["8/8", "4/16"], help="sequences a micro-batch / an update")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; each takes what a run takes")
    parser.add_argument("--processes", type=int, default=1, help="that share the model, by --shard full")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        found = one(arguments.one[0], json.loads(arguments.one[1]))
        if os.environ.get("RANK", "0") == "0":
            print(found)
        return
    threads = max(1, torch.get_num_threads() // (arguments.jobs * arguments.processes))
    machine = f"{platform.machine()} CPU, {threads} threads a process; torch {torch.__version__}"
    shared = f", the first of {arguments.processes} processes" if arguments.processes > 1 else ""
    print(f"{arguments.dtype}, 256 tokens a sequence, {machine}{shared}\n")
    print("| model | optimizer | updates | checkpointing | batch | plan MiB | allocator events | process grew by |")
    print("|---|---|---|---|---|---|---|---|", flush=True)

    def line(cell: tuple[str, ...]) -> str:
        model, row, mode, checkpointing, batch = cell
        size, total = batch.split("/")
        values = {
            "model": model, "optim": row, "layerwise": mode == "layerwise", "dtype": arguments.dtype, "data": "sample",
            "activation_checkpointing": checkpointing == "yes", "batch_size": int(size), "total_batch_size": int(total),
        }  # fmt: skip
        planned, events, process = (
            in_fresh_process(name, values, threads, arguments.processes) for name in ("plan", "events", "process")
        )
        differences = [f"{x / 2**20:.0f} ({100 * (planned / x - 1):+.1f} %)" for x in (events, process)]
        return f"| {' | '.join(cell)} | {planned / 2**20:.0f} | {' | '.join(differences)} |"

    cells = itertools.product(
        arguments.models, arguments.rows, arguments.modes, arguments.checkpointing, arguments.batches
    )
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for text in pool.map(line, cells):
            print(text, flush=True)


if __name__ == "__main__":
    main()
