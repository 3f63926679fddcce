"""Rounds experts with what they get: layer by layer, quantized layers feeding the next."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from moeq.allocation import plan_sizes
from moeq.checkpoint import CheckpointReader
from moeq.errors import MoeqError
from moeq.families import Matrix, MoELayer
from moeq.fisher import check_finite, mapped
from moeq.layerwise import LayerwiseModel, Routed
from moeq.rounding import REFINEMENT, Curvature, QuantizedWeight, quantize_gptq, quantize_hqq
from vllm_moeq._version import __version__
from vllm_moeq.format import BitPlan, Projection

FEWEST_TOKENS = 32
"""An expert that gets fewer calibration tokens is rounded without them: so few say more about
themselves than about the expert."""
_HESSIAN_COPIES = 4
"""Square matrices in memory while one is factored."""
_WEIGHT_COPIES = 7
"""float32 copies of an expert's weights while it is rounded."""
_STATE, _FINGERPRINT = "state.json", "fingerprint.json"

Tensors = dict[str, torch.Tensor]


class Coverage(NamedTuple):
    """What the router gives to each expert of a layer on the calibration text.

    Attributes:
        tokens: How many tokens.
        weight: Sum of their router weights.
    """

    tokens: list[int]
    weight: list[float]


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
        route_all: Round each expert by all tokens, as if the router had chosen it for each of
            them, instead of by those that it gets.
        fewest_tokens: See :data:`FEWEST_TOKENS`.
        coverage: By container of the layers done so far.
    """

    reader: CheckpointReader
    layers: list[MoELayer]
    plan: BitPlan
    tokens: torch.Tensor
    device: str = "cpu"
    route_all: bool = False
    fewest_tokens: int = FEWEST_TOKENS
    coverage: dict[str, Coverage] = field(default_factory=dict)

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
        # The experts' products and Hessians, for every token that they are rounded by.
        layer = self.layers[0]
        choices = int(self.reader.config.get("num_experts_per_tok", layer.num_experts))
        if self.route_all:
            choices = layer.num_experts
        weights = _weights(layer)
        hessians = layer.hidden_size**2 + layer.intermediate_size**2
        passes = 2 * choices * self.tokens.numel() * len(self.layers)
        return total + passes * (weights + hessians)

    @property
    def uncalibrated(self) -> int:
        """Experts that were rounded without calibration because too few tokens reach them."""
        return sum(
            not self._is_calibrated(count)
            for coverage in self.coverage.values()
            for count in coverage.tokens
        )

    def summary(self) -> dict[str, Any]:
        """Return as JSON what each expert got of the calibration text."""
        return {
            "tokens": self.tokens.numel(),
            "fewest_tokens": self.fewest_tokens,
            "route_all_experts": self.route_all,
            "experts": {name: found._asdict() for name, found in self.coverage.items()},
        }

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the memory in use beyond Python and torch themselves."""
        largest = max(self.layers, key=_working_bytes)
        hidden, inner = largest.hidden_size, largest.intermediate_size
        # All tokens may choose the same expert.
        activations = 4 * self.tokens.numel() * (hidden + 3 * inner)
        batch = 2 * largest.num_experts * _weights(largest)
        return 2 * self.activation_bytes + activations + max(batch, _working_bytes(largest))

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
        hidden, x = (mapped(folder / name, shape) for name in ("hidden.bin", "x.bin"))
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
                check_finite(model, index, hidden)
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
        shares = [routed.of_expert(expert) for expert in range(layer.num_experts)]
        self.coverage[layer.container] = Coverage(
            [len(places) for places, _ in shares],
            [float(weights.sum()) for _, weights in shares],
        )
        flat = hidden.view(-1, hidden.shape[-1])
        for batch in self._batches(layer):
            for expert, (stored, output) in self._round_batch(model, layer, batch, routed).items():
                places, weights = shares[expert]
                flat.index_add_(0, places, output.to(flat.device) * weights)
                yield stored

    def _is_calibrated(self, tokens: int) -> bool:
        """Tell whether an expert that gets so many tokens is rounded by what it gets."""
        return (self.tokens.numel() if self.route_all else tokens) >= self.fewest_tokens

    def _batches(self, layer: MoELayer) -> Iterator[list[int]]:
        """Yield experts to be rounded at once: of equal widths, all with calibration or none."""
        # As many as take no more memory than the 16-bit weights of the layer, but at least one.
        size = max(1, 2 * layer.num_experts * _weights(layer) // _working_bytes(layer))
        bits = self.plan.expert_bits[layer.container]
        alike: dict[tuple[int, int, bool], list[int]] = {}
        for expert, count in enumerate(self.coverage[layer.container].tokens):
            key = bits.w13[expert], bits.w2[expert], self._is_calibrated(count)
            alike.setdefault(key, []).append(expert)
        for experts in alike.values():
            yield from (experts[i : i + size] for i in range(0, len(experts), size))

    def _round_batch(
        self, model: LayerwiseModel, layer: MoELayer, experts: list[int], routed: Routed
    ) -> dict[int, tuple[Tensors, torch.Tensor]]:
        """Return of each expert its packed tensors, and what it gives for the tokens it gets."""
        originals = [model.matrices(layer, expert) for expert in experts]
        x, weights = [], []
        for expert in experts:
            places, router_weights = routed.of_expert(expert)
            x.append(routed.x if self.route_all else routed.x[places])
            weights.append(torch.ones(len(routed.x), 1) if self.route_all else router_weights)
        x, weights = ([part.to(model.device) for part in parts] for parts in (x, weights))
        stored: list[Tensors] = [{} for _ in experts]

        def rounded(
            inputs: list[torch.Tensor], projection: Projection, *names: Matrix
        ) -> list[torch.Tensor]:
            """Round matrices with the same inputs; keep what is stored, return the weights."""
            bits = self.plan.expert_bits[layer.container].width(projection, experts[0])
            matrices = [torch.cat([getattr(o, name) for name in names]) for o in originals]
            try:
                quantized = self._quantize(matrices, inputs, weights, bits)
            except ValueError as error:
                where = ", ".join(layer.tensor_name(expert, names[0]) for expert in experts)
                raise MoeqError(
                    f"{self.reader.folder}: cannot quantize {where}: {error}"
                ) from error
            for expert, found, tensors in zip(experts, quantized, stored, strict=True):
                for name, weight in zip(names, found.parts(len(names)), strict=True):
                    tensors.update(weight.named(layer.tensor_name(expert, name)))
            return [found.dequantize(bits) for found in quantized]

        gates_and_ups = rounded(x, "w13", "gate", "up")
        inner = []
        for matrix, tokens in zip(gates_and_ups, x, strict=True):
            gate, up = matrix.chunk(2)
            inner.append(model.expert_hidden(gate, up, tokens))
        downs = rounded(inner, "w2", "down")
        if self.route_all:
            inner = [
                every[routed.of_expert(expert)[0]]
                for every, expert in zip(inner, experts, strict=True)
            ]
        outputs = (tokens @ down.T for tokens, down in zip(inner, downs, strict=True))
        return dict(zip(experts, zip(stored, outputs, strict=True), strict=True))

    def _quantize(
        self,
        matrices: list[torch.Tensor],
        inputs: list[torch.Tensor],
        router_weights: list[torch.Tensor],
        bits: int,
    ) -> list[QuantizedWeight]:
        counts = [len(x) for x in inputs]
        if min(counts) < self.fewest_tokens:
            return [quantize_hqq(matrix, bits, self.plan.group_size) for matrix in matrices]
        # An error counts as much as the router weight that it is multiplied with, squared.
        weighted = (x * weight for x, weight in zip(inputs, router_weights, strict=True))
        hessians = torch.stack([x.T @ x for x in weighted])
        curvature = Curvature.of(hessians, counts)
        return quantize_gptq(torch.stack(matrices), curvature, bits, self.plan.group_size)

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
            "choice of --route-all-experts": self.route_all,
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
        self.coverage = {key: Coverage(*value) for key, value in state["coverage"].items()}
        done = int(state["done"])
        hidden.copy_(load_file(_snapshot(folder, done))["hidden"])
        return done


def _weights(layer: MoELayer) -> int:
    """Return the number of weights of one expert."""
    return 3 * layer.hidden_size * layer.intermediate_size


def _working_bytes(layer: MoELayer) -> int:
    """Return about how much memory rounding one expert takes."""
    columns = max(layer.hidden_size, layer.intermediate_size)
    return 4 * (_HESSIAN_COPIES * columns**2 + _WEIGHT_COPIES * _weights(layer))


def _layer_file(folder: Path, layer: MoELayer) -> Path:
    return folder / f"layer-{layer.index:05}.safetensors"


def _snapshot(folder: Path, done: int) -> Path:
    return folder / f"hidden-{done:05}.safetensors"


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
