"""The kernels of an update: compiled for GPUs without one, and run by Triton's interpreter in another process."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="the extra `kernels` is not installed")

FULL = bool(os.environ.get("FULL"))
INTERPRETED = Path(__file__).parent / "interpreted"
FLOATS = dict.fromkeys(("lr", "beta1", "rest1", "beta2", "rest2", "factor", "root", "eps", "decay"), "fp32")
FLOATS |= dict.fromkeys(("product_rate", "dense_rate", "keep"), "fp32")
COUNTS = dict.fromkeys(("n", "start", "rows", "columns", "rank"), "i32")
COUNTS |= dict.fromkeys(("left_row", "left_column", "right_row", "right_column"), "i32")
IN_FP32 = dict.fromkeys(("m_scales", "v_scales", "m_code", "v_code", "row_scales", "column_scales"), "*fp32")
OTHERS = {"value": "*fp32", "seed": "i64", "valid": "*u8", "table": "*i64"}
OTHERS |= {"scales": "*bf16", "new_scales": "*bf16", "largest": "*i32", "group": "i32", "groups": "i32"}
OTHERS |= {"codes": "*u8", "zeros": "*u8"}
OTHERS |= {"labels": "*i64", "losses": "*fp32", "scale": "fp32", "mask": "*u8", "limit": "i32", "key": "i64"}
OTHERS |= {"factors": "*fp32", "last": "*fp32", "multiple": "fp32", "growth": "fp32", "share": "fp32"}
TILE = {"TILE_ROWS": 64, "TILE_COLUMNS": 128, "TILE_RANK": 32}


def absent(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


DENSE = {"BLOCKS": 2, **absent("m_scales", "m_code", "v_scales", "v_code")}


KERNELS: list[tuple[str, dict[str, Any]]] = [
    ("adam", {"HAS_WEIGHT": True, "EIGHT_BIT": False, "L2": False, **DENSE, **absent("direction")}),
    ("adam", {"HAS_WEIGHT": False, "EIGHT_BIT": False, "L2": False, **DENSE, **absent("weight")}),
    ("adam", {"HAS_WEIGHT": True, "EIGHT_BIT": True, "L2": True, "BLOCKS": 2, **absent("direction")}),
    ("adam", {"HAS_WEIGHT": False, "EIGHT_BIT": True, "L2": False, "BLOCKS": 2, **absent("weight")}),
    (
        "subtract",
        {
            "HAS_PRODUCT": True,
            "HAS_DENSE": False,
            "HAS_ROW": False,
            "HAS_COLUMN": False,
            **TILE,
            **absent("dense", "row_scales", "column_scales"),
        },
    ),
    ("subtract", {"HAS_PRODUCT": True, "HAS_DENSE": True, "HAS_ROW": True, "HAS_COLUMN": True, **TILE}),
    (
        "subtract",
        {
            "HAS_PRODUCT": False,
            "HAS_DENSE": True,
            "HAS_ROW": True,
            "HAS_COLUMN": False,
            **TILE,
            **absent("left", "right", "column_scales"),
        },
    ),
    *[
        (
            "subtract",
            {
                "CODED": True,
                "WRITES": writes,
                "HAS_PRODUCT": True,
                "HAS_DENSE": False,
                "HAS_ROW": False,
                "HAS_COLUMN": False,
                **TILE,
                **absent("dense", "row_scales", "column_scales"),
            },
        )
        for writes in (False, True)
    ],
    ("add_all", {"HALVINGS": 7, "SIZE": 2048}),
    ("store", {"SIZE": 512}),
    ("cross_entropy", {"SIZE": 8192}),
    ("dropout_mask", {"SIZE": 512}),
    ("gaussian", {"SIZE": 1024}),
    ("read_codes", {"SIZE": 1024}),
    ("unpack", {"BITS": 4, "GROUP": 256, "SIZE": 1024}),
    ("unpack", {"BITS": 8, "GROUP": 256, "SIZE": 1024}),
    ("channel_factors", {"SIZE": 1024, "CHANNELWISE": True}),
    ("channel_factors", {"SIZE": 1024, "CHANNELWISE": False}),
]
TARGETS = list(itertools.product(("*bf16", "*fp32"), (80, 90)))


def cases() -> Iterator[tuple[str, dict[str, Any], str, int]]:
    """Each kernel for each card and of each dtype once; for both cards of both dtypes with FULL=1."""
    for number, (name, constants) in enumerate(KERNELS):
        for dtype, capability in TARGETS:
            if FULL or (number + (dtype == "*bf16") + (capability == 80)) % 2:
                yield name, constants, dtype, capability


def test_tables_name_arguments_of_kernels() -> None:
    """What they name otherwise is compiled with another dtype than it has."""
    from galore_pretrain.tensors import kernels

    found: set[str] = set()
    for value in vars(kernels).values():
        found |= set(getattr(value, "arg_names", ()))
    assert {*FLOATS, *COUNTS, *IN_FP32, *OTHERS} <= found


@pytest.mark.parametrize(("name", "constants", "dtype", "capability"), cases())
def test_kernels_compile_for_gpus(name: str, constants: dict[str, Any], dtype: str, capability: int) -> None:
    """For an A100 and an H100, by Triton's own compiler and ptxas; what a GPU makes of it is not seen here."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from galore_pretrain.tensors import kernels

    kernel = getattr(kernels, name)
    constants = {"HAS_VALID": True, "STOCHASTIC": dtype == "*bf16", "DECAY_FIRST": True, "IN_FP32": False, **constants}
    if name == "subtract" and "CODED" not in constants:
        constants |= {"CODED": False, "WRITES": True, **absent("scales", "new_scales", "largest")}
    constants |= {"SUM": tl.bfloat16 if dtype == "*bf16" else tl.float32, "PART": tl.bfloat16}
    signature = {}
    for argument in kernel.arg_names:
        signature[argument] = {**FLOATS, **COUNTS, **IN_FP32, **OTHERS}.get(argument, dtype)
        if argument in ("m_at", "v_at") and constants.get("EIGHT_BIT"):
            signature[argument] = "*u8"
        if argument == "weight" and constants.get("CODED"):
            signature[argument] = "*i8"
        if (name, argument) == ("read_codes", "codes"):
            signature[argument] = "*i8"
        if (name, argument) in (("gaussian", "table"), ("unpack", "scales")):
            signature[argument] = dtype
        if argument in constants:
            signature[argument] = "constexpr"
    used = {argument: value for argument, value in constants.items() if argument in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used)
    options = {"num_warps": 8} if name in ("subtract", "cross_entropy") else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 1000


@pytest.mark.slow
def test_kernels_are_right_under_the_interpreter() -> None:
    """Triton looks at TRITON_INTERPRET when it is imported, which libraries do: so these tests have a process."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
