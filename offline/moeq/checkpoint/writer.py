"""Writes the packed checkpoint, tensor by tensor, and makes it appear all at once."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from moeq.allocation import with_sizes
from moeq.calibration.calibration import Calibration
from moeq.checkpoint.families import MoELayer, check_plan_fits, expert_widths
from moeq.checkpoint.model_card import write_model_card
from moeq.checkpoint.reader import INDEX_NAME, CheckpointReader
from moeq.checkpoint.workspace import clear, locked, used_bytes
from moeq.errors import MoeqError
from moeq.rounding import Rounding, quantize_rtn
from vllm_moeq.format import (
    BitPlan,
    CheckpointConfig,
    packed_bytes,
    write_manifest,
)

CALIBRATION_NAME = "moeq_calibration.json"
"""What each expert got of the calibration text; beside the packed weights."""
DEFAULT_SHARD_BYTES = 2 << 30
_WORKING_BYTES_PER_WEIGHT = 5
"""Copies of one weight while it is quantized: codes, packed codes and float chunks."""
_WORKERS = len(os.sched_getaffinity(0))

Convert = Callable[[str, int], dict[str, torch.Tensor]]
"""Takes a weight's name and width; returns its packed tensors by name."""


class _Job(NamedTuple):
    """One source tensor: what becomes of it and the bytes that it takes in the output."""

    name: str
    bits: int | None
    output_bytes: int


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checked conversion, ready to run.

    Attributes:
        reader: The source checkpoint.
        layers: Its MoE layers.
        plan: Widths that fit them.
        shards: Source tensors in the order of the output, split into output files.
    """

    reader: CheckpointReader
    layers: list[MoELayer]
    plan: BitPlan
    shards: list[list[_Job]]

    @classmethod
    def prepare(
        cls,
        reader: CheckpointReader,
        layers: list[MoELayer],
        plan: BitPlan,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> "Conversion":
        """Check the plan and decide what goes into which file, from headers alone.

        Raises:
            MoeqError: The plan does not fit the model.
        """
        check_plan_fits(plan, layers)
        widths = expert_widths(plan, layers)
        shards: list[list[_Job]] = [[]]
        filled = 0
        # In file order, so that each source shard is read once from start to end.
        for name, info in reader.tensors.items():
            if name in widths:
                rows, columns = info.shape
                size = packed_bytes(rows, columns, widths[name], plan.group_size)
                job = _Job(name, widths[name], size)
            else:
                job = _Job(name, None, info.num_bytes)
            if shards[-1] and filled + job.output_bytes > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(job)
            filled += job.output_bytes
        # A plan that somebody edited, or made for a sister model, states other sizes.
        return cls(reader, layers, with_sizes(plan, reader, layers), shards)

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
    def peak_memory_bytes(self) -> int:
        """Estimate of the memory in use beyond Python and torch themselves.

        One output file is collected in memory while each core quantizes one source tensor.
        """
        largest_tensor = max(
            torch.Size(self.reader.tensors[job.name].shape).numel()
            for shard in self.shards
            for job in shard
        )
        largest_shard = max(sum(job.output_bytes for job in shard) for shard in self.shards)
        return largest_shard + _WORKERS * _WORKING_BYTES_PER_WEIGHT * largest_tensor

    def run(
        self,
        output: Path,
        source: str,
        rounding: Rounding | Calibration = quantize_rtn,
        resume: bool = False,
        progress: bool = True,
    ) -> None:
        """Write the packed checkpoint to ``output``, which appears only when it is complete.

        Everything is written to a hidden folder beside it, which is renamed at the end. A failed
        run removes that folder; what a killed run left there is removed by the next one. The
        layers that a calibration has finished are in another one, so that it can be resumed.

        Args:
            output: Folder to create.
            source: The model as the user named it, for the model card.
            rounding: One of :data:`moeq.rounding.DATA_FREE`, or a calibration of this plan.
            resume: Go on where a calibration that failed or was killed ended.
            progress: Show a progress bar.

        Raises:
            MoeqError: ``output`` exists, another run is writing it, the disk is full, or a weight
                cannot be quantized; names the file or tensor.
        """
        check_output_is_free(output)
        calibrated = output.parent / f".{output.name}.moeq-calibration"
        self._check_disk(output, rounding, calibrated)
        try:
            with _work_folder(output) as work:
                if isinstance(rounding, Calibration):
                    rounding.run(calibrated, resume, progress)
                    read = rounding.stored(calibrated)
                    _write_json(work / CALIBRATION_NAME, rounding.summary())
                    self._write(work, source, lambda name, _: read(name), progress)
                else:
                    shutil.rmtree(calibrated, ignore_errors=True)
                    self._write(work, source, partial(self._round, rounding), progress)
                _sync(work)
                check_output_is_free(output)
                work.rename(output)
                _sync_one(output.parent)
                shutil.rmtree(calibrated, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise MoeqError(f"cannot write {output}: {error}") from error

    def _check_disk(self, output: Path, rounding: Rounding | Calibration, calibrated: Path) -> None:
        needed = self.output_bytes
        if isinstance(rounding, Calibration):
            needed += rounding.disk_bytes
        # What an unfinished run left is either gone on with or removed.
        needed -= used_bytes(calibrated)
        parent = output.parent
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise MoeqError(
                f"cannot write {output}: it takes {needed:,} bytes, {parent} has {free:,} bytes "
                "free"
            )

    def _write(self, work: Path, source: str, convert: Convert, progress: bool) -> None:
        weight_map: dict[str, str] = {}
        total = sum(info.num_bytes for info in self.reader.tensors.values())
        with (
            tqdm(total=total, unit="B", unit_scale=True, desc="write", disable=not progress) as bar,
            # One tensor to a thread, torch single-threaded inside: its chunks are too small to
            # split, and OpenMP threads that wait for a busy core cost more than they bring.
            ThreadPoolExecutor(_WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            for number, shard in enumerate(self.shards, start=1):
                file = f"model-{number:05}-of-{len(self.shards):05}.safetensors"
                tensors: dict[str, torch.Tensor] = {}
                converted = pool.map(lambda job: self._convert(job, convert), shard)
                for job, result in zip(shard, converted, strict=True):
                    tensors |= result
                    bar.update(self.reader.tensors[job.name].num_bytes)
                save_file(tensors, work / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(tensors, file)
        index = {
            "metadata": {"total_size": self.output_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(work / INDEX_NAME, index)
        for path in self.reader.other_files():
            (work / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.reader.folder / path, work / path)
        config = {
            **self.reader.config,
            "quantization_config": CheckpointConfig(self.plan).to_dict(),
        }
        _write_json(work / "config.json", config)
        for file in set(weight_map.values()):
            # safetensors makes files that only their owner may read.
            shutil.copymode(work / "config.json", work / file)
        write_model_card(work, self.plan, source)
        write_manifest(work)

    def _convert(self, job: _Job, convert: Convert) -> dict[str, torch.Tensor]:
        if job.bits is None:
            return {job.name: self.reader.tensor(job.name)}
        return convert(job.name, job.bits)

    def _round(self, rounding: Rounding, name: str, bits: int) -> dict[str, torch.Tensor]:
        try:
            quantized = rounding(self.reader.tensor(name), bits, self.plan.group_size)
        except ValueError as error:
            raise MoeqError(f"{self.reader.folder}: cannot quantize {name}: {error}") from error
        return quantized.named(name)


def check_output_is_free(output: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        MoeqError: ``output`` exists, or the folder that it is to be in does not.
    """
    if os.path.lexists(output):
        raise MoeqError(f"--output {output} exists already; remove it or choose another name")
    if not output.absolute().parent.is_dir():
        raise MoeqError(
            f"cannot write {output}: the folder {output.parent} of --output does not exist; "
            "create it first"
        )


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Give a hidden, empty folder beside ``output`` for this run alone; remove it at the end."""
    work = output.parent / f".{output.name}.moeq-partial"
    with locked(work, f"another `moeq quantize` is writing {output}"):
        try:
            clear(work)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    """Force a folder to disk, so that the rename cannot overtake what it contains."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
