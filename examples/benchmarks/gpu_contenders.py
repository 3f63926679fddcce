"""The other kernels of `gpu_moe.py`, run as vLLM 0.26 runs them; all private imports are here.

Each takes random weights with scales for groups of a row and no zero points. A contender's
`matrices` say what its codes stand for, so that errors are those of the kernel alone.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from moeq.bench import Shape, Widths
from moeq.bench.gpu import GpuContender, Matrices, copies

DTYPE = torch.bfloat16
MARLIN_TILE = 16


@dataclass(frozen=True, slots=True)
class Int4:
    """Symmetric 4-bit experts: a weight is `scale * (code - 8)`.

    Attributes:
        codes: uint8, w13 [E, 2 * intermediate_size, hidden_size] and w2.
        scales: bfloat16 of the same shapes, with a column for each group.
    """

    codes: tuple[torch.Tensor, torch.Tensor]
    scales: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def random(cls, shape: Shape, group_size: int, device: torch.device) -> "Int4":
        """Draw weights that neither overflow nor vanish."""
        codes, scales = [], []
        for rows, columns in matrix_shapes(shape):
            size = (shape.experts, rows, columns)
            codes.append(torch.randint(0, 16, size, dtype=torch.uint8, device=device))
            groups = torch.rand((*size[:2], columns // group_size), device=device) + 0.5
            scales.append((groups / 5 / columns**0.5).to(DTYPE))
        return cls((codes[0], codes[1]), (scales[0], scales[1]))

    def matrices(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of one expert in float64."""
        w13, w2 = (
            ((codes[expert].double() - 8).unflatten(-1, (scales.shape[-1], -1))
             * scales[expert].double().unsqueeze(-1)).flatten(-2)
            for codes, scales in zip(self.codes, self.scales, strict=True)
        )  # fmt: skip
        return w13, w2


