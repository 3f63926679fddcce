"""What dense layers at a lower width do, against divergences that transformers computes."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeq.checkpoint import SourceModel
from moeq.model import LayerwiseModel
from moeq.sensitivity import LinearBank, gradients
from support.models import VOCABULARY, load_model
from vllm_moeq.format import BitPlan, LayerBits

GROUP, SHARE = 32, 1000


def _in_memory(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Return the parameter of a name on disk; MiniMax-M3's gate and up are one in memory."""
    if name.startswith(("model.", "lm_head.")):
        return model.get_parameter(name)
    name = name.replace("language_model.model", "model.language_model")
    name = name.replace("block_sparse_moe", "mlp")
    gate, up = model.get_parameter(re.sub("(gate|up)_proj", "gate_up_proj", name)).chunk(2)
    return up if "up_proj" in name else gate


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("mixtral", "k_proj"),
        ("mixtral", "o_proj"),
        ("qwen2_moe", "shared_expert.down"),
        ("minimax_m3_vl", "shared_experts.up"),
        ("mixtral", "lm_head"),
        ("mixtral", "embed_tokens"),
    ],
)
def test_losses_foretell_the_divergence(
    family: str, part: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model(family)
    source = SourceModel.open(folder, embeddings=True)
    model = LayerwiseModel(source, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (64, 24), generator=generator)
    bank = LinearBank(model, source.linear, (4, 8), [GROUP], "gptq", tokens.numel(), tmp_path)
    assert list(gradients(model, tokens, tmp_path, 0, linear=bank))
    (group,) = (g for g in source.linear if g.layer != 0 and part in " ".join(g.weights))
    names = [name.removesuffix(".weight") for name in group.weights]
    layer = source.layers[0]
    bits = LayerBits((4,) * layer.num_experts, (4,) * layer.num_experts)
    plan = BitPlan(GROUP, {layer.container: bits}, linear_bits=dict.fromkeys(names, 4))
    rounded = bank.weights(plan, torch.device("cpu"))(group.layer)
    assert set(rounded) == set(group.weights) and not bank.weights(plan, torch.device("cpu"))(0)

    whole = load_model(folder, torch.float64, experts_implementation="eager").eval()
    with torch.no_grad():
        before = whole(tokens).logits.log_softmax(-1)
        for name, weight in rounded.items():
            parameter = _in_memory(whole, name)
            # The estimate is of second order, and knows no router that chooses other experts.
            parameter += (weight.double() - parameter) / SHARE
        after = whole(tokens).logits.log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean()) * SHARE**2
    # Tokens are drawn once, and how errors of several tokens go together is left out.
    assert bank.loss(group, GROUP, 4) == pytest.approx(divergence, rel=0.25)
    assert bank.loss(group, GROUP, 8) < bank.loss(group, GROUP, 4) / 50
    assert bank.loss(group, GROUP, 16) == 0
