"""The bank of rounded experts against transformers with single projections exchanged."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeq.checkpoint import SourceModel
from moeq.evaluation.reference import outputs
from moeq.model.layerwise import LayerwiseModel
from moeq.sensitivity import Bank, Choice, build
from moeq.sensitivity.fisher import Traffic, gradients
from support.cli import run_moeq
from support.models import NUM_EXPERTS, VOCABULARY
from support.reference import dequantize_checkpoint
from vllm_moeq.format import BitPlan

WIDTHS, GROUP = (2, 4), 32


class Built:
    """A bank of a tiny model, and what it was made from."""

    def __init__(self, folder: Path, work: Path, method: str) -> None:
        source = SourceModel.open(folder)
        self.folder = folder
        self.model = LayerwiseModel(source, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(VOCABULARY, (12, 40), generator=generator)
        self.gradient: dict[int, torch.Tensor] = {}
        banks = build(self.model, self._traffic(work), WIDTHS, [GROUP], method, work)
        self.bank: Bank = banks[GROUP]

    def _traffic(self, work: Path) -> Iterator[Traffic]:
        for found in gradients(self.model, self.tokens, work, 0):
            self.gradient[found.layer] = found.gradient.clone()
            yield found


@pytest.fixture(scope="module")
def built(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Built]:
    made: dict[str, Built] = {}

    def get(method: str, family: str = "mixtral") -> Built:
        key = f"{family}-{method}"
        if key not in made:
            made[key] = Built(tiny_model(family), tmp_path_factory.mktemp(key), method)
        return made[key]

    return get


def _moe_outputs(model: Any, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    block = model.model.layers[layer]
    moe = block.mlp if hasattr(block, "mlp") else block.feed_forward
    hook = moe.register_forward_hook(
        lambda module, args, output: found.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    with torch.inference_mode():
        model(tokens)
    hook.remove()
    return found[0].reshape(tokens.numel(), -1).double()


def _plan(widths: dict[str, list[int]], model: LayerwiseModel) -> BitPlan:
    return BitPlan.from_dict(
        {
            "format_version": 1,
            "group_size": GROUP,
            "expert_bits": {layer.container: widths for layer in model.moe_layers.values()},
        }
    )


@pytest.mark.parametrize(
    ("family", "method"),
    # A norm follows the experts of FlexOlmo; Llama-4's router scales what they get.
    [("mixtral", "rtn"), ("mixtral", "gptq"), ("flex_olmo", "gptq"), ("llama4_text", "gptq")],
)
@pytest.mark.parametrize(
    ("layer", "expert", "projection", "bits"), [(0, 3, "w13", 2), (1, 5, "w2", 2), (1, 0, "w13", 4)]
)
def test_the_error_is_what_the_experts_give_differently(
    family: str, method: str, layer: int, expert: int, projection: str, bits: int,
    built: Callable[..., Built],
) -> None:  # fmt: skip
    made = built(method, family)
    container = made.model.moe_layers[layer].container
    found = made.bank.errors[Choice(container, expert, projection, bits)]  # type: ignore[arg-type]

    plan = _plan({"w13": [bits] * NUM_EXPERTS, "w2": [bits] * NUM_EXPERTS}, made.model)
    source = made.bank.source(plan, torch.device("cpu"))
    rounded = source.matrices(made.model.moe_layers[layer], expert)
    whole = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32).eval()
    before = _moe_outputs(whole, layer, made.tokens)
    block = whole.model.layers[layer]
    experts = (block.mlp if hasattr(block, "mlp") else block.feed_forward).experts
    if projection == "w13":
        new, target = rounded.w13, experts.gate_up_proj
    else:
        new, target = rounded.w2, experts.down_proj
    if family == "llama4_text":  # its weights are transposed
        new = new.T
    weight = (new.double() - target[expert].detach().double()).square().sum().item()
    with torch.no_grad():
        target[expert].copy_(new)
    difference = _moe_outputs(whole, layer, made.tokens) - before
    increase = (difference * made.gradient[layer].view(difference.shape).double()).sum(-1)

    assert found.weight == pytest.approx(weight, rel=1e-4)
    assert found.output == pytest.approx(difference.square().sum().item(), rel=1e-3)
    assert found.loss == pytest.approx(increase.square().sum().item() / 2 / len(increase), rel=1e-3)


def test_experts_of_a_plan_are_those_of_a_packed_checkpoint(
    built: Callable[[str], Built], tmp_path: Path
) -> None:
    made = built("rtn")
    widths = {"w13": [2, 4] * 4, "w2": [4, 4, 2, 2] * 2}
    plan = _plan(widths, made.model)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    done = run_moeq(
        "quantize", made.folder, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json",
        "--method", "rtn",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = dequantize_checkpoint(tmp_path / "out", tmp_path / "float")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = made.bank.source(plan, torch.device("cpu"))
    with torch.inference_mode():
        expected = whole(made.tokens).logits.log_softmax(-1)
    for wanted, (found,) in zip(expected, outputs(made.model, [source], made.tokens), strict=True):
        torch.testing.assert_close(found.log_probabilities, wanted, rtol=1e-4, atol=1e-4)


def test_routing_statistics_are_those_of_the_router(built: Callable[[str], Built]) -> None:
    made = built("rtn")
    whole = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = whole(made.tokens, output_router_logits=True).router_logits
    for layer, statistics in zip(logits, made.bank.routing.values(), strict=True):
        top = layer.double().softmax(-1).topk(2)
        weights = top.values / top.values.sum(-1, keepdim=True)
        for expert, found in enumerate(statistics):
            chosen = top.indices == expert
            assert found.frequency == pytest.approx(chosen.any(-1).double().mean().item())
            assert found.weight == pytest.approx(weights[chosen].mean().item(), rel=1e-4)
