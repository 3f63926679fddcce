"""Down projections that bring the residual stream back: against transformers and least squares.

Where a norm follows the experts, it is their sum that is brought back.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from moeq.calibration import CalibrationConfig, calibrate, calibration_cost
from moeq.checkpoint import SourceModel
from moeq.checkpoint.temporary import used_bytes
from support.reference import dequantize
from vllm_moeq.format import BitPlan, LayerBits

pytestmark = pytest.mark.slow

GROUP = 32
W13, W2 = 2, 8
"""So few bits that much has to be made up for, and so many that rounding hides little of it."""
DAMPING, DAMPING_PER_COLUMN = 0.01, 0.5


def _plan(source: SourceModel) -> BitPlan:
    bits = {
        layer.container: LayerBits((W13,) * layer.num_experts, (W2,) * layer.num_experts)
        for layer in source.layers
    }
    return BitPlan(GROUP, bits)


class _Seen:
    """What a transformers model does at one of its MoE layers, in float64."""

    def __init__(self, model: Any, index: int, tokens: torch.Tensor, normalized: bool) -> None:
        layer = model.model.layers[index]
        handles = [
            layer.mlp.experts.register_forward_pre_hook(self._experts),
            (layer.mlp.experts if normalized else layer).register_forward_hook(self._sums),
        ]
        with torch.inference_mode():
            model(tokens)
        for handle in handles:
            handle.remove()

    def _experts(self, module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        self.x, self.ids, self.weights = arguments[0].flatten(0, -2), *arguments[1:]

    def _sums(self, module: Any, arguments: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        self.sums = output.flatten(0, -2)


def _with_two_moe_layers(source: Path, folder: Path) -> Path:
    """Write a model like another one, whose first layer has no experts, with a layer more."""
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers, config.routed_scaling_factor = 3, 2.5
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


# Router weights that add up to one, that do not, and that are scaled; shared experts beside them;
# a norm behind them.
@pytest.mark.parametrize(
    "family", ["mixtral", "olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "flex_olmo"]
)
@pytest.mark.parametrize("route_all", [False, True])
def test_down_projections_solve_the_least_squares_of_the_stream(
    family: str, route_all: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_model(family)
    if family.startswith("deepseek"):
        source = _with_two_moe_layers(source, tmp_path / "model")
    model_source = SourceModel.open(source)
    layers = model_source.layers
    tokens = torch.randint(3, 259, (40, 32), generator=torch.Generator().manual_seed(0))
    config = CalibrationConfig(model_source, _plan(model_source), tokens, route_all=route_all)
    read = calibrate(config, tmp_path / "calibration", resume=False).packed

    def rounded(expert: int, matrix: str, layer: Any) -> torch.Tensor:
        bits = W2 if matrix == "down" else W13
        packed, scale, zero_point = read(layer.tensor_name(expert, matrix), bits).values()
        return dequantize(packed, scale, zero_point, GROUP, bits)

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    first, second = layers
    normalized = family == "flex_olmo"
    original = _Seen(model, second.index, tokens, normalized)
    experts = model.model.layers[first.index].mlp.experts
    for expert in range(first.num_experts):
        gate_up = [rounded(expert, name, first) for name in ("gate", "up")]
        experts.gate_up_proj.data[expert] = torch.cat(gate_up)
        experts.down_proj.data[expert] = rounded(expert, "down", first)
    # The first layer is rounded, the second one is not yet.
    seen = _Seen(model, second.index, tokens, normalized)
    lacks = original.sums - seen.sums
    assert lacks.norm() > 0.02 * original.sums.norm()

    changes = []
    for expert in range(second.num_experts):
        places, turns = (seen.ids == expert).nonzero(as_tuple=True)
        weights = seen.weights[places, turns]
        if route_all:
            places, weights = torch.arange(len(seen.x)), torch.ones(len(seen.x)).double()
        x, matrices = seen.x[places], {}
        for name in ("gate", "up", "down"):
            matrices[name] = model_source.tensor(second.tensor_name(expert, name)).double()
        gate, up = (rounded(expert, name, second) for name in ("gate", "up"))
        before = (F.silu(x @ matrices["gate"].T) * (x @ matrices["up"].T)) @ matrices["down"].T
        wanted = before + lacks[places] / seen.weights.sum(1)[places, None]
        inputs = F.silu(x @ gate.T) * (x @ up.T) * weights[:, None]
        columns = inputs.shape[1]
        damping = max(DAMPING, DAMPING_PER_COLUMN * columns / len(x))
        strength = (damping * inputs.square().sum(0).mean()).sqrt()
        # The damping as further samples, whose wanted output is that of the old weights.
        samples = torch.cat((inputs, strength * torch.eye(columns).double()))
        outputs = torch.cat((wanted * weights[:, None], strength * matrices["down"].T))
        solution = torch.linalg.lstsq(samples, outputs).solution.T
        change = (solution - matrices["down"]).norm()
        assert (rounded(expert, "down", second) - solution).norm() < 0.1 * change
        changes.append(change / matrices["down"].norm())
    assert min(changes) > 0.05


@pytest.mark.parametrize("route_all", [False, True])
def test_nothing_is_made_up_for_where_nothing_is_lost(
    route_all: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Weights of 8 bits stay where they are, also beside biases, which are not among them."""
    source = SourceModel.open(tiny_model("gpt_oss"))
    bits = {
        layer.container: LayerBits((W2,) * layer.num_experts, (W2,) * layer.num_experts)
        for layer in source.layers
    }
    tokens = torch.randint(3, 259, (40, 32), generator=torch.Generator().manual_seed(0))
    config = CalibrationConfig(source, BitPlan(GROUP, bits), tokens, route_all=route_all)
    read = calibrate(config, tmp_path / "calibration", resume=False).packed
    told = calibration_cost(config).disk_bytes  # while a snapshot takes the place of another one
    assert 0.7 * told < used_bytes(tmp_path / "calibration") <= told
    for layer in source.layers:
        for expert in range(layer.num_experts):
            name = layer.tensor_name(expert, "down")
            packed, scale, zero_point = read(name, W2).values()
            found = dequantize(packed, scale, zero_point, GROUP, W2)
            original = source.tensor(name).double()
            assert (found - original).norm() < 0.04 * original.norm()
