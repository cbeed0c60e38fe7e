"""Check the plan: peaks of real updates, by two means that know nothing of the planner, beside what it says.

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
from functools import partial
from typing import Any

import torch

from galore_pretrain.config.options import Processes, RunConfig
from galore_pretrain.config.resolve import resolve
from galore_pretrain.dist import imagined, joined
from galore_pretrain.meters import process_peak_bytes
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.planning.plan import make_heaviest_updates, measure
from galore_pretrain.tensors.ledger import allocated_peak
from galore_pretrain.train.build import execution_for, model_for, optimizer_for, set_up_model


def updates(config: RunConfig, mesh: Any) -> None:
    """Make the updates that the plan is of."""
    model = model_for(config, load_model_config(config.model), mesh=mesh)
    optimizer = optimizer_for(config, set_up_model(config, model), mesh)
    execution = execution_for(config, optimizer)
    make_heaviest_updates(config, model, optimizer, execution, config.micro_batches)


def events_peak(config: RunConfig, mesh: Any) -> int:
    """Return the bytes that torch's allocator gave out at most."""
    return allocated_peak(lambda: updates(config, mesh))


def process_growth(config: RunConfig, mesh: Any) -> int:
    """Return by how many bytes the process's peak exceeded its size before there was a model."""
    gc.collect()
    # What libraries freed while they were loaded would be used again, and missing in the growth.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        _, resident_pages, *_ = file.read().split()
    before = int(resident_pages) * os.sysconf("SC_PAGE_SIZE")
    updates(config, mesh)
    return process_peak_bytes() - before


def planned_peak(config: RunConfig, mesh: Any) -> int:
    """Return the bytes that the plan says."""
    return measure(config, load_model_config(config.model), mesh).peak_bytes


MEANS = {
    "events": events_peak,
    "process": process_growth,
    "plan": planned_peak,
}


def in_fresh_process(means: str, values: dict[str, Any], threads: int, processes: int) -> int:
    """Measure one cell by one of the means in a new process, or in as many as share the model; return bytes."""
    launch = [sys.executable]
    if processes > 1 and means != "plan":
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, __file__, "--one", means, json.dumps(values)]
    environment = os.environ | {
        # Large blocks go back to the system when they are freed: else the peak of the process is the allocator's habit.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
        "OMP_NUM_THREADS": str(threads),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    *_, last_word = done.stdout.split()
    return int(last_word)


def one(means: str, values: dict[str, Any]) -> int:
    """Measure one cell in this process; return bytes."""
    warnings.simplefilter("ignore")
    processes = Processes.started()
    config, _ = resolve(values, dict.fromkeys(values, "flag"), processes)
    if means == "plan":
        with imagined(config) as mesh:
            return planned_peak(config, mesh)
    small = {
        "model": "llama_1m",
        "total_batch_size": processes.total,
        "batch_size": 1,
        "rank": None,
        "max_length": 8,
    }
    with joined(config) as world:
        # Libraries load their kernels at first use, which is not the updates' memory.
        warm_up, _ = resolve(values | small, {}, processes)
        updates(warm_up, world.mesh)
        if not world.is_main:
            # The others must take part in the updates; what they measure is not asked for.
            means = "process"
        return MEANS[means](config, world.mesh)


def line(cell: tuple[str, ...], dtype: str, threads: int, processes: int) -> str:
    """Measure one cell by all means; return its line of the table in Markdown."""
    model, row, mode, checkpointing, batch = cell
    size, total = batch.split("/")
    values = {
        "model": model,
        "optim": row,
        "layerwise": mode == "layerwise",
        "dtype": dtype,
        "data": "sample",
        "activation_checkpointing": checkpointing == "yes",
        "batch_size": int(size),
        "total_batch_size": int(total),
    }
    planned = in_fresh_process("plan", values, threads, processes)
    cells = [*cell, f"{planned / 2**20:.0f}"]
    for means in ("events", "process"):
        measured = in_fresh_process(means, values, threads, processes)
        excess = 100 * (planned / measured - 1)
        cells.append(f"{measured / 2**20:.0f} ({excess:+.1f} %)")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, or measure the one cell that another process asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama_60m", "llama_130m"])
    rows = ["adamw", "adamw8bit", "adafactor", "galore_adamw", "galore_adamw8bit"]
    parser.add_argument("--rows", nargs="+", default=rows)
    parser.add_argument("--modes", nargs="+", default=["global", "layerwise"])
    parser.add_argument("--checkpointing", nargs="+", default=["no", "yes"])
    parser.add_argument("--batches", nargs="+", default=["8/8", "4/16"], help="sequences a micro-batch / an update")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; each takes what a run takes")
    parser.add_argument("--processes", type=int, default=1, help="that share the model, by --shard full")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        means, values = arguments.one
        measured = one(means, json.loads(values))
        if os.environ.get("RANK", "0") == "0":
            print(measured)
        return
    threads = max(1, torch.get_num_threads() // (arguments.jobs * arguments.processes))
    machine = f"{platform.machine()} CPU, {threads} threads a process; torch {torch.__version__}"
    shared = f", the first of {arguments.processes} processes" if arguments.processes > 1 else ""
    print(f"{arguments.dtype}, 256 tokens a sequence, {machine}{shared}\n")
    print("| model | optimizer | updates | checkpointing | batch | plan MiB | allocator events | process grew by |")
    print("|---|---|---|---|---|---|---|---|", flush=True)

    cells = itertools.product(
        arguments.models,
        arguments.rows,
        arguments.modes,
        arguments.checkpointing,
        arguments.batches,
    )
    measure_line = partial(line, dtype=arguments.dtype, threads=threads, processes=arguments.processes)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for text in pool.map(measure_line, cells):
            print(text, flush=True)


if __name__ == "__main__":
    main()
