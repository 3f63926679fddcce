"""gpt-oss: gate and up that alternate, biases, and a loader of vLLM's that names its tensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM

from support.checkpoints import change_tensors
from support.engine import assert_same, launch, run_engine, run_transformers
from support.experts import random_matrix
from support.models import save_tokenizer
from support.reference import dequantize

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

HIDDEN, INTERMEDIATE, GROUP = 128, 192, 32
W13, W2 = (2, 3, 4, 8), (3, 1, 2, 4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write random packed experts, and the same as transformers reads them."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=320,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        num_local_experts=len(W13),
        num_experts_per_tok=2,
        max_position_embeddings=512,
        sliding_window=64,
        initializer_range=0.1,
        eos_token_id=1,
        pad_token_id=2,
        dtype="float32",
    )
    model = GptOssForCausalLM(config)
    packed: dict[str, torch.Tensor] = {}
    plan = {}
    for layer, block in enumerate(model.model.layers):
        container = f"model.layers.{layer}.mlp.experts"
        plan[container] = {"w13": list(W13), "w2": list(W2)}
        for name, weight, bias, widths, shape in (
            ("w13", "gate_up_proj", "gate_up_proj_bias", W13, (2 * INTERMEDIATE, HIDDEN)),
            ("w2", "down_proj", "down_proj_bias", W2, (HIDDEN, INTERMEDIATE)),
        ):
            experts = block.mlp.experts
            torch.nn.init.normal_(getattr(experts, bias), std=0.5)
            for expert, bits in enumerate(widths):
                stem = f"{container}.{expert}.{name}"
                stored = random_matrix(*shape, bits, GROUP, seed=100 * layer + expert + len(stem))
                kinds = ("weight_packed", "weight_scale", "weight_zero_point")
                packed |= {f"{stem}_{k}": t for k, t in zip(kinds, stored, strict=True)}
                packed[f"{stem}_bias"] = getattr(experts, bias).detach()[expert].clone()
                getattr(experts, weight).data[expert] = dequantize(*stored, GROUP).T
    folder = tmp_path_factory.mktemp("gpt_oss")
    model.save_pretrained(folder / "plain")
    save_tokenizer(folder / "plain")
    (folder / "packed").mkdir()
    save_tokenizer(folder / "packed")
    dense = {k: v.contiguous() for k, v in model.state_dict().items() if ".experts." not in k}
    save_file(dense | packed, folder / "packed" / "model.safetensors", metadata={"format": "pt"})
    written: dict[str, Any] = json.loads((folder / "plain" / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": "moeq",
        "format_version": 1,
        "group_size": GROUP,
        "expert_bits": plan,
    }
    (folder / "packed" / "config.json").write_text(json.dumps(written))
    return folder / "packed", folder / "plain"


@pytest.mark.parametrize("ranks", [1, 2])
def test_equals_transformers(checkpoints: tuple[Path, Path], ranks: int) -> None:
    packed, plain = checkpoints
    parallel: dict[str, Any] = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    }
    run = run_engine(packed, **(parallel if ranks == 2 else {}))

    assert_same(run.completions[0], run_transformers(plain))


def test_parameters_that_are_not_filled_are_named(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoints[0], model)
    missing = ["self_attn.sinks", "self_attn.o_proj.bias", "mlp.router.bias"]
    change_tensors(
        model, lambda tensors: [tensors.pop(f"model.layers.1.{name}") for name in missing]
    )

    process = launch(model)

    assert process.returncode != 0
    assert (
        "holds NaN: model.layers.1.attn.sinks (4 of 4), model.layers.1.attn.o_proj.bias "
        "(128 of 128), model.layers.1.mlp.router.bias (4 of 4). Check it with `moeq verify`"
    ) in process.stdout + process.stderr
