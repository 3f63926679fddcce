"""Every expert at every width, rounded once: plans are put together from it without rounding."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from moeq.checkpoint import MoELayer
from moeq.checkpoint.atomic import replace_file
from moeq.checkpoint.mapped import MappedFiles
from moeq.checkpoint.resume import read_note
from moeq.model import (
    ExpertMatrices,
    ExpertSource,
    LayerwiseModel,
    Routed,
    dequantized,
)
from moeq.model.device import local_workers
from moeq.progress import Progress, silent, stage
from moeq.sensitivity.expert import (
    Choice,
    MeasuredExpert,
    QuantizationError,
    RoutingStatistics,
)
from moeq.sensitivity.fisher import Traffic
from moeq.sensitivity.linear import LinearBank
from moeq.workers import Workers
from vllm_moeq.format import BitPlan, Projection


@dataclass(frozen=True, slots=True)
class Bank:
    """Rounded experts on disk, with what they do to the model.

    Attributes:
        folder: Holds a file for each layer.
        layers: The MoE layers.
        group_size: Weights that share a scale.
        errors: Of every choice.
        routing: Of each expert, by container.
    """

    folder: Path
    layers: list[MoELayer]
    group_size: int
    errors: Mapping[Choice, QuantizationError]
    routing: Mapping[str, list[RoutingStatistics]]

    def losses(self, attribute: str) -> dict[tuple[str, int, Projection, int], float]:
        """Return one attribute of the error of every choice."""
        return {choice: getattr(error, attribute) for choice, error in self.errors.items()}

    def source(
        self, plan: BitPlan, device: torch.device, linear: LinearBank | None = None
    ) -> ExpertSource:
        """Return the weights of a plan with the bank's group size and widths.

        Args:
            plan: Which.
            device: Where they are to be.
            linear: Dense layers; None leaves them as they are in the model.
        """
        files = MappedFiles()

        def widths(layer: MoELayer, expert: int) -> tuple[int, int]:
            bits = plan.expert_bits[layer.container]
            return bits.w13[expert], bits.w2[expert]

        def matrices(layer: MoELayer, expert: int) -> ExpertMatrices:
            def read(name: str, width: int) -> torch.Tensor:
                return files.tensor(_file(self.folder, layer), f"{width}.{name}")

            return dequantized(layer, expert, widths(layer, expert), plan.group_size, read, device)

        if linear is None:
            return ExpertSource(matrices, widths)
        key = plan.group_size, tuple(sorted(plan.linear_bits.items()))
        return ExpertSource(matrices, widths, key, linear.weights(plan, device))


@torch.no_grad()
def build(
    model: LayerwiseModel,
    traffic: Iterable[Traffic],
    widths: Iterable[int],
    group_sizes: Sequence[int],
    method: str,
    folder: Path,
    progress: Progress = silent,
    workers: Workers | None = None,
) -> dict[int, Bank]:
    """Round every expert at every width, by what it gets in the ORIGINAL model.

    Layers that an earlier call with the same arguments has finished in the folder are kept.

    Args:
        model: Runs the checkpoint.
        traffic: Of :func:`moeq.sensitivity.fisher.gradients`: each layer is done before the next
            is asked for.
        widths: Of the format's.
        group_sizes: Weights that share a scale, for a bank each.
        method: One of :data:`moeq.rounding.METHODS`.
        folder: Gets the rounded experts: for each group size the sum of ``widths`` / 16 of the
            experts' size.
        progress: Hears of every expert.
        workers: Run experts and round them; by default the model's device does.

    Returns:
        Banks by group size.

    Raises:
        MoeqError: A weight is not finite; names it.
    """
    widths = sorted(widths)
    workers = workers or local_workers(model.source.layers, model.device)
    folders = {group_size: folder / str(group_size) for group_size in group_sizes}
    for part in folders.values():
        part.mkdir(exist_ok=True)
    total = len(folders) * sum(layer.num_experts for layer in model.source.layers)
    with stage(progress, f"round at {len(widths)} widths ({method})", total, "expert") as advance:
        for index, routed, gradient in traffic:
            layer, gradient = model.moe_layers[index], gradient.view(routed.x.shape)
            for group_size, part in folders.items():
                if _note(part, layer).exists():
                    advance(layer.num_experts)
                else:
                    task = _Layer(model, layer, routed, gradient, widths, group_size, method)
                    _measure(task, workers, part, advance)
    layers = [model.moe_layers[index] for index in sorted(model.moe_layers)]
    return {size: _bank(part, layers, size) for size, part in folders.items()}


def _bank(folder: Path, layers: list[MoELayer], group_size: int) -> Bank:
    """Return what is complete in a folder."""
    errors: dict[Choice, QuantizationError] = {}
    routing: dict[str, list[RoutingStatistics]] = {}
    for layer in layers:
        stored = read_note(_note(folder, layer))
        errors |= {
            Choice(*choice): QuantizationError(*values) for choice, values in stored["errors"]
        }
        routing[layer.container] = [RoutingStatistics(*values) for values in stored["routing"]]
    return Bank(folder, layers, group_size, errors, routing)


class _Layer(NamedTuple):
    """A layer whose experts are measured.

    Attributes:
        model: Runs them.
        layer: Where they are.
        routed: What they get.
        gradient: Of the loss with respect to the sum of their shares [T, hidden_size].
        widths: To round them at.
        group_size: Weights that share a scale.
        method: One of :data:`moeq.rounding.METHODS`.
    """

    model: LayerwiseModel
    layer: MoELayer
    routed: Routed
    gradient: torch.Tensor
    widths: list[int]
    group_size: int
    method: str


class _Measured(NamedTuple):
    """What an expert gets, and each projection at each width: packed tensors and their error."""

    routing: RoutingStatistics
    rounded: list[tuple[Choice, dict[str, torch.Tensor], QuantizationError]]


@torch.no_grad()
def _measured(device: torch.device, task: _Layer, expert: int) -> Iterator[_Measured]:
    """Yield what becomes of one expert."""
    found = MeasuredExpert.of(task.model.on(device), task.layer, expert, task.routed, task.gradient)
    rounded = found.rounded(task.widths, task.group_size, task.method)
    yield _Measured(found.routing_statistics(), list(rounded))


def _measure(task: _Layer, workers: Workers, folder: Path, advance: Callable[[int], None]) -> None:
    """Round the experts of a layer into a file; write a note of what that does beside it."""
    tensors: dict[str, torch.Tensor] = {}
    errors: list[tuple[Choice, QuantizationError]] = []
    routing: list[RoutingStatistics] = []
    for found in workers.flat_map(_measured, task, range(task.layer.num_experts)):
        routing.append(found.routing)
        for choice, weights, error in found.rounded:
            tensors |= {f"{choice.bits}.{name}": tensor for name, tensor in weights.items()}
            errors.append((choice, error))
        advance(1)
    replace_file(_file(folder, task.layer), lambda target: save_file(tensors, target))
    measured = json.dumps({"errors": errors, "routing": routing})
    # Comes last: where it is, the layer is complete.
    replace_file(_note(folder, task.layer), lambda target: target.write_text(measured))


def _file(folder: Path, layer: MoELayer) -> Path:
    return folder / f"layer-{layer.index:05}.safetensors"


def _note(folder: Path, layer: MoELayer) -> Path:
    return _file(folder, layer).with_suffix(".json")