def matrix_shapes(shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (rows, columns) of w13 and of w2."""
    return (
        (2 * shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
    )


def vllm_bf16(shape: Shape, group_size: int, device: torch.device) -> GpuContender:
    """Run vLLM's fused MoE in bfloat16, a Triton kernel with tiles tuned by vLLM."""
    import_vllm(device)
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    weights = [
        torch.randn((shape.experts, *size), dtype=DTYPE, device=device) / size[1] ** 0.5
        for size in matrix_shapes(shape)
    ]
    layers = _copies(weights, shape, device)

    def run(copy: int, x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, *layers[copy], router, ids)

    return _contender(
        "vLLM bf16", layers, run, lambda e: (weights[0][e].double(), weights[1][e].double())
    )


def vllm_wna16(shape: Shape, group_size: int, device: torch.device) -> GpuContender:
    """Run vLLM's fused MoE with int4 weights, the Triton kernel."""
    import_vllm(device)
    from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    source = Int4.random(shape, group_size, device)
    layers = _copies(
        [codes[..., ::2] | codes[..., 1::2] << 4 for codes in source.codes] + [*source.scales],
        shape, device,
    )  # fmt: skip
    configs = [
        int4_w4a16_moe_quant_config(
            w1_scale=w13_scale, w2_scale=w2_scale, block_shape=[0, group_size]
        )
        for _, _, w13_scale, w2_scale in layers
    ]

    def run(copy: int, x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        w13, w2, *_ = layers[copy]
        return fused_experts(x, w13, w2, router, ids, quant_config=configs[copy])

    return _contender("vLLM Triton int4", layers, run, source.matrices)


def vllm_marlin(shape: Shape, group_size: int, device: torch.device) -> GpuContender:
    """Run vLLM's Marlin kernel with int4 weights."""
    import_vllm(device)
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        marlin_make_workspace_new,
        marlin_moe_permute_scales,
    )
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm
    from vllm.scalar_type import scalar_types

    source = Int4.random(shape, group_size, device)
    permutation = get_weight_perm(4).to(device)
    tensors = [
        torch.stack([marlin_pack(expert, permutation) for expert in codes])
        for codes in source.codes
    ]
    for scales, (rows, columns) in zip(source.scales, matrix_shapes(shape), strict=True):
        columns_first = scales.transpose(1, 2).contiguous()
        tensors.append(marlin_moe_permute_scales(columns_first, columns, rows, group_size))
    layers = _copies(tensors, shape, device)
    workspace = marlin_make_workspace_new(device, 4)

    def run(copy: int, x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        w13, w2, w13_scale, w2_scale = layers[copy]
        return fused_marlin_moe(
            x, w13, w2, None, None, w13_scale, w2_scale, router, ids,
            quant_type_id=scalar_types.uint4b8.id, workspace=workspace,
        )  # fmt: skip

    return _contender("vLLM Marlin int4", layers, run, source.matrices)


def marlin_pack(codes: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Bring codes into Marlin's order: uint8 [N, K] to int32 [K / 16, 2 * N].

    What vLLM's `gptq_marlin_repack` does, in a form that is tested without a GPU.
    """
    rows, columns = codes.shape
    tiles = codes.t().reshape(columns // MARLIN_TILE, MARLIN_TILE, rows // MARLIN_TILE, MARLIN_TILE)
    ordered = tiles.transpose(1, 2).reshape(-1, len(permutation))[:, permutation]
    nibbles = ordered.reshape(columns // MARLIN_TILE, -1, 8).int()
    packed = nibbles[..., 0].clone()
    for place in range(1, 8):
        packed |= nibbles[..., place] << 4 * place
    return packed


def humming(widths: Widths, tokens: list[int]) -> Callable[..., GpuContender]:
    """Run Humming with one launch for each width, as vLLM's HummingIndexedExperts runs one.

    Args:
        widths: Bits of the experts.
        tokens: Numbers of tokens that kernels are compiled for.
    """

    def make(shape: Shape, group_size: int, device: torch.device) -> GpuContender:
        import_vllm(device)
        parts = [
            HummingPart(shape, [e for e in range(shape.experts) if widths.of(e) == bits], bits,
                        group_size, tokens, device)
            for bits in sorted(set(widths.values), reverse=True)
        ]  # fmt: skip
        by_expert = {e: part for part in parts for e in part.experts}
        size = [by_expert[e].expert_bytes for e in range(shape.experts)]
        count = copies(sum(size), device)
        for part in parts:
            part.copy(count)

        def run(copy: int, x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> Any:
            from vllm.model_executor.layers.fused_moe.moe_fused_mul_sum import moe_fused_mul_sum

            chosen, inner = ids.numel(), shape.intermediate_size
            routes = [part.route(ids) for part in parts]
            up = x.new_empty((chosen, 2 * inner))
            hidden = x.new_empty((chosen, inner))
            down = x.new_empty((chosen, shape.hidden_size))
            for part, route in zip(parts, routes, strict=True):
                part.multiply(copy, 0, x, up, ids.shape[1], route)
            torch.ops._C.silu_and_mul(hidden, up)
            for part, route in zip(parts, routes, strict=True):
                part.multiply(copy, 1, hidden, down, 1, route)
            return moe_fused_mul_sum(down.view(*ids.shape, -1), router)

        name = f"Humming {'+'.join(f'int{part.bits}' for part in parts)}"
        return GpuContender(
            name, tuple(size), count, run, lambda expert: by_expert[expert].matrices(expert)
        )

    return make


class HummingPart:
    """The experts of one width."""

    def __init__(
        self,
        shape: Shape,
        experts: list[int],
        bits: int,
        group_size: int,
        tokens: list[int],
        device: torch.device,
    ) -> None:
        from humming.layer import HummingLayer
        from humming.tune import get_heuristics_config

        self.experts, self.bits, self._shape = experts, bits, shape
        self._local = {expert: place for place, expert in enumerate(experts)}
        expert_map = torch.full((shape.experts,), -1, dtype=torch.int32)
        expert_map[experts] = torch.arange(len(experts), dtype=torch.int32)
        # Without other widths vLLM has no map, and needs none.
        self._map = expert_map.to(device) if len(experts) < shape.experts else None
        self._layers: list[list[Any]] = [[]]
        self._stored, self._tuning = [], []
        self.expert_bytes = 0
        for rows, columns in matrix_shapes(shape):
            layer = HummingLayer(
                shape_n=rows,
                shape_k=columns,
                weight_config={"dtype": f"uint{bits}", "group_size": group_size},
                num_experts=len(experts),
                torch_dtype=DTYPE,
            ).to(device)
            size = (len(experts), rows, columns)
            layer.load_from_unquantized(
                torch.randn(size, dtype=DTYPE, device=device) / columns**0.5
            )
            stored = {name: tensor.clone() for name, tensor in layer.named_parameters()}
            self._stored.append((layer.weight_schema, stored))
            self.expert_bytes += sum(tensor.nbytes for tensor in stored.values()) // len(experts)
            layer.transform()
            self._layers[0].append(layer)
            # As many as vLLM expects, of all choices of all experts.
            numbers = sorted({self._expected(count * shape.top_k) for count in tokens})
            self._tuning.append([
                [before, number, get_heuristics_config(
                    layer.humming_config, shape_m=number, gemm_type="indexed", device=device
                )]
                for before, number in zip([0, *numbers], numbers, strict=False)
            ])  # fmt: skip

    def _expected(self, choices: int) -> int:
        return -(-choices * len(self.experts) // self._shape.experts)

    def copy(self, count: int) -> None:
        """Make copies of the weights."""
        self._layers += [deepcopy(self._layers[0]) for _ in range(count - 1)]

    def matrices(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of one expert in float64."""
        place = self._local[expert]
        w13, w2 = (
            schema.dequant_tensors(
                {name: tensor[place : place + 1] for name, tensor in stored.items()}
            )[0].double()
            for schema, stored in self._stored
        )
        return w13, w2

    def route(self, ids: torch.Tensor) -> dict[str, Any]:
        """Sort the choices by expert; those of other widths are left out."""
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

        number = self._expected(ids.numel())
        block = next(config["block_shape"][0] for first, last, config in self._tuning[0]
                     if first < number <= last)  # fmt: skip
        order, experts, count = moe_align_block_size(
            ids, block, self._shape.experts, self._map, ignore_invalid_experts=True
        )
        return {
            "sorted_ids": order,
            "expert_ids": experts,
            "num_tokens_padded": count,
            "valid_shape_m": number,
        }

    def multiply(
        self,
        copy: int,
        projection: int,
        x: torch.Tensor,
        out: torch.Tensor,
        top_k: int,
        route: dict[str, Any],
    ) -> None:
        """Multiply with w13 (0) or w2 (1); writes the rows of these experts' choices."""
        self._layers[copy][projection](
            inputs=x,
            outputs=out,
            top_k=top_k,
            compute_config={"gemm_type": "indexed"},
            tuning_config=self._tuning[projection],
            **route,
        )


def contenders(
    mix: Widths, tokens: list[int]
) -> Iterator[tuple[str, Callable[[Shape, int, torch.device], GpuContender]]]:
    """Yield all with their names."""
    yield f"Humming {mix.label} bits", humming(mix, tokens)
    yield "Humming int4", humming(Widths((4,)), tokens)
    yield "vLLM Marlin int4", vllm_marlin
    yield "vLLM Triton int4", vllm_wna16
    yield "vLLM bf16", vllm_bf16


def import_vllm(device: torch.device) -> None:
    """Make sure that vLLM's kernels can run.

    Raises:
        ImportError: There is no vLLM.
        ValueError: The device is no GPU.
    """
    if device.type != "cuda":
        raise ValueError("it needs a CUDA GPU")
    if find_spec("vllm") is None:
        raise ImportError("vllm is not installed")


def _copies(
    tensors: list[torch.Tensor], shape: Shape, device: torch.device
) -> list[list[torch.Tensor]]:
    count = copies(sum(tensor.nbytes for tensor in tensors), device)
    return [tensors] + [[tensor.clone() for tensor in tensors] for _ in range(count - 1)]


def _contender(
    name: str,
    layers: list[list[torch.Tensor]],
    run: Callable[..., torch.Tensor],
    matrices: Matrices,
) -> GpuContender:
    sizes = tuple(sum(tensor[e].nbytes for tensor in layers[0]) for e in range(len(layers[0][0])))
    return GpuContender(name, sizes, len(layers), run, matrices)
