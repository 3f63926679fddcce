"""A limit of SwiGLU that the model's config gives, through the plugin."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM
from transformers.models.exaone_moe.modeling_exaone_moe import ExaoneMoeExperts, ExaoneMoeMLP

from support.engine import assert_same, run_engine, run_transformers
from support.experts import random_matrix
from support.models import save_tokenizer
from support.reference import dequantize_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EXPERTS, GROUP, LIMIT = 4, 32, 0.2


def _packed(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ExaoneMoeConfig(
        vocab_size=320,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=128,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        max_position_embeddings=512,
        initializer_range=0.1,
        sliding_window=64,
        sliding_window_pattern=2,
        eos_token_id=1,
        dtype="float32",
    )
    ExaoneMoeForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for seed, name in enumerate(name for name in list(tensors) if ".experts." in name):
        rows, columns = tensors.pop(name).shape
        stored = random_matrix(rows, columns, 3, GROUP, seed)
        for kind, tensor in zip(("packed", "scale", "zero_point"), stored, strict=True):
            tensors[f"{name}_{kind}"] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    widths = {"w13": [3] * EXPERTS, "w2": [3] * EXPERTS}
    written["swiglu_limits"] = [LIMIT, LIMIT]
    written["quantization_config"] = {
        "quant_method": "moeq",
        "format_version": 1,
        "group_size": GROUP,
        "expert_bits": {f"model.layers.{layer}.mlp.experts": widths for layer in (0, 1)},
    }
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def _limited(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)


def test_limit_of_the_config_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = _packed(tmp_path / "packed")
    plain = dequantize_checkpoint(packed, tmp_path / "plain")
    without = run_transformers(plain)

    # transformers 5.19 does not know this model's limits, which vLLM applies to all its MLPs.
    def gate(self: ExaoneMoeExperts, hidden: torch.Tensor) -> torch.Tensor:
        return _limited(*hidden.chunk(2, dim=-1))

    def mlp(self: ExaoneMoeMLP, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(_limited(self.gate_proj(x), self.up_proj(x)))
        return result

    monkeypatch.setattr(ExaoneMoeMLP, "forward", mlp)
    only_shared = run_transformers(plain)
    monkeypatch.setattr(ExaoneMoeExperts, "_apply_gate", gate)
    expected = run_transformers(plain)
    for other in (without, only_shared):
        with pytest.raises(AssertionError):
            assert_same(other, expected)

    run = run_engine(packed)

    assert_same(run.completions[0], expected)
