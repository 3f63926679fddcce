"""What the compiler makes of the products, for GPUs that need not be there."""

from typing import Any

import pytest

from support.gpu_code import GpuCode, compile_kernel
from vllm_moeq.format import WIDTHS
from vllm_moeq.kernels.triton import gemm, routing
from vllm_moeq.kernels.triton.planes import BLOCK_K
from vllm_moeq.kernels.triton.tiles import TABLE, Tiles

pytestmark = pytest.mark.slow

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA"}
INSTRUCTIONS_PER_CODE = {1: 2.5, 2: 2.4, 3: 2.4, 4: 2.4, 8: 3.5}
"""With few tokens, on sm_90."""
POINTERS = {
    "w_ptr": "*i16",
    "scale_ptr": "*i32",
    "sums_ptr": "*fp32",
    "table_ptr": "*i32",
    "router_weight_ptr": "*fp32",
    "intermediate_sums_ptr": "*fp32",
    "sorted_ptr": "*i32",
    "block_experts_ptr": "*i32",
    "ids_ptr": "*i32",
}


def _compile(name: str, arch: int, tiles: Tiles, dtype: str = "*bf16", **changes: Any) -> GpuCode:
    constants: dict[str, Any] = {
        "bias_ptr": None,
        "map_ptr": None,
        "WIDTH_SET": sum(1 << bits for bits in WIDTHS),
        "GROUP_SIZE": 128,
        "SUM_SIZE": min(64, tiles.block_n // 2),
        "BIAS": False,
        "MAPPED": False,
        "DIRECT": False,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "GROUP_M": tiles.group_m,
        "INTERPRETED": False,
    }
    if name == "w13_kernel":
        constants |= {"MASK_K": False, "ACTIVATION": "silu", "GATED": True, "ON_INPUT": False}
    else:
        constants |= {"SPLIT_K": 1}
    pointers = POINTERS | {"x_ptr": dtype, "intermediate_ptr": dtype, "out_ptr": dtype}
    return compile_kernel(
        getattr(gemm, name),
        arch,
        pointers,
        constants | changes,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


@pytest.mark.parametrize("tiles", [tiles for _, tiles in TABLE], ids=lambda t: f"{t.block_m}")
@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("name", ["w13_kernel", "w2_kernel"])
def test_products_fit_the_gpu(name: str, arch: int, tiles: Tiles) -> None:
    code = _compile(name, arch, tiles)
    assert code.spilled == 0
    assert code.shared <= SHARED_BYTES[arch]
    assert code.count(MATRIX_INSTRUCTION[arch])
    assert len(code.loops) >= len(WIDTHS)  # one for each width


@pytest.mark.parametrize("bits", WIDTHS)
def test_few_instructions_for_each_code(bits: int) -> None:
    tiles = TABLE[0][1]
    code = _compile("w13_kernel", 90, tiles, WIDTH_SET=1 << bits)
    (loop,) = code.loops
    codes = tiles.block_n * BLOCK_K / (32 * tiles.num_warps)  # of a thread, in one turn
    assert loop.total() / codes <= INSTRUCTIONS_PER_CODE[bits]


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_are_loaded_16_bytes_at_a_time(bits: int) -> None:
    code = _compile("w13_kernel", 90, TABLE[0][1], WIDTH_SET=1 << bits)
    (loop,) = code.loops
    loads = [name for name in loop.elements() if name.startswith(("LDGSTS", "LDG"))]
    assert sum("128" in name for name in loads) >= bits
    # Scales and sums are single numbers; no access of another size.
    assert not any(size in name for name in loads for size in ("U8", "U16", ".64"))


@pytest.mark.parametrize("group_size", [32, 64])
def test_smaller_groups(group_size: int) -> None:
    code = _compile(
        "w13_kernel", 90, TABLE[0][1], GROUP_SIZE=group_size, SUM_SIZE=min(64, group_size)
    )
    assert code.spilled == 0 and code.count("HGMMA")


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "*fp16"},
        {"DIRECT": True},
        {"MASK_K": True},
        {"GATED": False, "ACTIVATION": "relu2_no_mul", "SUM_SIZE": 128},
        {"ACTIVATION": "gelu"},
    ],
    ids=str,
)
def test_variants(changes: dict[str, Any]) -> None:
    code = _compile("w13_kernel", 90, TABLE[0][1], **changes)
    assert code.spilled == 0 and code.count("HGMMA")


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("mapped", [False, True])
def test_kernels_around_the_products(arch: int, mapped: bool) -> None:
    ids = {"MAPPED": mapped} | ({} if mapped else {"map_ptr": None})
    pointers = POINTERS | {
        "map_ptr": "*i32", "x_ptr": "*bf16", "parts_ptr": "*bf16", "out_ptr": "*bf16",
    }  # fmt: skip
    cases: dict[Any, dict[str, Any]] = {
        routing.route_kernel: {
            "TABLE_COLUMNS": 5,
            "BLOCK_M": 16,
            "BINS": 256,
            "BLOCK": 1024,
            **ids,
        },
        routing.sums_kernel: {"GROUP_SIZE": 64, "BLOCK": 1024},
        routing.combine_kernel: {"ON_INPUT": False, "SPLIT_K": 4, "BLOCK": 1024, **ids},
    }
    for kernel, constants in cases.items():
        code = compile_kernel(kernel, arch, pointers, constants, num_warps=4, num_stages=2)
        assert code.spilled == 0
        assert code.shared <= SHARED_BYTES[arch]
        assert not code.count("ATOMG") and not code.count("RED.")  # the order would be any
