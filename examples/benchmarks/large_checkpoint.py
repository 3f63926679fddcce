"""Measures how fast, and in how much memory, ``moeq`` goes through checkpoints of true shapes.

    python examples/benchmarks/large_checkpoint.py mixtral-8x7b --layers 4 8

Writes a checkpoint of a model's shape for each number of layers, with random weights, and runs the
commands that need no text on it: ``plan``, ``quantize`` with ``rtn`` and ``hqq``, ``verify``. Every
run is a process of its own, and reads from the disk. Beside them stands the speed of the disk: a
plain read of the same files. Bytes are those that came from the disk: what is read twice is in the
page cache the second time, and what is not needed does not count.
"""

import argparse
import json
import resource
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from cpu_serving import forget_files
from results import RESULTS, table, write_section
from safetensors.torch import save_file

from moeq.checkpoint.families import Family, family_of
from moeq.checkpoint.reader import INDEX_NAME
from moeq.model.architecture import names_on_disk

CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral-8x7b": ("mixtral", {}),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144,
            "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        },
    ),
    "deepseek-v2-lite": (
        "deepseek_v2",
        {
            "hidden_size": 2048, "moe_intermediate_size": 1408, "intermediate_size": 10944,
            "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
            "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512,
            "q_lora_rank": None, "first_k_dense_replace": 1, "vocab_size": 102400,
        },
    ),
    "gpt-oss-120b": ("gpt_oss", {}),
}  # fmt: skip
"""Models to their ``model_type`` and what differs from transformers' own configuration."""
RANDOM_WEIGHTS = 1 << 26
"""That tensors of any size repeat: drawing all would take longer than to quantize them."""
MXFP4_SCALE = 120
"""Stored exponent of all groups of a source in MXFP4: a factor of 2^-7."""
BLOCK = 512
"""Bytes that Linux counts as one read from a disk (``ru_inblock``), pages of mapped files too."""
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Measured(NamedTuple):
    """What a command took.

    Attributes:
        seconds: By the clock.
        cores: Busy on average.
        memory: Most bytes that were resident, mapped files among them.
        private: Most bytes that were not those of a file.
        read: Bytes that came from the disk.
    """

    seconds: float
    cores: float
    memory: int
    private: int
    read: int


def parts_of(name: str, layers: int) -> tuple[dict[str, object], dict[str, Shapes]]:
    """Return ``config.json`` and the tensors as they are released, by layer."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, changes = CONFIGS[name]
    config = CONFIG_MAPPING[model_type](num_hidden_layers=layers, **changes)
    config.architectures = [type_name(config)]
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stated = config.to_dict() | {"dtype": "bfloat16"}
    family = family_of(stated)
    parts: dict[str, Shapes] = {}
    tensors = model.state_dict()
    for key, stored in names_on_disk(model, tensors).items():
        layer = stored.partition("layers.")[2].split(".")[0] if "layers." in stored else "outside"
        shape = tuple(tensors[key].shape)
        parts.setdefault(layer, {}).update(released(family, stored, shape))
    if model_type == "gpt_oss":
        stated["quantization_config"] = {"quant_method": "mxfp4"}
    return stated, parts


def type_name(config: object) -> str:
    """Return the class of vLLM and transformers for a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)


