"""Expert buffers: exact sizes, tensor-parallel slices and complaints about wrong tensors."""

import re
from typing import Any

import pytest
import torch

from support.experts import Stored, random_matrix
from support.reference import dequantize
from vllm_moeq.expert_buffers import ExpertBuffers, Kind, check_group_fits
from vllm_moeq.format import FormatError, Projection
from vllm_moeq.kernels import ExpertLayout

Buffers = dict[tuple[Projection, Kind], torch.Tensor]

KINDS: tuple[Kind, ...] = ("weight_packed", "weight_scale", "weight_zero_point")
HIDDEN, INTERMEDIATE, GROUP = 64, 128, 32
W13, W2 = (1, 2, 3, 4, 8), (8, 4, 1, 3, 2)
EXPERTS = range(len(W13))
SHAPES = {"w1": (INTERMEDIATE, HIDDEN), "w3": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE)}


def _buffers(tp_rank: int = 0, tp_size: int = 1, gated: bool = True) -> ExpertBuffers:
    layout = ExpertLayout.build(
        w13_bits=list(W13),
        w2_bits=list(W2),
        group_size=GROUP,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE // tp_size,
        gated=gated,
    )
    return ExpertBuffers("layer", layout, tp_rank, tp_size)


def _stored(shard: str, expert: int) -> Stored:
    """Return one matrix as it is on disk, for all ranks."""
    bits = (W2 if shard == "w2" else W13)[expert]
    return random_matrix(*SHAPES[shard], bits, GROUP, seed=10 * expert + int(shard[1]))


def _buffer(buffers: Buffers, shard: str, kind: Kind) -> torch.Tensor:
    return buffers["w2" if shard == "w2" else "w13", kind]


def _fill(
    buffers: ExpertBuffers, left_out: tuple[str, str, int] | None = None, device: str = "cpu"
) -> Buffers:
    weights = {key: tensor.to(device) for key, tensor in buffers.allocate().items()}
    # Last expert first: the order of a checkpoint is not that of the buffers.
    for expert in reversed(EXPERTS):
        for shard in buffers.shards:
            for kind, tensor in zip(KINDS, _stored(shard, expert), strict=True):
                if (kind, shard, expert) != left_out:
                    buffer = _buffer(weights, shard, kind)
                    buffers.fill(buffer, kind, shard, expert, tensor, f"{expert}.{shard}.{kind}")
    return weights


def _matrix(weights: Buffers, projection: str, expert: int) -> torch.Tensor:
    """Read one local matrix back in float64, with offsets of its own."""
    packed, scale, zero = (_buffer(weights, projection, kind) for kind in KINDS)
    rows, groups = scale.shape[1:]
    sizes = [rows * groups * GROUP * bits // 8 for bits in (W2 if projection == "w2" else W13)]
    own = packed.split(sizes)[expert].view(rows, -1)
    return dequantize(own, scale[expert], zero[expert], GROUP)


ranks = pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (0, 4), (2, 4), (3, 4)])


@ranks
@pytest.mark.parametrize("expert", EXPERTS)
def test_each_rank_holds_its_rows_of_gate_and_up(rank: int, size: int, expert: int) -> None:
    local = _matrix(_fill(_buffers(rank, size)), "w13", expert)
    part = INTERMEDIATE // size
    own = slice(rank * part, (rank + 1) * part)
    gate, up = (dequantize(*_stored(shard, expert), GROUP)[own] for shard in ("w1", "w3"))
    assert torch.equal(local, torch.cat([gate, up]))


