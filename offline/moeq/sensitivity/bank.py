"""Every expert at every width, rounded once: plans are put together from it without rounding."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from moeq.calibration.calibration import FEWEST_TOKENS
from moeq.checkpoint.families import Matrix, MoELayer
from moeq.checkpoint.mapped import MappedFiles
from moeq.checkpoint.workspace import replace_file
from moeq.errors import MoeqError
from moeq.evaluation.reference import ExpertSource, dequantized, run_layer
from moeq.model.layerwise import ExpertMatrices, LayerwiseModel, Routed
from moeq.rounding import DATA_FREE, Curvature, QuantizedWeight, quantize_gptq, quantize_hqq
from vllm_moeq.format import PROJECTIONS, BitPlan, Projection

_MATRICES: dict[Projection, tuple[Matrix, ...]] = {"w13": ("gate", "up"), "w2": ("down",)}


class Choice(NamedTuple):
    """A projection of an expert at a width."""

    container: str
    expert: int
    projection: Projection
    bits: int


class Damage(NamedTuple):
    """What one projection of one expert at a lower width does, all else being original.

    Attributes:
        weight: Squared errors of its weights.
        output: Squared errors of the layer's output, as a sum over the calibration tokens.
        loss: Estimate of the increase of the model's divergence from itself, in nats per token:
            half of the squared products of output errors and gradients (see ``moeq.sensitivity``).
    """

    weight: float
    output: float
    loss: float


class Traffic(NamedTuple):
    """What the router gives to an expert.

    Attributes:
        frequency: Share of the tokens.
        weight: Mean router weight of these tokens.
    """

    frequency: float
    weight: float


@dataclass(frozen=True, slots=True)
class Bank:
    """Rounded experts on disk, with what they do to the model.

    Attributes:
        folder: Holds a file for each layer.
        layers: The MoE layers.
        group_size: Weights that share a scale.
        damage: Of every choice.
        traffic: Of each expert, by container.
    """

    folder: Path
    layers: list[MoELayer]
    group_size: int
    damage: Mapping[Choice, Damage]
    traffic: Mapping[str, list[Traffic]]

    def losses(self, attribute: str) -> dict[tuple[str, int, Projection, int], float]:
        """Return one attribute of the damage of every choice."""
        return {choice: getattr(found, attribute) for choice, found in self.damage.items()}

    def source(self, plan: BitPlan, device: torch.device) -> ExpertSource:
        """Return the experts of a plan with the bank's group size and widths."""
        files = MappedFiles()

        def widths(layer: MoELayer, expert: int) -> tuple[int, int]:
            bits = plan.expert_bits[layer.container]
            return bits.w13[expert], bits.w2[expert]

        def matrices(layer: MoELayer, expert: int) -> ExpertMatrices:
            def read(name: str, width: int) -> torch.Tensor:
                return files.tensor(_file(self.folder, layer), f"{width}.{name}")

            return dequantized(layer, expert, widths(layer, expert), read, device)

        return ExpertSource(matrices, widths)


@torch.no_grad()
def build(
    model: LayerwiseModel,
    tokens: torch.Tensor,
    widths: Iterable[int],
    group_size: int,
    method: str,
    gradients: list[torch.Tensor],
    folder: Path,
    progress: bool = True,
) -> Bank:
    """Round every expert at every width, by what it gets in the ORIGINAL model.

    Layers that an earlier call with the same arguments has finished in the folder are kept.

    Args:
        model: Runs the checkpoint.
        tokens: int64 [n, L]: calibration text.
        widths: Of the format's.
        group_size: Weights that share a scale.
        method: ``gptq``, or one of :data:`moeq.rounding.DATA_FREE`.
        gradients: Of :func:`moeq.sensitivity.fisher.gradients` for the same tokens.
        folder: Gets the rounded experts: together the sum of ``widths`` / 16 of the experts' size.
        progress: Show a progress bar.

    Raises:
        MoeqError: A weight is not finite; names it.
    """
    widths = sorted(widths)
    hidden, x = torch.empty(2, *tokens.shape, model.hidden_size)
    model.embed(tokens, hidden)
    damage: dict[Choice, Damage] = {}
    traffic: dict[str, list[Traffic]] = {}
    layers = [model.moe_layers[index] for index in sorted(model.moe_layers)]
    total = sum(layer.num_experts for layer in layers)
    with tqdm(total=total, desc=f"bank ({method})", unit="expert", disable=not progress) as bar:
        for index in range(layers[-1].index + 1):
            routed = run_layer(model, index, hidden, x, [ExpertSource.original(model)])
            if routed is None:
                continue
            layer = model.moe_layers[index]
            measured = _file(folder, layer).with_suffix(".json")
            if measured.exists():
                bar.update(layer.num_experts)
            else:
                gradient = gradients[index].view(routed.x.shape)
                experts = (
                    _Visit.of(model, layer, expert, routed, gradient)
                    for expert in range(layer.num_experts)
                )
                _measure(experts, widths, group_size, method, _file(folder, layer), bar)
            found = json.loads(measured.read_text())
            damage |= {Choice(*choice): Damage(*values) for choice, values in found["damage"]}
            traffic[layer.container] = [Traffic(*values) for values in found["traffic"]]
    return Bank(folder, layers, group_size, damage, traffic)


