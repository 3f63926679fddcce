"""Compiles Triton kernels for GPUs that are not there, and reads the machine code."""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

OLD_TRITON = Path(__file__).parents[2] / ".venv" / "triton-3.6"
"""Triton of the oldest supported vLLM; ``tests/run.sh`` installs it."""
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?([A-Z0-9_.]+).*?)\s*;")
_A_REGISTERS = 4
"""Of a thread, of the left operand of a matrix instruction with 16 columns of two bytes."""


@dataclass(frozen=True)
class GpuCode:
    """What the compiler made of a kernel.

    Attributes:
        registers: Of a thread.
        shared: Bytes of shared memory of a program.
        instructions: How often each occurs, with its modifiers.
        loops: The same for each innermost loop with a matrix instruction.
        overwritten: Instructions of these loops that write registers while a matrix instruction
            still reads them.
    """

    registers: int
    shared: int
    instructions: Counter[str]
    loops: list[Counter[str]]
    overwritten: list[str]

    @property
    def spills(self) -> int:
        """Instructions that move registers to local memory or back."""
        return _spills(self.instructions)

    @property
    def spills_in_loops(self) -> int:
        """Those of them that run again and again."""
        return sum(map(_spills, self.loops))

    def count(self, name: str) -> int:
        """Return how often instructions occur whose name begins so."""
        return _count(self.instructions, name)


@contextmanager
def compiler(triton: Path | None) -> Iterator[ProcessPoolExecutor]:
    """Start a process that compiles with the Triton in a folder; None takes the installed one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        version = pool.submit(_import_triton, triton).result()
        assert triton is None or f"triton-{version}".startswith(triton.name)
        yield pool


def _import_triton(folder: Path | None) -> str:
    """Import Triton, from a folder if one is given, and return its version."""
    if folder is not None:  # PYTHONPATH would not do: a spawned process gets the parent's sys.path
        sys.path.insert(0, str(folder))
    import triton

    version: str = triton.__version__
    return version


def compile_kernel(
    name: str,
    arch: int,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    **options: int,
) -> GpuCode:
    """Compile for compute capability ``arch``, such as 90.

    Args:
        name: Module and name of a function under ``triton.jit`` in ``vllm_moeq.kernels.triton``.
        arch: Compute capability without the point.
        pointers: Types of the arguments that are tensors, aligned to 16 bytes.
        constants: Arguments that the code is made for. All others are integers; those that do not
            change from call to call are multiples of 16.
        options: ``num_warps``, ``num_stages``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = name.split(".")
    kernel = getattr(import_module(f"vllm_moeq.kernels.triton.{module}"), function)
    names = kernel.arg_names
    constants = {key: value for key, value in constants.items() if key in names}
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
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        lines = _run(tools / "nvdisasm", "-c", file.name).splitlines()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
    found = re.search(r"REG:(\d+)", usage)
    assert found
    loops = [loop for loop in _loops(lines) if _count(_instructions(loop), "H", "MMA")]
    return GpuCode(
        registers=int(found[1]),
        shared=compiled.metadata.shared,
        instructions=_instructions(lines),
        loops=[_instructions(loop) for loop in loops],
        overwritten=[line for loop in loops for line in overwritten(loop)],
    )


def overwritten(loop: list[str]) -> list[str]:
    """Return instructions that write registers while an HGMMA still reads its left operand there.

    HGMMA runs on while the program goes on, until WARPGROUP.DEPBAR waits for all groups but so
    many; ``gsb0`` ends a group.
    """
    texts = [found[1] for found in map(_INSTRUCTION.search, loop) if found]
    flying: list[tuple[range, bool]] = []
    wrong = []
    for text in texts * 2:  # what one turn has started may still run in the next
        if found := re.search(r"HGMMA\S* R\d+, R(\d+), gdesc", text):
            first = int(found[1])
            flying.append((range(first, first + _A_REGISTERS), "gsb0" in text))
        elif found := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", text):
            ends = [place for place, (_, ends) in enumerate(flying, 1) if ends]
            flying = flying[([0, *ends])[max(0, len(ends) - int(found[1], 16))] :]
        else:
            written = _written(text)
            if any(set(written) & set(registers) for registers, _ in flying):
                wrong.append(text)
    return wrong


def _written(text: str) -> range:
    """Return the registers that an instruction writes, if it writes any."""
    found = re.match(r"(?:@!?U?P\w+\s+)?([A-Z0-9_.]+) R(\d+)", text)
    if not found or found[1].startswith(("ST", "RED")):
        return range(0)
    count = 1
    if found[1].startswith("LDSM"):
        number = found[1].rsplit(".", 1)[1]
        count = int(number) if number.isdigit() else 1
    elif ".128" in found[1]:
        count = 4
    elif ".64" in found[1] or ".WIDE" in found[1]:
        count = 2
    return range(int(found[2]), int(found[2]) + count)


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(lines: list[str]) -> Counter[str]:
    return Counter(found[2] for found in map(_INSTRUCTION.search, lines) if found)


def _spills(instructions: Counter[str]) -> int:
    return _count(instructions, "STL") + _count(instructions, "LDL")


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
