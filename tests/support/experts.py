"""Random packed experts, and a float64 loop over tokens that says what they compute."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from support.reference import dequantize
from vllm_moeq.expert_buffers import ExpertBuffers, Shard, Share
from vllm_moeq.format import PROJECTIONS
from vllm_moeq.kernels import KERNELS, ExpertLayout, ExpertWeights, select_kernel

Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_matrix(rows: int, columns: int, bits: int, group_size: int, seed: int) -> Stored:
    """Return packed codes, scales (some negative) and zero points, packed by numpy.

    The last group of a row may be short.
    """
    source = np.random.default_rng(seed)
    codes = source.integers(0, 2**bits, (rows, columns))
    stream = (codes[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.astype(np.uint8).reshape(rows, -1), axis=1, bitorder="little")
    groups = (rows, -(-columns // group_size))
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


Biased = tuple[Experts, torch.Tensor, torch.Tensor]
"""Experts with their biases of w13 and w2."""


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


def sharded_experts(
    w13_bits: Sequence[int],
    w2_bits: Sequence[int],
    group_size: int,
    hidden: int,
    intermediate: int,
    ranks: int,
    activation: str,
) -> tuple[Biased, list[Biased]]:
    """Return random gated experts with biases, and what of them the plugin loads on each rank.

    Of the whole ones only the float64 weights mean anything. The matrices of an expert are stored
    as on disk, where the last group of a row may be short.
    """
    alternating = activation == "swigluoai"
    firsts: list[Shard] = ["w1", "w3"]
    stored: dict[tuple[Shard, int], Stored] = {}
    for slot, (first, second) in enumerate(zip(w13_bits, w2_bits, strict=True)):
        for shard in firsts:
            seed = 10 * slot + int(shard[1])
            stored[shard, slot] = random_matrix(intermediate, hidden, first, group_size, seed)
        stored["w2", slot] = random_matrix(hidden, intermediate, second, group_size, 10 * slot)
    generator = torch.Generator().manual_seed(7)
    biases = {
        shard: torch.randn(len(w13_bits), hidden if shard == "w2" else intermediate,
                           generator=generator)
        for shard in (*firsts, "w2")
    }  # fmt: skip

    def joined(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts, 1).flatten(0, 1) if alternating else torch.cat(parts)

    def loaded(rank: int) -> Biased:
        share = Share.of_rank("layer", group_size, intermediate, rank, ranks)
        layout = ExpertLayout.build(
            w13_bits=list(w13_bits), w2_bits=list(w2_bits), group_size=group_size,
            hidden_size=hidden, intermediate_size=share.size,
        )  # fmt: skip
        buffers = ExpertBuffers("layer", layout, share, biased=True, alternating=alternating)
        tensors = buffers.allocate()
        for (shard, slot), matrix in stored.items():
            for kind, tensor in zip(buffers.kinds, (*matrix, biases[shard][slot]), strict=True):
                target = tensors["w2" if shard == "w2" else "w13", kind]
                buffers.fill(target, kind, shard, slot, tensor, "name")
        assert not buffers.missing()
        weights = ExpertWeights(
            *(tensors[projection, kind] for projection in PROJECTIONS for kind in buffers.kinds[:3])
        )
        nothing = torch.empty(0)
        experts = Experts(layout, weights, nothing, nothing)
        return experts, tensors["w13", "bias"], tensors["w2", "bias"]

    parts = [loaded(rank) for rank in range(ranks)]
    float64 = {
        (shard, slot): dequantize(
            *matrix, group_size, (w2_bits if shard == "w2" else w13_bits)[slot]
        )
        for (shard, slot), matrix in stored.items()
    }
    slots = range(len(w13_bits))
    whole = Experts(
        parts[0][0].layout,
        parts[0][0].weights,
        torch.stack([joined([float64[shard, slot] for shard in firsts]) for slot in slots]),
        torch.stack([float64["w2", slot] for slot in slots]),
    )
    w13_bias = torch.stack([joined([biases[shard][slot] for shard in firsts]) for slot in slots])
    return (whole, w13_bias, biases["w2"]), parts


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
