"""A wheel that is built from the source distribution carries its configs and tokenizer, and works from any folder."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_wheel_trains_from_another_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path), "-t"]
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True, capture_output=True)
    (sources,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sources) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sources.name.removesuffix(".tar.gz")
    subprocess.run([*build, "wheel"], cwd=unpacked, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    script = (
        "import galore_pretrain, sys; from galore_pretrain.cli import main; print(galore_pretrain.__file__); main()"
    )
    flags = "--model llama_1m --data sample --steps 1 --total-batch-size 2 --max-length 32 --eval-tokens 500"
    done = subprocess.run(
        [sys.executable, "-c", script, *flags.split(), "--dtype", "float32", "--output", "run"],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert (elsewhere / "run" / "model" / "config.json").is_file()
    names = zipfile.ZipFile(wheel).namelist()
    assert "galore_pretrain/configs/llama_7b.json" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