@ranks
@pytest.mark.parametrize("expert", EXPERTS)
def test_each_rank_holds_its_columns_of_down(rank: int, size: int, expert: int) -> None:
    local = _matrix(_fill(_buffers(rank, size)), "w2", expert)
    part = INTERMEDIATE // size
    whole = dequantize(*_stored("w2", expert), GROUP)
    assert torch.equal(local, whole[:, rank * part : (rank + 1) * part])


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_experts_without_a_gate_hold_their_rows_alone(rank: int, size: int) -> None:
    weights = _fill(_buffers(rank, size, gated=False))
    part = INTERMEDIATE // size
    for expert in EXPERTS:
        whole = dequantize(*_stored("w1", expert), GROUP)
        local = _matrix(weights, "w13", expert)
        assert torch.equal(local, whole[rank * part : (rank + 1) * part])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_buffers_take_exactly_the_bytes_of_the_plan(size: int, gated: bool) -> None:
    weights = HIDDEN * INTERMEDIATE // size
    matrices = 2 if gated else 1
    codes = sum(weights * (matrices * a + b) // 8 for a, b in zip(W13, W2, strict=True))
    grids = len(W13) * weights * (matrices + 1) // GROUP * 3
    buffers = _buffers(tp_size=size, gated=gated)
    assert sum(tensor.nbytes for tensor in buffers.allocate().values()) == codes + grids


@pytest.mark.parametrize("gated", [True, False])
def test_everything_is_missing_at_first_and_nothing_in_the_end(gated: bool) -> None:
    buffers = _buffers(gated=gated)
    assert len(buffers.missing()) == len(W13) * (3 if gated else 2) * 3
    assert buffers.untouched
    _fill(buffers)
    assert buffers.missing() == []
    assert not buffers.untouched


@pytest.mark.parametrize("left_out", [("weight_packed", "w3", 4), ("weight_zero_point", "w2", 0)])
def test_what_was_not_filled_is_missing(left_out: tuple[str, str, int]) -> None:
    buffers = _buffers()
    _fill(buffers, left_out)
    assert buffers.missing() == [left_out]


@pytest.mark.parametrize(
    ("kind", "shard", "wrong", "expected"),
    [
        ("weight_packed", "w1", torch.zeros(128, 16, dtype=torch.int8), "torch.uint8 [128, 16]"),
        # Another width, a local part instead of the whole, another group size, transposed.
        ("weight_packed", "w1", torch.zeros(128, 24, dtype=torch.uint8), "[128, 16] for 2 bits"),
        ("weight_packed", "w2", torch.zeros(64, 32, dtype=torch.uint8), "[64, 64] for 4 bits"),
        ("weight_packed", "w3", torch.zeros(64, 16, dtype=torch.uint8), "[128, 16] for 2 bits"),
        ("weight_scale", "w1", torch.zeros(128, 1).half(), "[128, 2] for 2 bits and group size 32"),
        ("weight_scale", "w2", torch.zeros(64, 4), "torch.float16 [64, 4]"),
        ("weight_zero_point", "w2", torch.zeros(4, 64, dtype=torch.uint8), "[64, 4]"),
        ("weight_zero_point", "w2", torch.zeros(64, dtype=torch.uint8), "[64, 4]"),
    ],
)
def test_a_wrong_tensor_is_named_and_not_counted(
    kind: Any, shard: Any, wrong: torch.Tensor, expected: str
) -> None:
    buffers = _buffers(tp_size=2)
    message = f"layer: the.tensor is {wrong.dtype} {list(wrong.shape)}, expected "
    with pytest.raises(FormatError, match=re.escape(message)) as error:
        buffers.fill(_buffer(buffers.allocate(), shard, kind), kind, shard, 1, wrong, "the.tensor")
    assert expected in str(error.value)
    assert (kind, shard, 1) in buffers.missing()


def test_an_up_projection_of_experts_without_a_gate_is_refused() -> None:
    buffers = _buffers(gated=False)
    packed = _stored("w1", 0)[0]
    with pytest.raises(FormatError, match="the.tensor is w3 of experts that have"):
        buffers.fill(
            buffers.allocate()["w13", "weight_packed"],
            "weight_packed",
            "w3",
            0,
            packed,
            "the.tensor",
        )


@pytest.mark.parametrize(
    ("group", "hidden", "intermediate", "size"),
    [(128, 128, 128, 1), (64, 128, 256, 4), (32, 4096, 14336, 8), (128, 2048, 768, 6)],
)
def test_groups_that_fit_pass(group: int, hidden: int, intermediate: int, size: int) -> None:
    check_group_fits("layer", group, hidden, intermediate, size)


@pytest.mark.parametrize(
    ("group", "intermediate", "size", "hints"),
    [
        # Qwen3-30B-A3B: 768 = 6 * 128.
        (
            128, 768, 4,
            "--enable-expert-parallel, or --tensor-parallel-size 2, or a checkpoint made with "
            "--group-size 64",
        ),
        (
            128, 128, 2,
            "--enable-expert-parallel, or --tensor-parallel-size 1, or a checkpoint made with "
            "--group-size 64",
        ),
        (32, 96, 2, "--enable-expert-parallel, or --tensor-parallel-size 1"),
        (128, 192, 1, "a checkpoint made with --group-size 64"),
        # Expert parallelism leaves rows of 192, which groups of 128 do not fit either.
        (128, 192, 2, "a checkpoint made with --group-size 32"),
        (64, 100, 2, "no supported group size"),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit_are_refused_with_what_works(
    group: int, intermediate: int, size: int, hints: str
) -> None:
    with pytest.raises(FormatError) as error:
        check_group_fits("layer", group, 1024, intermediate, size)
    message = str(error.value)
    assert f"layer: group size {group} does not divide" in message
    assert message.endswith(f"What works: {hints}")


def test_a_group_that_does_not_divide_the_hidden_size_is_named() -> None:
    with pytest.raises(FormatError, match="layer: group size 128 .* hidden_size 192"):
        check_group_fits("layer", 128, 192, 128, 1)


def test_what_is_loaded_again_must_be_whole_again() -> None:
    buffers = _buffers()
    first = _fill(buffers)
    packed = first["w13", "weight_packed"]
    before = packed.clone()

    buffers.forget()
    assert len(buffers.missing()) == len(W13) * 3 * 3
    second = _fill(buffers)
    second["w13", "weight_packed"].zero_()

    assert buffers.missing() == []
    assert torch.equal(packed, before)  # a second load leaves the first one alone


def test_buffers_without_memory_count_as_unfilled() -> None:
    buffers = _buffers()
    _fill(buffers, device="meta")
    assert buffers.untouched


def _biased(rank: int, size: int, alternating: bool) -> ExpertBuffers:
    buffers = _buffers(rank, size)
    buffers.biased, buffers.alternating = True, alternating
    return buffers


@ranks
@pytest.mark.parametrize("alternating", [False, True])
def test_biases_of_rows_are_shared_out_and_those_of_the_output_added_once(
    rank: int, size: int, alternating: bool
) -> None:
    buffers = _biased(rank, size, alternating)
    weights = buffers.allocate()
    biases = {shard: torch.randn(rows).bfloat16() for shard, (rows, _) in SHAPES.items()}
    for shard, bias in biases.items():
        buffers.fill(_buffer(weights, shard, "bias"), "bias", shard, 3, bias, "name")  # type: ignore[arg-type]

    part = INTERMEDIATE // size
    own = slice(rank * part, (rank + 1) * part)
    gate, up = biases["w1"][own].float(), biases["w3"][own].float()
    expected = torch.stack([gate, up], 1).flatten() if alternating else torch.cat([gate, up])
    assert torch.equal(weights["w13", "bias"][3], expected)
    assert torch.equal(weights["w2", "bias"][3], biases["w2"].float() * (rank == 0))
    missing = [entry for entry in buffers.missing() if entry[0] == "bias" and entry[2] == 3]
    assert missing == []
    assert ("bias", "w2", 2) in buffers.missing()


@ranks
def test_rows_of_gate_and_up_alternate(rank: int, size: int) -> None:
    buffers = _biased(rank, size, alternating=True)
    weights = buffers.allocate()
    parts = []
    for seed, shard in enumerate(("w1", "w3")):
        stored = random_matrix(INTERMEDIATE, HIDDEN, W13[1], GROUP, seed=seed)
        parts.append(dequantize(*stored, GROUP))
        for kind, tensor in zip(KINDS, stored, strict=True):
            buffers.fill(weights["w13", kind], kind, shard, 1, tensor, "name")  # type: ignore[arg-type]

    rows = 2 * INTERMEDIATE // size
    whole = torch.stack(parts, 1).flatten(0, 1)
    assert torch.equal(_matrix(weights, "w13", 1), whole[rank * rows : (rank + 1) * rows])
    assert not [
        entry
        for entry in buffers.missing()
        if entry[1:] in (("w1", 1), ("w3", 1)) and entry[0] != "bias"
    ]
