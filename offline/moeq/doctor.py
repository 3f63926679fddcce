"""``moeq doctor``: does what is installed fit together, and what can this machine do?"""

import logging
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from moeq.errors import MoeqError

State = Literal["ok", "note", "problem"]


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: What.
        state: ``problem`` keeps something from working; ``note`` is worth knowing.
        text: What was found, and what to do about it.
    """

    name: str
    state: State
    text: str


def findings(model: str | None, folder: Path) -> Iterator[Finding]:
    """Look at versions, kernels and memory.

    Args:
        model: Folder or hub id whose needs to compare with what there is, or None.
        folder: Where a packed checkpoint would be written.

    Yields:
        What was found; a part that fails is a problem, and the others go on.
    """
    sections = {
        "versions": _versions(),
        "vLLM": _vllm(),
        "kernels": _kernels(),
        "space": _space(folder),
    }
    if model is not None:
        sections["model"] = _needs(model, folder)
    for name, section in sections.items():
        try:
            yield from section
        except Exception as error:  # whatever is broken here is what it is to find
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(name, "problem", reason)


def _versions() -> Iterator[Finding]:
    yield Finding("Python", "ok", platform.python_version())
    needed = {}
    try:
        yield Finding("vllm-moeq", "ok", version("vllm-moeq"))
        needed = {
            requirement.name: requirement.specifier
            for requirement in map(Requirement, requires("vllm-moeq") or [])
            if requirement.marker is None
        }
    except PackageNotFoundError:
        yield Finding("vllm-moeq", "note", "not installed: it runs from a clone")
    for package in ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "scipy"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            yield Finding(package, "problem", "not installed")
            continue
        fits = package not in needed or needed[package].contains(installed, prereleases=True)
        text = installed if fits else f"{installed}, but {needed[package]} is needed"
        yield Finding(package, "ok" if fits else "problem", text)


def _vllm() -> Iterator[Finding]:
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        import vllm

        from vllm_moeq.versions import unsupported_reason

        reason = unsupported_reason()
    except ImportError as error:
        yield Finding(
            "vLLM", "note", f"{error}; to serve: pip install 'vllm-moeq[cpu]' or '[cuda]'"
        )
        return
    if reason is not None:
        yield Finding("vLLM", "problem", f"the plugin is not active: {reason}")
    else:
        yield Finding("vLLM", "ok", vllm.__version__)


def _kernels() -> Iterator[Finding]:
    import torch

    from moeq.bench import Machine
    from vllm_moeq.kernels import KERNELS, select_kernel
    from vllm_moeq.kernels.cpu.build import BuildError, find_compiler

    try:
        yield Finding("C++ compiler", "ok", " ".join(find_compiler()))
    except BuildError as error:
        yield Finding("C++ compiler", "note", f"{error}; the CPU kernel must come with the wheel")
    try:
        machine = Machine.detect()
    except MoeqError as error:
        yield Finding("CPU kernel", "problem", str(error))
        return
    name = KERNELS[machine.kernel].name
    cpu = f"{machine.processor}, {machine.cores} cores: kernel {name}, {machine.isa}"
    yield Finding("CPU", "ok" if machine.functions else "note", cpu)
    if not torch.cuda.is_available():
        yield Finding("GPU", "note", "none that torch can use")
        return
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        gpu = torch.cuda.get_device_properties(device)
        try:
            kernel, state = KERNELS[select_kernel(device)].name, "ok"
        except ValueError as error:
            kernel, state = str(error), "problem"
        text = f"{gpu.name}, {_gb(gpu.total_memory)}, sm_{gpu.major}{gpu.minor}: kernel {kernel}"
        yield Finding(f"GPU {number}", "ok" if state == "ok" else "problem", text)


def _space(folder: Path) -> Iterator[Finding]:
    from moeq.bench.machine import available_bytes

    yield Finding("memory", "ok", f"{_gb(available_bytes())} free")
    yield Finding("disk", "ok", f"{_gb(shutil.disk_usage(folder).free)} free in {folder}")


def _needs(model: str, folder: Path) -> Iterator[Finding]:
    """Compare what a model needs to be quantized and served at 2.5 bits with what there is."""
    from moeq import pipeline
    from moeq.bench.machine import available_bytes
    from moeq.checkpoint import SourceModel
    from moeq.checkpoint.sizes import plan_sizes, served_bytes
    from moeq.requests import QuantizeRequest

    output = folder / ".moeq-doctor"  # never written
    free = available_bytes()
    for text, calib in (("without text", "none"), ("with text", "default")):
        request = QuantizeRequest(model=model, output=output, calib=calib, dry_run=True)
        result = pipeline.quantize(request)
        estimate = result.estimate
        needed = estimate.memory_bytes
        yield Finding(
            f"quantize, {text}",
            "ok" if needed < free else "problem",
            f"{_gb(needed)} of memory, {_gb(free)} free",
        )
    costs = [cost.disk_bytes for cost in (estimate.measuring, estimate.rounding) if cost]
    disk = estimate.output_bytes + max(costs, default=0)
    room = shutil.disk_usage(folder).free
    yield Finding(
        "write", "ok" if disk < room else "problem", f"{_gb(disk)} of disk, {_gb(room)} free"
    )
    source = SourceModel.open(model)
    zeros = served_bytes(result.plan, source) - plan_sizes(result.plan, source).expert_bytes
    size = estimate.output_bytes + zeros
    yield Finding(
        "serve on the CPU" if result.in_vllm else "run in transformers",
        "ok" if size < free else "problem",
        f"{_gb(size)} of weights at 2.5 bits (16 bits: {_gb(estimate.source_bytes)}), "
        f"{_gb(free)} of memory free",
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
