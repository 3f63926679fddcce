"""Rounds experts with what they get: layer by layer, quantized layers feeding the next."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from moeq.allocation import plan_sizes
from moeq.checkpoint import CheckpointReader
from moeq.errors import MoeqError
from moeq.families import Matrix, MoELayer
from moeq.layerwise import LayerwiseModel, Routed
from moeq.rounding import REFINEMENT, QuantizedWeight, quantize_gptq, quantize_hqq
from vllm_moeq._version import __version__
from vllm_moeq.format import BitPlan, LayerBits

FEWEST_TOKENS = 32
"""An expert that gets fewer calibration tokens is rounded without them: so few say more about
themselves than about the expert."""
_HESSIAN_COPIES = 4
"""Square matrices in memory while one is factored."""
_STATE, _FINGERPRINT = "state.json", "fingerprint.json"

Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class Calibration:
    """Rounds all experts of a checkpoint with GPTQ, one layer at a time.

    What is finished lies in ``folder``, one file for each layer, with the activations that the
    next layer gets: a run that was killed goes on after its last finished layer and gives the
    same bytes.

    Attributes:
        reader: The checkpoint.
        layers: Its MoE layers.
        plan: Widths of the experts.
        tokens: int64 [n, L]: the calibration text.
        device: Where layers run and experts are rounded.
        fewest_tokens: See :data:`FEWEST_TOKENS`.
        coverage: How many tokens reach each expert, by container of the layers done so far.
    """

    reader: CheckpointReader
    layers: list[MoELayer]
    plan: BitPlan
    tokens: torch.Tensor
    device: str = "cpu"
    fewest_tokens: int = FEWEST_TOKENS
    coverage: dict[str, list[int]] = field(default_factory=dict)

    @property
    def activation_bytes(self) -> int:
        """Bytes of hidden states, and again of the experts' inputs; both may go to the disk."""
        return 4 * self.tokens.numel() * self.layers[0].hidden_size

    @property
    def disk_bytes(self) -> int:
        """Bytes of files that go at the end: finished layers, activations and their snapshots."""
        packed = plan_sizes(self.plan, self.reader, self.layers).expert_bytes
        return packed + 4 * self.activation_bytes

    @property
    def operations(self) -> float:
        """About how many floating-point operations rounding takes; attention is left out."""
        total = 0.0
        for layer in self.layers:
            for _, matrix, _ in layer.weights():
                rows, columns = layer.shape(matrix)
                refined = 4 * (1 + REFINEMENT.rounds)  # feedback, and the rounds after it
                total += rows * columns**2 * refined + 4 * columns**3
        # At most: the experts' products and Hessians, if every token went to two of them.
        layer = self.layers[0]
        weights = 3 * layer.hidden_size * layer.intermediate_size
        hessians = layer.hidden_size**2 + layer.intermediate_size**2
        return total + 4 * self.tokens.numel() * len(self.layers) * (weights + hessians)

    @property
    def uncalibrated(self) -> int:
        """Experts that were rounded without calibration because too few tokens reach them."""
        return sum(
            count < self.fewest_tokens for counts in self.coverage.values() for count in counts
        )

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the memory in use beyond Python and torch themselves."""
        largest = max(self.layers, key=lambda layer: layer.intermediate_size)
        hidden, inner = largest.hidden_size, largest.intermediate_size
        # All tokens may choose the same expert.
        activations = 4 * self.tokens.numel() * (hidden + 3 * inner)
        weights = 4 * 3 * hidden * inner
        return (
            2 * self.activation_bytes
            + activations
            + 3 * weights
            + 4 * _HESSIAN_COPIES * max(hidden, inner) ** 2
        )

    @torch.inference_mode()
    def run(self, folder: Path, resume: bool, progress: bool = True) -> None:
        """Round all experts.

        Args:
            folder: Gets the finished layers; see :meth:`stored`.
            resume: Go on with what is there; otherwise it is overwritten.
            progress: Show a progress bar.

        Raises:
            MoeqError: A weight or an activation is not finite, or what is there was made from
                something else; names it.
        """
        folder.mkdir(exist_ok=True)
        self._check_fingerprint(folder, resume)
        model = LayerwiseModel(self.reader, self.layers, torch.device(self.device))
        shape = (*self.tokens.shape, self.layers[0].hidden_size)
        hidden, x = (_memory(folder / name, shape) for name in ("hidden.bin", "x.bin"))
        done = self._restore(folder, hidden) if resume else 0
        if done == 0:
            model.embed(self.tokens, hidden)
        else:
            model.embed(self.tokens[:1], x[:1])  # for what layers get beside hidden states
        last = max(layer.index for layer in self.layers)
        experts = sum(layer.num_experts for layer in self.layers if layer.index >= done)
        with tqdm(total=experts, desc="round", unit="expert", disable=not progress) as bar:
            for index in range(done, last + 1):
                routed = model.run(index, hidden, x)
                if not torch.isfinite(hidden).all():
                    raise MoeqError(
                        f"{self.reader.folder}: layer {index} gives NaN or infinity on the "
                        "calibration text; are its weights finite?"
                    )
                if routed is not None:
                    layer = model.moe_layers[index]
                    tensors: Tensors = {}
                    for stored in self._round_layer(model, layer, routed, hidden):
                        tensors |= stored
                        bar.update()
                    _save_tensors(_layer_file(folder, layer), tensors)
                self._save(folder, index + 1, hidden)

    def stored(self, folder: Path) -> Callable[[str], Tensors]:
        """Return what reads the packed tensors of a weight by its name, after :meth:`run`."""
        files: list[Any] = [
            safe_open(_layer_file(folder, layer), framework="pt") for layer in self.layers
        ]
        file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118

        def read(weight: str) -> Tensors:
            names = QuantizedWeight.names(weight)
            return {name: file_of[name].get_tensor(name) for name in names}

        return read

    def _round_layer(
        self, model: LayerwiseModel, layer: MoELayer, routed: Routed, hidden: torch.Tensor
    ) -> Iterator[Tensors]:
        """Round the experts of a layer, and add their outputs to ``hidden``."""
        counts = []
        flat = hidden.view(-1, hidden.shape[-1])
        for expert in range(layer.num_experts):
            places, weights = routed.of_expert(expert)
            counts.append(len(places))
            x, weights = routed.x[places].to(model.device), weights.to(model.device)
            stored, output = self._round_expert(model, layer, expert, x, weights)
            flat.index_add_(0, places, (output * weights).to(flat.device))
            yield stored
        self.coverage[layer.container] = counts

    def _round_expert(
        self,
        model: LayerwiseModel,
        layer: MoELayer,
        expert: int,
        x: torch.Tensor,
        router_weights: torch.Tensor,
    ) -> tuple[Tensors, torch.Tensor]:
        """Return the packed tensors of an expert, and what it gives for its tokens x."""
        bits: LayerBits = self.plan.expert_bits[layer.container]
        original = model.matrices(layer, expert)
        stored: Tensors = {}

        def rounded(inputs: torch.Tensor, width: int, *names: Matrix) -> list[torch.Tensor]:
            """Round matrices with the same inputs; keep what is stored, return the weights."""
            matrix = torch.cat([getattr(original, name) for name in names])
            try:
                quantized = self._quantize(matrix, inputs, router_weights, width)
            except ValueError as error:
                name = layer.tensor_name(expert, names[0])
                raise MoeqError(f"{self.reader.folder}: cannot quantize {name}: {error}") from error
            parts = (tensor.chunk(len(names)) for tensor in quantized)
            for name, *tensors in zip(names, *parts, strict=True):
                weight = QuantizedWeight(*(tensor.cpu().contiguous() for tensor in tensors))
                stored.update(weight.named(layer.tensor_name(expert, name)))
            return list(quantized.dequantize(width).chunk(len(names)))

        gate, up = rounded(x, bits.width("w13", expert), "gate", "up")
        inner = model.expert_hidden(gate, up, x)
        (down,) = rounded(inner, bits.width("w2", expert), "down")
        return stored, inner @ down.T

    def _quantize(
        self, matrix: torch.Tensor, x: torch.Tensor, router_weights: torch.Tensor, bits: int
    ) -> QuantizedWeight:
        if len(x) < self.fewest_tokens:
            return quantize_hqq(matrix, bits, self.plan.group_size)
        # An error counts as much as the router weight that it is multiplied with, squared.
        weighted = x * router_weights
        return quantize_gptq(matrix, weighted.T @ weighted, len(x), bits, self.plan.group_size)

    def _check_fingerprint(self, folder: Path, resume: bool) -> None:
        """Check that files in the folder come from the same work."""
        files = {info.file for info in self.reader.tensors.values()}
        stats = {name: (self.reader.folder / name).stat() for name in sorted(files)}
        fingerprint = {
            "moeq version": __version__,
            "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "config.json": self.reader.config,
            "plan": {key: asdict(bits) for key, bits in self.plan.expert_bits.items()},
            "group size": self.plan.group_size,
            "calibration text": hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest(),
            "device": self.device,
            "fewest tokens": self.fewest_tokens,
        }
        fingerprint = json.loads(json.dumps(fingerprint))
        path = folder / _FINGERPRINT
        if resume and path.exists():
            old = json.loads(path.read_text())
            changed = [name for name in fingerprint if fingerprint[name] != old.get(name)]
            if changed:
                raise MoeqError(
                    f"cannot resume: the unfinished run had another {', another '.join(changed)}; "
                    "use the same options, or leave out --resume to start again"
                )
        _replace(path, lambda target: target.write_text(json.dumps(fingerprint)))

    def _save(self, folder: Path, done: int, hidden: torch.Tensor) -> None:
        """Note that the layers before ``done`` are finished; a kill at any time loses only one."""
        snapshot = _snapshot(folder, done)
        _save_tensors(snapshot, {"hidden": hidden})
        state = json.dumps({"done": done, "coverage": self.coverage})
        _replace(folder / _STATE, lambda target: target.write_text(state))
        for old in folder.glob("hidden-*.safetensors"):
            if old != snapshot:
                old.unlink()

    def _restore(self, folder: Path, hidden: torch.Tensor) -> int:
        """Go on where an earlier run ended; return the first layer to do."""
        if not (folder / _STATE).exists():
            return 0
        state: dict[str, Any] = json.loads((folder / _STATE).read_text())
        self.coverage = state["coverage"]
        done = int(state["done"])
        hidden.copy_(load_file(_snapshot(folder, done))["hidden"])
        return done


def _layer_file(folder: Path, layer: MoELayer) -> Path:
    return folder / f"layer-{layer.index:05}.safetensors"


def _snapshot(folder: Path, done: int) -> Path:
    return folder / f"hidden-{done:05}.safetensors"


def _memory(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Return float32 memory that the system may write to a file when it needs the space."""
    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)


def _save_tensors(path: Path, tensors: Tensors) -> None:
    def write(target: Path) -> None:
        save_file(tensors, target)

    _replace(path, write)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is either complete or not there."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    write(unfinished)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)
