"""The safetensors files of a packed checkpoint, and what is packed in them."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from vllm_moeq.expert_buffers import ExpertBuffers, Kind, Shard
from vllm_moeq.format import (
    MANIFEST_NAME,
    BitPlan,
    FormatError,
    Projection,
    check_manifest,
    check_name,
    linear_tensors,
)
from vllm_moeq.kernels import LinearLayout, LinearWeight

_SHARDS: dict[str, Shard] = {
    "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "w1": "w1", "w3": "w3", "w2": "w2",
    "wi": "w1", "wo": "w2",
}  # fmt: skip
_KINDS: dict[str, Kind] = {
    kind: kind for kind in ("weight_packed", "weight_scale", "weight_zero_point", "bias")
}
_EXPERT = re.compile(rf"(.+)\.(\d+)\.({'|'.join(_SHARDS)})\.({'|'.join(_KINDS)})")

Read = Callable[[str], torch.Tensor]


class ExpertTensorName(NamedTuple):
    """A tensor of an expert: its name, and what it holds."""

    name: str
    expert: int
    shard: Shard
    kind: Kind


class PackedFiles:
    """Where the tensors of a packed checkpoint are.

    Args:
        paths: Its safetensors files.
        plan: Widths of its experts.

    Raises:
        FormatError: A file is damaged, or outside the folder of the first.
    """

    def __init__(self, paths: Iterable[str], plan: BitPlan) -> None:
        self.paths = [Path(path) for path in paths]
        self.folder = self.paths[0].parent
        for path in self.paths:
            if path.parent != self.folder:
                raise FormatError(f"{path} is not in {self.folder}: do not use this checkpoint")
        if (self.folder / MANIFEST_NAME).is_file():
            problems = check_manifest(self.folder, weight_sizes_only=True)
            if problems:
                raise FormatError(f"{self.folder} is damaged: {'; '.join(problems)}. Copy it again")
        self._stamps = {path: _stamp(path) for path in self.paths}
        self._path: dict[str, Path] = {}
        for path in self.paths:
            try:
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys())
                for name in names:
                    check_name(name)
                self._path |= dict.fromkeys(names, path)
            except SafetensorError as error:
                raise FormatError(f"{path} is damaged ({error}): copy it again") from error
        self.experts: dict[str, list[ExpertTensorName]] = {path: [] for path in plan.expert_bits}
        self.others: list[str] = []
        for name in self._path:
            match = _EXPERT.fullmatch(name)
            if match is not None and match[1] in self.experts:
                container, expert, matrix, kind = match.groups()
                tensor = ExpertTensorName(name, int(expert), _SHARDS[matrix], _KINDS[kind])
                self.experts[container].append(tensor)
            else:
                self.others.append(name)

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._path

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """Open the files and give a function that reads a tensor by its name.

        Raises:
            FormatError: A file is no more as it was when the model was loaded.
        """
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise FormatError(
                    f"{path} is gone or has changed since the model was loaded from it, and packed "
                    "experts are saved from there: load the model again"
                )
        with ExitStack() as stack:
            files = {
                path: stack.enter_context(safe_open(path, framework="pt")) for path in self.paths
            }
            yield lambda name: files[self._path[name]].get_tensor(name)

    def fill(
        self,
        container: str,
        buffers: ExpertBuffers,
        tensors: dict[tuple[Projection, Kind], torch.Tensor],
        read: Read,
    ) -> None:
        """Copy the experts of one layer to where they belong.

        Args:
            container: On-disk path of the experts.
            buffers: Describes the layer.
            tensors: As :meth:`ExpertBuffers.allocate` makes them.
            read: Of :meth:`opened`.

        Raises:
            FormatError: A tensor is missing, or another one than the plan promises; names it.
        """
        count = len(buffers.layout.slots)
        for name, expert, matrix, kind in self.experts[container]:
            if expert >= count or kind not in buffers.kinds:
                raise FormatError(
                    f"{self.folder}: the model has no place for {name}; its experts are {count}, "
                    f"with {', '.join(buffers.kinds)}"
                )
            shard: Shard = "w1" if matrix == "w3" and not buffers.layout.gated else matrix
            projection: Projection = "w2" if shard == "w2" else "w13"
            buffers.fill(tensors[projection, kind], kind, shard, expert, read(name), name)
        missing = buffers.missing()
        if missing:
            kind, shard, expert = missing[0]
            raise FormatError(
                f"{self.folder}: {container} lacks {len(missing)} tensors, first {shard}.{kind} of "
                f"expert {expert}. Check it with `moeq verify`"
            )

    def linear_weight(self, name: str, layout: LinearLayout, read: Read) -> LinearWeight:
        """Read the weight of a dense layer.

        Args:
            name: On disk.
            layout: Its sizes.
            read: Of :meth:`opened`.

        Raises:
            FormatError: A tensor is missing, or another one than the plan promises; names it.
        """
        bits, group_size, rows, columns = layout[:4]
        tensors = []
        for suffix, dtype, shape in linear_tensors(rows, columns, bits, group_size):
            tensor_name = f"{name}.{suffix}"
            if tensor_name not in self._path:
                raise FormatError(f"{self.folder} lacks {tensor_name}. Check it with `moeq verify`")
            tensor = read(tensor_name)
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise FormatError(
                    f"{self.folder}: {tensor_name} is {tensor.dtype} {list(tensor.shape)}, "
                    f"expected {dtype} {list(shape)} for {bits} bits and group size {group_size}"
                )
            tensors.append(tensor)
        weight = LinearWeight(*tensors[:2])
        if not weight.is_exact():
            raise FormatError(
                f"{self.folder}: float16 does not hold the scales of {name} exactly, as it does "
                "those of `moeq quantize`"
            )
        return weight


def _stamp(path: Path) -> tuple[int, int] | None:
    if not path.is_file():
        return None
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
