"""Compiles Triton kernels for GPUs that are not there, and reads the machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)")


@dataclass(frozen=True)
class GpuCode:
    """What the compiler made of a kernel.

    Attributes:
        registers: Of a thread.
        spilled: Bytes of a thread in local memory.
        shared: Bytes of shared memory of a program.
        instructions: How often each occurs, with its modifiers.
        loops: The same for each innermost loop with a matrix instruction.
    """

    registers: int
    spilled: int
    shared: int
    instructions: Counter[str]
    loops: list[Counter[str]]

    def count(self, name: str) -> int:
        """Return how often instructions occur whose name begins so."""
        return _count(self.instructions, name)


def compile_kernel(
    kernel: Any,
    arch: int,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    **options: int,
) -> GpuCode:
    """Compile for compute capability ``arch``, such as 90.

    Args:
        kernel: A function under ``triton.jit``.
        arch: Compute capability without the point.
        pointers: Types of the arguments that are tensors, aligned to 16 bytes.
        constants: Arguments that the code is made for. All others are integers; those that do not
            change from call to call are multiples of 16.
        options: ``num_warps``, ``num_stages``.
    """
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
    }
    changing = kernel.do_not_specialize or ()
    aligned = [n for n in names if n not in constants and n not in changing and n != "top_k"]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage)
    assert found
    lines = code.splitlines()
    return GpuCode(
        registers=int(found[1]),
        spilled=int(found[2]),
        shared=compiled.metadata.shared,
        instructions=_instructions(lines),
        loops=[loop for loop in map(_instructions, _loops(lines)) if _count(loop, "H", "MMA")],
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], capture_output=True, text=True, check=True
    ).stdout


def _instructions(lines: list[str]) -> Counter[str]:
    return Counter(found[1] for found in map(_INSTRUCTION.search, lines) if found)


def _count(instructions: Counter[str], name: str, part: str = "") -> int:
    return sum(n for key, n in instructions.items() if key.startswith(name) and part in key)


def _loops(lines: list[str]) -> list[list[str]]:
    """Return the lines from each label to a branch back to it that hold no other such loop."""
    labels = {
        found[1]: number
        for number, line in enumerate(lines)
        if (found := re.match(r"\s*(\.L_x_\d+):", line))
    }
    spans = [
        (labels[found[1]], number)
        for number, line in enumerate(lines)
        if (found := re.search(r"BRA.*`\((\.L_x_\d+)\)", line))
        and labels.get(found[1], number) < number
    ]
    return [
        lines[first : last + 1]
        for first, last in spans
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans)
    ]
