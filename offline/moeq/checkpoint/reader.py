"""Reads a Hugging Face checkpoint tensor by tensor; never builds the model."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from moeq.checkpoint.mapped import Index, MappedFiles
from moeq.errors import MoeqError
from vllm_moeq.format import FormatError, check_inside, check_name, read_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of each safetensors type."""
FLOATS = ("F16", "BF16", "F32")
"""Types of weights that are not in lower precision."""
_CHAT_TEMPLATES = "additional_chat_templates"


class TensorInfo(NamedTuple):
    """What a shard's header says about a tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size on disk.

        Raises:
            MoeqError: moeq does not read the type.
        """
        if self.dtype not in _DTYPES:
            raise MoeqError(f"{self.file} holds a tensor of type {self.dtype}: moeq reads no such")
        return _DTYPES[self.dtype] * math.prod(self.shape)


class Integers(NamedTuple):
    """A matrix of integers around zero, as compressed-tensors stores it.

    Attributes:
        bits: Width of a weight.
        group_size: Weights of a row that share a scale.
        words: Reads the packed weights, int32 [N, K * bits / 32].
        scale: Reads the scales [N, K / group_size].
    """

    bits: int
    group_size: int
    words: Callable[[], torch.Tensor]
    scale: Callable[[], torch.Tensor]


class Reading(NamedTuple):
    """How a tensor is read.

    Attributes:
        info: What it is once it has been read.
        read: Reads it, or the part of it that an index selects.
        integers: The same before it is dequantized, if it is such a matrix.
    """

    info: TensorInfo
    read: Callable[..., torch.Tensor]
    integers: Integers | None = None


def resolve_model(model: str) -> Path:
    """Return the folder of a local path or hub id, downloading what a conversion needs.

    Raises:
        MoeqError: Neither a folder nor a hub model.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise MoeqError(f"{model} is a file; give the folder of a checkpoint or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "original/*"]
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MoeqError(f"{model} is no folder here and no model on the hub: {reason}") from error


class CheckpointReader:
    """Lazy access to the tensors of a sharded checkpoint.

    Attributes:
        folder: Where it lies.
        config: Its ``config.json``.
        tensors: What is in it, by name.
        integers: Those of its matrices that are stored as integers, before they are dequantized.

    Args:
        folder: Holds ``config.json`` and safetensors files.

    Raises:
        MoeqError: A missing or damaged file; names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        index = folder / INDEX_NAME
        weight_map: Mapping[str, str] | None = None
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise MoeqError(f"{index} has no weight_map")
            with _as_moeq_error():
                files = sorted({check_inside(file, index) for file in weight_map.values()})
        elif (folder / SINGLE_NAME).is_file():
            files = [SINGLE_NAME]
        else:
            advice = ""
            if any(folder.glob("*.bin")):
                advice = (
                    ". Its weights are in .bin files: load it with transformers once, and "
                    "`save_pretrained` it into a folder"
                )
            raise MoeqError(
                f"{folder} has neither {INDEX_NAME} nor {SINGLE_NAME}; moeq reads safetensors "
                f"checkpoints only{advice}"
            )
        self._files = MappedFiles()
        self._names = files
        self.tensors: dict[str, TensorInfo] = {}
        self.integers: dict[str, Integers] = {}
        for file in files:
            with _named_errors(folder / file):
                handle = self._files.open(folder / file)
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                view = handle.get_slice(name)
                shape = tuple(view.get_shape())
                with _as_moeq_error():
                    check_name(name)
                self.tensors[name] = TensorInfo(file, view.get_dtype(), shape)
        for name, file in (weight_map or {}).items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise MoeqError(f"{index} promises {name} in {file}, but it is not there")

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Raises:
            MoeqError: There is no such tensor, or its file has gone; names it.
        """
        return self.stored(name, self.info(name).file)

    def stored(self, name: str, file: str, index: Index | None = None) -> torch.Tensor:
        """Return a tensor of a file, or the part of it that an index selects.

        Raises:
            MoeqError: The file has gone or is damaged; names it.
        """
        path = self.folder / file
        with _named_errors(path):
            return self._files.tensor(path, name, index)

    def info(self, name: str) -> TensorInfo:
        """Return what the header says about one tensor.

        Raises:
            MoeqError: There is no such tensor.
        """
        if name not in self.tensors:
            raise MoeqError(f"{self.folder}: tensor {name} is missing from the checkpoint")
        return self.tensors[name]

    def file_stats(self) -> dict[str, list[int]]:
        """Return size and time of change of every file with tensors, to tell other ones apart."""
        stats = {name: (self.folder / name).stat() for name in self._names}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def other_files(self) -> Iterator[Path]:
        """Yield the files, relative to the folder, that belong into a converted checkpoint.

        These are all files beside the weights, and transformers' folder of chat templates; other
        folders of a repository hold code and pictures.

        Raises:
            MoeqError: One is a link that leads out of the checkpoint.
        """
        paths = (*self.folder.iterdir(), *self.folder.glob(f"{_CHAT_TEMPLATES}/*"))
        # The hub's cache has files beside the folder, and links to them in it.
        here = self.folder.resolve()
        homes = (here, here.parent.parent / "blobs")
        for path in sorted(path for path in paths if path.is_file()):
            skipped = (
                path.name.startswith(".")
                or path.name in ("config.json", INDEX_NAME)
                or path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
            )
            if skipped:
                continue
            target = path.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                raise MoeqError(
                    f"{path} is a link to {target}, outside the checkpoint, and would be copied "
                    "into the result: put the file itself there, or remove the link"
                )
            yield path.relative_to(self.folder)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        MoeqError: The file is missing, unreadable or no JSON object; names it.
    """
    try:
        with _as_moeq_error():
            return read_object(path)
    except FileNotFoundError:
        raise MoeqError(f"{path} is missing") from None
    except OSError as error:
        raise MoeqError(f"cannot read {path}: {error}") from error


@contextmanager
def _as_moeq_error() -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise MoeqError(str(error)) from error


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Name a file that cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise MoeqError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise MoeqError(f"{path} is truncated or damaged ({error}); get it again") from error
