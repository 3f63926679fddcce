"""Random packed experts, and a float64 loop over tokens that says what they compute."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from support.reference import dequantize
from vllm_moeq.kernels import KERNELS, ExpertLayout, ExpertWeights, select_kernel

Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_matrix(rows: int, columns: int, bits: int, group_size: int, seed: int) -> Stored:
    """Return packed codes, scales (some negative) and zero points, packed by numpy."""
    source = np.random.default_rng(seed)
    codes = source.integers(0, 2**bits, (rows, columns))
    stream = (codes[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.astype(np.uint8).reshape(rows, -1), axis=1, bitorder="little")
    groups = (rows, columns // group_size)
    scale = source.uniform(0.5, 1.5, groups) * source.choice([-1, 1], groups)
    # Weights of about the same size at every width.
    scale = (scale / 2**bits / math.sqrt(columns)).astype(np.float16)
    zero = source.integers(0, 256, groups).astype(np.uint8)
    return torch.from_numpy(packed), torch.from_numpy(scale), torch.from_numpy(zero)


@dataclass(frozen=True)
class Experts:
    """Experts of one layer: what a kernel takes, and the same weights in float64."""

    layout: ExpertLayout
    weights: ExpertWeights
    w13: torch.Tensor
    w2: torch.Tensor


def random_experts(
    w13_bits: Sequence[int],
    w2_bits: Sequence[int],
    group_size: int = 32,
    hidden: int = 128,
    intermediate: int = 128,
    gated: bool = True,
) -> Experts:
    """Return random experts of the given widths."""
    rows = intermediate * (2 if gated else 1)
    first = [random_matrix(rows, hidden, b, group_size, seed) for seed, b in enumerate(w13_bits)]
    second = [
        random_matrix(hidden, intermediate, b, group_size, 100 + seed)
        for seed, b in enumerate(w2_bits)
    ]
    tensors = [
        tensor
        for stored in (first, second)
        for tensor in (
            torch.cat([packed.flatten() for packed, _, _ in stored]),
            torch.stack([scale for _, scale, _ in stored]),
            torch.stack([zero for _, _, zero in stored]),
        )
    ]
    layout = ExpertLayout.build(
        w13_bits=list(w13_bits),
        w2_bits=list(w2_bits),
        group_size=group_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        gated=gated,
    )
    return Experts(
        layout,
        ExpertWeights(*tensors),
        torch.stack([dequantize(*matrix, group_size) for matrix in first]),
        torch.stack([dequantize(*matrix, group_size) for matrix in second]),
    )


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_PLAIN = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "relu2": lambda x: torch.maximum(x, torch.zeros_like(x)) ** 2,
}


def _activate(
    row: torch.Tensor, activation: str, swiglu: tuple[float, float, float] | None
) -> torch.Tensor:
    if swiglu is not None:
        limit, alpha, beta = swiglu
        half = len(row) // 2
        alternating = activation == "swigluoai"
        gate, up = (row[0::2], row[1::2]) if alternating else (row[:half], row[half:])
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return (up + beta) * gate / (1 + torch.exp(-alpha * gate))
    if activation.endswith("_no_mul"):
        return _PLAIN[activation.removesuffix("_no_mul")](row)
    if activation == "swigluoai":
        gate, up = row[0::2].clamp(max=7), row[1::2].clamp(min=-7, max=7)
        return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    half = len(row) // 2
    return _PLAIN[activation](row[:half]) * row[half:]


def expected_output(
    experts: Experts,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "silu",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    on_input: bool = False,
    swiglu: tuple[float, float, float] | None = None,
) -> torch.Tensor:
    """Return the float64 result, one token and one expert at a time."""
    output = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(topk_weights[token], topk_ids[token].tolist(), strict=True):
            slot = expert if expert < 0 or expert_map is None else int(expert_map[expert])
            if slot < 0:
                continue
            scale = weight.double()
            hidden = experts.w13[slot] @ (x[token].double() * (scale if on_input else 1))
            if w13_bias is not None:
                hidden = hidden + w13_bias[slot].double()
            result = experts.w2[slot] @ _activate(hidden, activation, swiglu)
            if w2_bias is not None:
                result = result + w2_bias[slot].double()
            output[token] += result * (1 if on_input else scale)
    return output


def prepared(
    experts: Experts, kernel: str, activation: str = "silu"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return weights and layout as the op takes them for a kernel of the dispatch table."""
    index = select_kernel(torch.device("cpu"), kernel)
    layout = replace(experts.layout, kernel=index)
    return list(KERNELS[index].prepare(experts.weights, layout, activation)), layout.to_tensor()
