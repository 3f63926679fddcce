"""Writes the packed checkpoint, tensor by tensor."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from safetensors.torch import save_file

from moeq.checkpoint.disk_errors import named_in_errors
from moeq.checkpoint.families import expert_widths
from moeq.checkpoint.fits import check_plan_fits
from moeq.checkpoint.linear import copied_weights, linear_widths
from moeq.checkpoint.model_card import SOURCE_PRECISION, write_model_card
from moeq.checkpoint.precision import unquantized
from moeq.checkpoint.reader import INDEX_NAME
from moeq.checkpoint.servable import served_config
from moeq.checkpoint.sizes import with_sizes
from moeq.checkpoint.source import SourceModel
from moeq.errors import MoeqError
from moeq.progress import Progress, silent, stage
from moeq.requests import DEFAULT_SHARD_SIZE
from moeq.units import parse_size
from moeq.workers import Threads, Workers
from vllm_moeq.format import (
    MANIFEST_NAME,
    BitPlan,
    CheckpointConfig,
    guarded,
    linear_bytes,
    packed_bytes,
    write_manifest,
)

DEFAULT_SHARD_BYTES = parse_size(DEFAULT_SHARD_SIZE, "max_shard_size")
_WORKING_BYTES_PER_WEIGHT = 5
"""Copies of one weight while it is quantized: codes, packed codes and float chunks."""
_WEIGHTS_AT_ONCE = 2**24
_WORKERS = len(os.sched_getaffinity(0))


class PackedSource(Protocol):
    """Where packed weights come from. Threads, or other processes, call it at the same time."""

    def packed(self, weight: str, bits: int) -> dict[str, torch.Tensor]:
        """Return the packed tensors of an expert's weight by name.

        Raises:
            MoeqError: It cannot be quantized; names it.
        """

    def packed_linear(self, weight: str, bits: int) -> dict[str, torch.Tensor]:
        """Return those of the weight of a dense layer."""


class _Job(NamedTuple):
    """One source tensor: what becomes of it and the bytes that it takes in the output."""

    name: str
    become: Literal["kept", "expert", "linear", "copied"]
    bits: int
    output_bytes: int


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checked conversion, ready to be written.

    Attributes:
        source: The model.
        plan: Widths that fit it.
        shards: Source tensors in the order of the output, split into output files.
    """

    source: SourceModel
    plan: BitPlan
    shards: list[list[_Job]]

    @classmethod
    def prepare(
        cls, source: SourceModel, plan: BitPlan, shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> "Conversion":
        """Check the plan and decide what goes into which file, from headers alone.

        Raises:
            MoeqError: The plan does not fit the model.
        """
        check_plan_fits(plan, source.layers)
        copied = copied_weights(plan, source.linear)
        widths, of_linear = expert_widths(plan, source.layers), linear_widths(plan)
        shards: list[list[_Job]] = [[]]
        filled = 0
        # In file order, so that each source shard is read once from start to end.
        for name, info in source.reader.tensors.items():
            if name in widths:
                rows, columns = info.shape
                size = packed_bytes(rows, columns, widths[name], plan.group_size)
                job = _Job(name, "expert", widths[name], size)
            elif name in of_linear:
                rows, columns = info.shape
                size = linear_bytes(rows, columns, of_linear[name], plan.group_size)
                job = _Job(name, "copied" if name in copied else "linear", of_linear[name], size)
            else:
                job = _Job(name, "kept", 0, info.num_bytes)
            if shards[-1] and filled + job.output_bytes > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(job)
            filled += job.output_bytes
        for _ in source.reader.other_files():  # refuses links now rather than after all the work
            pass
        # A plan that somebody edited, or made for a sister model, states other sizes.
        conversion = cls(source, with_sizes(plan, source), shards)
        if source.precision is not None:
            note = f"{source.precision}: dequantized to bfloat16"
            if copied:
                note += f", but for {len(copied)} dense layers, which are copied"
            conversion = conversion.noting(SOURCE_PRECISION, note)
        if source.left_out:
            note = f"{len(source.left_out)} tensors of prediction layers, as {source.left_out[0]}"
            conversion = conversion.noting("left_out", note)
        return conversion

    def noting(self, name: str, text: str) -> "Conversion":
        """Return the same conversion with a note in the provenance of its plan."""
        provenance = self.plan.provenance
        details = {**provenance.details, name: text}
        plan = replace(self.plan, provenance=replace(provenance, details=details))
        return replace(self, plan=plan)

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(job.output_bytes for shard in self.shards for job in shard)

    @property
    def memory_bytes(self) -> int:
        """Estimate of the memory in use beyond Python and torch themselves.

        One output file is collected in memory while each core quantizes one source tensor.
        """
        largest_tensor = max(
            torch.Size(self.source.reader.tensors[job.name].shape).numel()
            for shard in self.shards
            for job in shard
        )
        largest_shard = max(sum(job.output_bytes for job in shard) for shard in self.shards)
        return largest_shard + _WORKERS * _WORKING_BYTES_PER_WEIGHT * largest_tensor

    def write(
        self,
        folder: Path,
        weights: PackedSource,
        reports: Mapping[str, Any] | None = None,
        progress: Progress = silent,
        workers: Workers | None = None,
    ) -> None:
        """Write the packed checkpoint into a folder, which is created.

        Args:
            folder: What is in it is not complete before this returns.
            weights: Packs those of experts, and of dense layers that the plan names.
            reports: What there is to know beside the weights: JSON by the name of a file.
            progress: Called after every tensor.
            workers: Read and pack tensors, all else is done here; by default the cores of this
                machine do.

        Raises:
            MoeqError: A weight cannot be quantized; names it.
            OSError, SafetensorError: The disk is full or fails.
        """
        folder.mkdir()
        for name, report in (reports or {}).items():
            _write_json(folder / name, report)
        weight_map: dict[str, str] = {}
        reader = self.source.reader
        # One tensor to a thread, torch single-threaded inside: its chunks are too small to split,
        # and OpenMP threads that wait for a busy core cost more than they bring.
        workers = workers or Threads([torch.device("cpu")] * _WORKERS, cores=1)
        task = _Tensors(self.source, weights, self.plan.group_size)
        with stage(progress, "write", self.source.num_bytes, "B") as advance:
            for number, shard in enumerate(self.shards, start=1):
                file = f"model-{number:05}-of-{len(self.shards):05}.safetensors"
                tensors: dict[str, torch.Tensor] = {}
                with closing(workers.flat_map(_converted, task, shard)) as converted:
                    for job, result in zip(shard, converted, strict=True):
                        tensors |= result
                        advance(reader.tensors[job.name].num_bytes)
                with named_in_errors(folder / file):
                    save_file(tensors, folder / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(tensors, file)
        index = {
            "metadata": {"total_size": self.output_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / INDEX_NAME, index)
        for path in reader.other_files():
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(reader.folder / path, folder / path)
        config = unquantized(served_config(reader.config))
        config["quantization_config"] = CheckpointConfig(self.plan).to_dict()
        _write_json(folder / "config.json", guarded(config))
        for file in set(weight_map.values()):
            # safetensors makes files that only their owner may read.
            shutil.copymode(folder / "config.json", folder / file)
        encodes = self.source.layers[0].family.encodes
        with named_in_errors(folder / "README.md"):
            write_model_card(folder, self.plan, self.source.name, encodes)
        with named_in_errors(folder / MANIFEST_NAME):
            write_manifest(folder)


class _Tensors(NamedTuple):
    """Where tensors come from: those that are kept or copied, and those that are packed."""

    source: SourceModel
    weights: PackedSource
    group_size: int


def _converted(
    device: torch.device, task: _Tensors, job: _Job
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield what becomes of one source tensor, by name."""
    if job.become == "expert":
        yield task.weights.packed(job.name, job.bits)
    elif job.become == "linear":
        yield task.weights.packed_linear(job.name, job.bits)
    elif job.become == "copied":
        yield task.source.integers(job.name, task.group_size).named(job.name)
    else:
        tensor = task.source.tensor(job.name)
        # A part at a time: the mask of an embedding would take half its memory.
        if any(part.isnan().any() for part in torch.split(tensor.flatten(), _WEIGHTS_AT_ONCE)):
            raise MoeqError(f"{task.source.folder}: {job.name} holds NaN: get the checkpoint again")
        yield {job.name: tensor}


def _write_json(path: Path, data: object) -> None:
    with named_in_errors(path):
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