def released(family: Family, name: str, shape: tuple[int, ...]) -> Shapes:
    """Return the tensors that a release has for one of transformers, which fuses experts."""
    path, _, kind = name.rpartition(".")
    if not path.endswith("experts") or kind not in ("gate_up_proj", "down_proj"):
        return {name: (shape, torch.bfloat16)}
    if family.interleaved:  # gpt-oss: transposed in transformers, in MXFP4 as released
        experts, columns, rows = shape
        groups = (experts, rows, columns // 32)
        return {
            f"{name}_blocks": ((*groups, 16), torch.uint8),
            f"{name}_scales": (groups, torch.uint8),
        }
    container = path.removesuffix("experts") + family.experts.rpartition(".")[2]
    experts, rows, columns = shape
    matrices = (family.gate, family.up) if kind == "gate_up_proj" else (family.down,)
    return {
        f"{container}.{expert}.{matrix}.weight": ((rows // len(matrices), columns), torch.bfloat16)
        for expert in range(experts)
        for matrix in matrices
    }


def write_checkpoint(name: str, layers: int, folder: Path) -> int:
    """Write a checkpoint, a file for each layer; return its bytes."""
    config, parts = parts_of(name, layers)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(RANDOM_WEIGHTS, generator=generator).mul_(0.02).bfloat16()
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(parts.values(), start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {key: filled(key, *described, weights) for key, described in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def filled(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, weights: torch.Tensor
) -> torch.Tensor:
    """Return a tensor of weights, which begin somewhere else for each name."""
    if name.endswith("_scales"):
        return torch.full(shape, MXFP4_SCALE, dtype=dtype)
    if "norm" in name:
        return torch.ones(shape, dtype=dtype)
    source = weights.view(dtype)
    start = hash_of(name) % len(source)
    repeats = torch.cat([source[start:], source])
    count = torch.Size(shape).numel()
    while len(repeats) < count:
        repeats = torch.cat([repeats, source])
    return repeats[:count].view(shape).clone()


def hash_of(name: str) -> int:
    """Return a number of a name that is the same in every process."""
    return zlib.crc32(name.encode())


def run(*command: object) -> Measured:
    """Run a command to its end and watch its memory; nothing else may be started meanwhile.

    Raises:
        RuntimeError: It failed; shows what it said.
    """
    started, private, memory = time.perf_counter(), 0, 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.Error):  # it may just have ended
                info = watched.memory_info()
                memory = max(memory, info.rss)
                private = max(private, info.rss - info.shared)
            time.sleep(0.02)
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"{' '.join(words)} failed:\n{said.read()}")
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # exact: of processes that have ended
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    read = BLOCK * (after.ru_inblock - before.ru_inblock)
    return Measured(seconds, busy / seconds, memory, private, read)


class Step(NamedTuple):
    """A command without its paths, and what it took."""

    name: str
    took: Measured

    def row(self, layers: int) -> list[str]:
        """Return a row of the table."""
        took = self.took
        return [
            f"{layers} layers: {self.name}",
            f"{took.read / 1e9:.2f}",
            f"{took.seconds:.1f}",
            f"{60 * took.read / 1e9 / took.seconds:.2f}",
            f"{took.cores:.2f}",
            f"{took.memory / 1e9:.2f}",
            f"{took.private / 1e9:.2f}",
        ]


def from_disk(name: str, folder: Path, *command: object) -> Step:
    """Run a command on a checkpoint that is not in the page cache."""
    forget_files(folder)
    return Step(name, run(*command))


def plain_read(name: str, folder: Path) -> Step:
    """Read a checkpoint and do nothing with it: what the disk gives.

    Raises:
        RuntimeError: It came from memory, or from a disk that the system does not count.
    """
    files = [*folder.glob("*.safetensors")]
    step = from_disk(f"plain read of {name}", folder, "cat", *files)
    size = sum(path.stat().st_size for path in files)
    if step.took.read < size // 2:
        raise RuntimeError(
            f"{size} bytes of {folder} came from no disk that is counted: choose another --work"
        )
    return step


def measure(source: Path, work: Path, bits: str, methods: list[str]) -> Iterator[Step]:
    """Yield every command and plain read; ``verify`` once, on the first result."""
    plan = ("--calib", "none", "--bits", bits)
    yield plain_read("the source", source)
    yield from_disk("plan", source, "moeq", "plan", source, "-o", work / "plan.json", *plan)
    for method in methods:
        packed = work / method
        quantize = ("moeq", "quantize", source, "-o", packed, *plan, "--method", method)
        yield from_disk(f"quantize, {method}", source, *quantize)
        if method == methods[0]:
            yield plain_read("the result", packed)
            yield from_disk("verify", packed, "moeq", "verify", packed)
        shutil.rmtree(packed)
    (work / "plan.json").unlink()


def main() -> None:
    """Write, measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4], help="default 2 4")
    parser.add_argument("--bits", default="2.5", help="default 2.5")
    parser.add_argument(
        "--methods", nargs="+", choices=["rtn", "hqq"], default=["rtn", "hqq"], help="default both"
    )
    parser.add_argument("--work", type=Path, default=Path("build/large_checkpoint"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for layers in options.layers:
        shutil.rmtree(options.work, ignore_errors=True)
        source = options.work / "source"
        write_checkpoint(options.model, layers, source)
        for step in measure(source, options.work, options.bits, options.methods):
            rows.append(step.row(layers))
            print(*rows[-1], sep=" | ", flush=True)
    shutil.rmtree(options.work)
    header = [
        "command", "GB from the disk", "seconds", "GB from the disk a minute", "cores busy",
        "peak resident, GB", "of it no file's, GB",
    ]  # fmt: skip
    write_section(
        options.results, "Large checkpoints", f"large checkpoint: {options.model}",
        (
            f"Random weights in the shape of {options.model}, with fewer layers, not in the page "
            "cache before; every command once. `plan` and `quantize` read the source, `verify` the "
            "result; a plain read of the same files is what the disk gives. Counted is what came "
            "from the disk, the programs' own files too: of a file less, if not all of it was "
            "needed, and once what was read again.",
            table(header, rows),
        ),
        ("torch", "safetensors", "vllm-moeq"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
