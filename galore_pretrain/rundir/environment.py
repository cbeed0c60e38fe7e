"""What a run must say of itself to be repeated: code, versions, hardware."""

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
    """Git commit of the source tree (where there is one), versions of what computes, and the machine, without names."""
    versions: dict[str, str | None] = {
        "galore-pretrain": galore_pretrain.__version__,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    hardware: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.cpu.get_capabilities().get("cpu_name") if hasattr(torch.cpu, "get_capabilities") else None,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
        hardware["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    allocator = {name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")}
    return {
        "git": _git_state(),
        "versions": versions,
        "hardware": hardware,
        "allocator": allocator,
        "argv": sys.argv[1:],
    }


def _git_state() -> dict[str, Any] | None:
    folder = Path(galore_pretrain.__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None  # installed from a wheel, perhaps into some other project's checkout

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "changed": bool(git("status", "--porcelain", "-uno").strip()),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
