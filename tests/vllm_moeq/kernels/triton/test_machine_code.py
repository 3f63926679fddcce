"""What the compiler makes of the products, for GPUs that need not be there.

With the installed Triton and with that of the oldest supported vLLM.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.gpu_code import OLD_TRITON, GpuCode, compile_kernel, compiler, overwritten
from vllm_moeq.format import WIDTHS
from vllm_moeq.kernels.triton import columns
from vllm_moeq.kernels.triton.planes import BLOCK_K
from vllm_moeq.kernels.triton.tiles import TABLE, Tiles

pytestmark = pytest.mark.slow

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
REGISTERS = 1 << 16
"""Of a multiprocessor."""
SPILLS_ONCE = 12
"""Around the loops: with Triton 3.6 the second product moves 6 registers away and back on sm_80."""
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA"}
INSTRUCTIONS_PER_CODE = {1: 2.5, 2: 2.5, 3: 2.5, 4: 2.5, 8: 3.6}
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


Compile = Callable[..., GpuCode]
"""Of a product: takes its name, an architecture, tiles, and constants that differ."""


@pytest.fixture(scope="module", params=["installed", "oldest"])
def compile_any(request: pytest.FixtureRequest) -> Iterator[Compile]:
    """Yield :func:`compile_kernel` in a process with one of the Tritons."""
    folder = OLD_TRITON if request.param == "oldest" else None
    if folder is not None and not folder.exists():
        pytest.skip("tests/run.sh installs the oldest Triton")
    with compiler(folder) as process:

        def run(*arguments: Any, **options: Any) -> GpuCode:
            return process.submit(compile_kernel, *arguments, **options).result()

        yield run


@pytest.fixture(scope="module")
def compile_product(compile_any: Compile) -> Compile:
    def run(name: str, arch: int, tiles: Tiles, **changes: Any) -> GpuCode:
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        return compile_any(f"gemm.{name}", arch, *_arguments(name, tiles, changes), **options)

    return run


def _arguments(
    name: str, tiles: Tiles, changes: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the types of pointers, and constants."""
    constants = {
        "bias_ptr": None,
        "map_ptr": None,
        "WIDTH_SET": sum(1 << bits for bits in WIDTHS),
        "GROUP_SIZE": 128,
        "SUM_SIZE": min(64, tiles.block_n // 2),
        "BIAS": False,
        "MAPPED": False,
        "DIRECT": False,
        "DEQUANTIZE": tiles.dequantize,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "GROUP_M": tiles.group_m,
        "INTERPRETED": False,
        "MASK_K": False,
        "ACTIVATION": "silu",
        "LIMIT": None,
        "ALPHA": 1.0,
        "BETA": 0.0,
        "GATED": True,
        "ON_INPUT": False,
        "SPLIT_K": 1,
    } | changes
    if constants["DEQUANTIZE"]:
        constants |= {"sums_ptr": None, "intermediate_sums_ptr": None}
    dtype = constants.pop("dtype", "*bf16")
    return POINTERS | {"x_ptr": dtype, "intermediate_ptr": dtype, "out_ptr": dtype}, constants


def _is_sound(code: GpuCode) -> bool:
    return not code.spills_in_loops and code.spills <= SPILLS_ONCE and not code.overwritten


@pytest.mark.parametrize(
    "tiles", [tiles for _, tiles in TABLE], ids=lambda t: f"{t.block_m}x{t.block_n}"
)
@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("name", ["w13_kernel", "w2_kernel"])
def test_products_fit_the_gpu(name: str, arch: int, tiles: Tiles, compile_product: Compile) -> None:
    code = compile_product(name, arch, tiles)
    assert _is_sound(code)
    assert code.shared <= SHARED_BYTES[arch]
    assert code.count(MATRIX_INSTRUCTION[arch])
    assert len(code.loops) >= len(WIDTHS)  # one for each width


def test_registers_hold_two_programs_of_many_tokens(compile_product: Compile) -> None:
    """Of the first product, which has two thirds of the work."""
    tiles = TABLE[-1][1]
    code = compile_product("w13_kernel", 90, tiles)
    assert 2 * 32 * tiles.num_warps * code.registers <= REGISTERS


@pytest.mark.parametrize("name", ["w13_kernel", "w2_kernel"])
def test_registers_hold_four_programs_of_few_tokens(name: str, compile_product: Compile) -> None:
    """Of a plan with three widths; more warps that are ready are what decoding lacked."""
    tiles = TABLE[1][1]
    code = compile_product(name, 90, tiles, WIDTH_SET=1 << 2 | 1 << 3 | 1 << 4)
    assert 4 * 32 * tiles.num_warps * code.registers <= REGISTERS


def test_spills_are_seen(compile_product: Compile) -> None:
    """Codes of so many tokens need more registers than there are: as it once was."""
    tiles = Tiles(128, 128, num_stages=3)
    code = compile_product("w13_kernel", 90, tiles, WIDTH_SET=1 << 8, DEQUANTIZE=False)
    assert code.spills_in_loops


def test_registers_that_are_still_read_are_seen() -> None:
    """As Triton 3.6 compiled a loop in which products ran on while the next weights came."""
    turn = """
        /*0010*/ SHF.R.U32.HI R64, RZ, 0x4, R15 ;
        /*0020*/ HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8], R24, gsb0 ;
        /*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/ HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR8], R24, gsb0 ;
        /*0050*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0060*/ @!P5 LDS.64 R58, [R13] ;
    """
    assert overwritten(turn.splitlines()) == ["SHF.R.U32.HI R64, RZ, 0x4, R15"]
    waits = turn.replace("@!P5", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n/*0070*/ @!P5")
    assert not overwritten(waits.splitlines())
    too_early = turn.replace(
        "/*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x1", "/*0030*/ LDSM.16.M88.4 R56, [R12]"
    )
    assert "LDSM.16.M88.4 R56, [R12]" in overwritten(too_early.splitlines())


@pytest.mark.parametrize("bits", WIDTHS)
def test_few_instructions_for_each_code(bits: int, compile_product: Compile) -> None:
    tiles = TABLE[1][1]
    code = compile_product("w13_kernel", 90, tiles, WIDTH_SET=1 << bits)
    (loop,) = code.loops
    codes = tiles.block_n * BLOCK_K / (32 * tiles.num_warps)  # of a thread, in one turn
    assert loop.total() / codes <= INSTRUCTIONS_PER_CODE[bits]


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_are_loaded_16_bytes_at_a_time(bits: int, compile_product: Compile) -> None:
    code = compile_product("w13_kernel", 90, TABLE[1][1], WIDTH_SET=1 << bits)
    (loop,) = code.loops
    loads = [name for name in loop.elements() if name.startswith(("LDGSTS", "LDG"))]
    assert sum("128" in name for name in loads) >= bits
    # Scales and sums are single numbers; no access of another size.
    assert not any(size in name for name in loads for size in ("U8", "U16", ".64"))


@pytest.mark.parametrize("tiles", [TABLE[1][1], TABLE[-1][1]], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize(
    "changes",
    [
        {"GROUP_SIZE": 32, "SUM_SIZE": 32},
        {"GROUP_SIZE": 64},
        {"dtype": "*fp16"},
        {"DIRECT": True},
        {"MASK_K": True},
        {"GATED": False, "ACTIVATION": "relu2_no_mul", "SUM_SIZE": 128},
        {"ACTIVATION": "gelu"},
        {"ACTIVATION": "swigluoai", "LIMIT": 7.0, "ALPHA": 1.702, "BETA": 1.0},
    ],
    ids=str,
)
def test_variants(changes: dict[str, Any], tiles: Tiles, compile_product: Compile) -> None:
    code = compile_product("w13_kernel", 90, tiles, **changes)
    assert _is_sound(code) and code.count("HGMMA")


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("name", ["round_kernel", "descend_kernel"])
def test_rounding_keeps_columns_in_registers(name: str, arch: int, compile_any: Compile) -> None:
    """Of eight programs of one warp on a multiprocessor."""
    matrices = ("factor", "wanted", "sums", "scale", "zero", "codes", "difference", "hessian",
                "gradient", "change")  # fmt: skip
    pointers = {f"{name}_ptr": "*fp32" for name in matrices} | {"largest": "fp32"}
    sizes = {"BLOCK": columns.BLOCK, "ROWS": columns.ROWS}
    code = compile_any(f"columns.{name}", arch, pointers, sizes, num_warps=1, num_stages=2)
    assert not code.spills
    assert 8 * 32 * code.registers <= REGISTERS


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("mapped", [False, True])
def test_kernels_around_the_products(arch: int, mapped: bool) -> None:
    ids = {"MAPPED": mapped} | ({} if mapped else {"map_ptr": None})
    pointers = POINTERS | {
        "map_ptr": "*i32", "x_ptr": "*bf16", "parts_ptr": "*bf16", "out_ptr": "*bf16",
    }  # fmt: skip
    cases: dict[str, dict[str, Any]] = {
        "route_kernel": {
            "TABLE_COLUMNS": 5,
            "BLOCK_M": 16,
            "BINS": 256,
            "BLOCK": 1024,
            **ids,
        },
        "sums_kernel": {"GROUP_SIZE": 64, "BLOCK": 1024},
        "combine_kernel": {"ON_INPUT": False, "SPLIT_K": 4, "BLOCK": 1024, **ids},
    }
    for name, constants in cases.items():
        code = compile_kernel(
            f"routing.{name}", arch, pointers, constants, num_warps=4, num_stages=2
        )
        assert not code.spills
        assert code.shared <= SHARED_BYTES[arch]
        assert not code.count("ATOMG") and not code.count("RED.")  # the order would be any
