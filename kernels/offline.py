"""Compiles kernels for GPUs that are not there, and reads what the assembler says of them."""

# ruff: noqa: ANN401 - Triton's objects have no common type

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel for one architecture.

    Attributes:
        target: the architecture PTX was made for, such as "sm_90a".
        ptx: its text.
        shared: bytes of shared memory, from Triton's metadata.
        registers: per thread.
        spill_stores, spill_loads: bytes moved to local memory for want of registers.
        stack: bytes of local memory per thread.
    """

    target: str
    ptx: str
    shared: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int


def compile_for(
    capability: int, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]
) -> Compiled:
    """Compiles a Triton function for CUDA ``capability`` (80, 90, 100); needs no GPU.

    Args:
        types: Triton's name of each argument's type ("*bf16", "i32", "fp32").
        constants: values of the ``constexpr`` arguments.

    Raises:
        RuntimeError: the assembler refused the PTX.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature=signature, constexprs=dict(constants))
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    ptx = str(built.asm["ptx"])
    found = re.search(r"\.target\s+(sm_\w+)", ptx)
    target = found.group(1) if found else f"sm_{capability}"
    said = _assemble(ptx, target, capability)
    return Compiled(
        target=target,
        ptx=ptx,
        shared=int(built.metadata.shared),
        registers=_number(r"Used (\d+) registers", said),
        spill_stores=_number(r"(\d+) bytes spill stores", said),
        spill_loads=_number(r"(\d+) bytes spill loads", said),
        stack=_number(r"(\d+) bytes stack frame", said),
    )


def _assemble(ptx: str, target: str, capability: int) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [tool if tool.exists() else "ptxas", "-v", f"-arch={target}", path]
        out = [*command, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(out, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ptxas refused the kernel for {target}: {done.stderr.strip()}")
    return done.stderr + done.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the assembler's report has no {pattern!r}: {text[:500]}")
    return int(found.group(1))
