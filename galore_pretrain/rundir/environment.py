"""Describe what a run has to say of itself so that it can be repeated: its code, versions and hardware."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import galore_pretrain

_PACKAGES = ("torch", "transformers", "datasets", "sentencepiece", "bitsandbytes", "wandb", "numpy")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return the git commit of the source tree, versions, the hardware and the command line, in plain JSON values.

    The machine's own name and its user's are left out: what a run leaves is often published.
    """
    allocator = {}
    for name, value in os.environ.items():
        if name.endswith("_ALLOC_CONF"):  # PYTORCH_CUDA_ALLOC_CONF and its like
            allocator[name] = value
    return {
        "git": _git_state(),
        "versions": _versions(),
        "hardware": _hardware(device),
        "allocator": allocator,
        "argv": sys.argv[1:],
    }


def _versions() -> dict[str, str | None]:
    """Return the versions of everything that computes; None for a package that is not installed."""
    versions: dict[str, str | None] = {
        "galore-pretrain": galore_pretrain.__version__,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # which says for what it was built, too
    return versions


def _hardware(device: torch.device) -> dict[str, Any]:
    """Return the system, the CPU, and the GPU if ``device`` is one."""
    cpu = None
    if hasattr(torch.cpu, "get_capabilities"):
        cpu = torch.cpu.get_capabilities().get("cpu_name")
    hardware: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
        hardware["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return hardware


def _git_state() -> dict[str, Any] | None:
    """Return the commit of the source tree, and whether files were changed since; None where there is no git."""
    package = Path(galore_pretrain.__file__).resolve().parent
    # git itself would also look in the folders above: a wheel may be installed inside another project's checkout.
    if not (package.parent / ".git").exists():
        return None
    try:
        commit = _git(package, "rev-parse", "HEAD")
        changes = _git(package, "status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed": bool(changes)}


def _git(folder: Path, *arguments: str) -> str:
    """Return what a git command prints in ``folder``, without the white space around it."""
    command = ["git", "-C", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.strip()
