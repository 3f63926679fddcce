"""What packed experts take in memory, and sizes that cannot be packed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeq.checkpoint import SourceModel
from moeq.checkpoint.sizes import plan_sizes, served_bytes
from support.checkpoints import CONTAINERS, HIDDEN, Tensors, mixtral_tensors, write_checkpoint
from support.cli import run_moeq
from support.models import load_model
from vllm_moeq.expert_buffers import ExpertBuffers, Share
from vllm_moeq.format import BitPlan, LayerBits
from vllm_moeq.kernels import ExpertLayout

GROUP = 32


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", ["qwen2_moe", "nemotron_h"])
def test_served_bytes(tiny_model: Callable[[str], Path], family: str, ranks: int) -> None:
    source = SourceModel.open(tiny_model(family))
    bits = LayerBits((1, 2, 3, 4, 8, 3, 2, 1), (8, 4, 1, 3, 2, 1, 8, 4))
    plan = BitPlan(GROUP, {layer.container: bits for layer in source.layers})
    allocated = 0
    for layer in source.layers:
        for rank in range(ranks):
            share = Share.of_rank("layer", GROUP, layer.intermediate_size, rank, ranks)
            layout = ExpertLayout.build(
                w13_bits=list(bits.w13),
                w2_bits=list(bits.w2),
                group_size=GROUP,
                hidden_size=layer.hidden_size,
                intermediate_size=share.size,
                gated=layer.family.gate is not None,
            )
            buffers = ExpertBuffers("layer", layout, share).allocate()
            allocated += sum(buffer.nbytes for buffer in buffers.values())
    assert served_bytes(plan, source) == allocated

    odd = family == "qwen2_moe"  # 176 columns, served as 192
    assert (allocated > plan_sizes(plan, source).expert_bytes) == odd


def _padded(tensors: Tensors, size: int) -> Tensors:
    """Add zeros to what experts compute inside: rows of gate and up, columns of down."""
    padded = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith((".w1.weight", ".w3.weight")):
            padded[name] = torch.cat([tensor, tensor.new_zeros(size - len(tensor), HIDDEN)])
        elif name.endswith(".w2.weight"):
            padded[name] = torch.cat([tensor, tensor.new_zeros(HIDDEN, size - tensor.shape[1])], 1)
    return padded


@pytest.mark.parametrize("command", ["quantize", "plan"])
@pytest.mark.parametrize(
    "options", [["--calib=none"], ["--calib={text}"], ["--calib={text}", "--group-size=64"]]
)
def test_a_size_that_cannot_be_packed_is_refused_before_any_work(
    tmp_path: Path, command: str, options: list[str]
) -> None:
    model = write_checkpoint(
        tmp_path / "model", mixtral_tensors(intermediate=100), intermediate_size=100
    )
    text = tmp_path / "text"
    text.write_text("not read: the model has no tokenizer")
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / ("out.json" if command == "plan" else "out")

    run = run_moeq(
        command, model, "-o", output, "--bits=2", *(each.format(text=text) for each in options)
    )

    assert run.returncode == 1
    for what in (f"intermediate_size 100 of {CONTAINERS[0]} is no multiple of 8", "zeros to 104"):
        assert what in run.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_what_that_error_says_works(tmp_path: Path) -> None:
    """The padded model computes the same, and is packed."""
    tensors = mixtral_tensors(intermediate=100)
    plain = write_checkpoint(tmp_path / "model", tensors, intermediate_size=100)
    padded = write_checkpoint(tmp_path / "padded", _padded(tensors, 104), intermediate_size=104)
    ids = torch.arange(12)[None]
    logits = [load_model(folder)(ids).logits for folder in (plain, padded)]
    torch.testing.assert_close(*logits)

    run = run_moeq("quantize", padded, "-o", tmp_path / "out", "--bits=2", "--calib=none")
    assert run.returncode == 0, run.stderr
    assert run_moeq("verify", tmp_path / "out").returncode == 0