def _measure(
    experts: Iterable["_Visit"],
    widths: list[int],
    group_size: int,
    method: str,
    file: Path,
    bar: Any,
) -> None:
    """Round the experts of a layer into a file; write what that does into a JSON file beside it."""
    stored: dict[str, torch.Tensor] = {}
    damage: list[tuple[Choice, Damage]] = []
    traffic: list[Traffic] = []
    for visit in experts:
        traffic.append(visit.traffic())
        for bits, (weights, errors) in visit.rounded(widths, group_size, method):
            stored |= {f"{bits}.{name}": tensor for name, tensor in weights.items()}
            damage += [
                (Choice(visit.layer.container, visit.expert, projection, bits), error)
                for projection, error in errors.items()
            ]
        bar.update()
    replace_file(file, lambda target: save_file(stored, target))
    measured = json.dumps({"damage": damage, "traffic": traffic})
    # Comes last: where it is, the layer is complete.
    replace_file(file.with_suffix(".json"), lambda target: target.write_text(measured))


@dataclass(frozen=True, slots=True)
class _Visit:
    """One expert and what it gets: all on the device where the model runs.

    Attributes:
        model: Runs it.
        layer: Where it is.
        expert: Its number.
        original: Its weights.
        x: float32 [n, hidden_size].
        weights: Router weights [n, 1].
        gradient: Of the loss with respect to the layer's output [n, hidden_size].
        tokens: Of the calibration text.
    """

    model: LayerwiseModel
    layer: MoELayer
    expert: int
    original: ExpertMatrices
    x: torch.Tensor
    weights: torch.Tensor
    gradient: torch.Tensor
    tokens: int

    @classmethod
    def of(
        cls,
        model: LayerwiseModel,
        layer: MoELayer,
        expert: int,
        routed: Routed,
        gradient: torch.Tensor,
    ) -> "_Visit":
        places, weights = routed.of_expert(expert)
        x, weights, local = (
            part.to(model.device) for part in (routed.x[places], weights, gradient[places])
        )
        matrices = model.matrices(layer, expert)
        return cls(model, layer, expert, matrices, x, weights, local, len(routed.x))

    def traffic(self) -> Traffic:
        """Return what the router gives to it."""
        mean = float(self.weights.mean()) if len(self.weights) else 0.0
        return Traffic(len(self.weights) / self.tokens, mean)

    def rounded(
        self, widths: list[int], group_size: int, method: str
    ) -> Iterator[tuple[int, tuple[dict[str, torch.Tensor], dict[Projection, Damage]]]]:
        """Yield of each width the packed tensors, and what each projection alone does."""
        gate, up, down = self.original
        inner = self.model.expert_hidden(gate, up, self.x)
        expected = inner @ down.T
        matrices = {"w13": torch.cat((gate, up)), "w2": down}
        inputs = {"w13": self.x, "w2": inner}
        found = {}
        for projection in PROJECTIONS:
            try:
                found[projection] = self._quantize(
                    matrices[projection], inputs[projection], widths, group_size, method
                )
            except ValueError as error:
                name = self.layer.tensor_name(self.expert, _MATRICES[projection][0])
                raise MoeqError(
                    f"{self.model.reader.folder}: cannot quantize {name}: {error}"
                ) from error
        for bits in widths:
            stored: dict[str, torch.Tensor] = {}
            errors: dict[Projection, Damage] = {}
            for projection in PROJECTIONS:
                quantized, names = found[projection][bits], _MATRICES[projection]
                for name, weight in zip(names, quantized.parts(len(names)), strict=True):
                    stored |= weight.named(self.layer.tensor_name(self.expert, name))
                matrix = quantized.dequantize(bits)
                if projection == "w13":
                    new_gate, new_up = matrix.chunk(2)
                    output = self.model.expert_hidden(new_gate, new_up, self.x) @ down.T
                else:
                    output = inner @ matrix.T
                difference = (output - expected) * self.weights
                felt = (difference * self.gradient).sum(-1)
                errors[projection] = Damage(
                    weight=float((matrix - matrices[projection]).square().sum()),
                    output=float(difference.square().sum()),
                    loss=float(felt.square().sum()) / 2 / self.tokens,
                )
            yield bits, (stored, errors)

    def _quantize(
        self, matrix: torch.Tensor, x: torch.Tensor, widths: list[int], group_size: int, method: str
    ) -> dict[int, QuantizedWeight]:
        if method in DATA_FREE or len(x) < FEWEST_TOKENS:
            rounding = DATA_FREE.get(method, quantize_hqq)
            return {bits: rounding(matrix, bits, group_size) for bits in widths}
        weighted = x * self.weights
        curvature = Curvature.of((weighted.T @ weighted)[None], [len(x)])
        return {
            bits: quantize_gptq(matrix[None], curvature, bits, group_size)[0] for bits in widths
        }


def _file(folder: Path, layer: MoELayer) -> Path:
    return folder / f"layer-{layer.index:05}.safetensors"
