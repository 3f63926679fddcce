"""Expert buffers: exact sizes, tensor-parallel slices and complaints about wrong tensors."""

import re
from typing import Any

import pytest
import torch

from support.experts import Stored, random_matrix
from support.reference import dequantize
from vllm_moeq.expert_buffers import ExpertBuffers, Kind, Share
from vllm_moeq.format import FormatError, Projection
from vllm_moeq.kernels import ExpertLayout

Buffers = dict[tuple[Projection, Kind], torch.Tensor]

KINDS: tuple[Kind, ...] = ("weight_packed", "weight_scale", "weight_zero_point")
HIDDEN, INTERMEDIATE, GROUP = 64, 176, 32  # five whole groups and one of 16
W13, W2 = (1, 2, 3, 4, 8), (8, 4, 1, 3, 2)
EXPERTS = range(len(W13))
SHAPES = {"w1": (INTERMEDIATE, HIDDEN), "w3": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE)}


OWN = {
    (0, 1): (0, 176, 192),
    (0, 2): (0, 96, 96), (1, 2): (96, 176, 96),
    (0, 4): (0, 64, 64), (1, 4): (64, 96, 32), (2, 4): (96, 160, 64), (3, 4): (160, 176, 32),
}  # fmt: skip
"""Rank and ranks to the columns of w2 that it holds, from and to, and how many these become."""


def _buffers(tp_rank: int = 0, tp_size: int = 1, gated: bool = True) -> ExpertBuffers:
    share = Share.of_rank("layer", GROUP, INTERMEDIATE, tp_rank, tp_size)
    layout = ExpertLayout.build(
        w13_bits=list(W13),
        w2_bits=list(W2),
        group_size=GROUP,
        hidden_size=HIDDEN,
        intermediate_size=share.size,
        gated=gated,
    )
    return ExpertBuffers("layer", layout, share)


def _stored(shard: str, expert: int) -> Stored:
    """Return one matrix as it is on disk, for all ranks."""
    bits = (W2 if shard == "w2" else W13)[expert]
    return random_matrix(*SHAPES[shard], bits, GROUP, seed=10 * expert + int(shard[1]))


def _whole(shard: str, expert: int) -> torch.Tensor:
    """Return one matrix in float64, for all ranks."""
    return dequantize(*_stored(shard, expert), GROUP, (W2 if shard == "w2" else W13)[expert])


def _rows(part: torch.Tensor, size: int) -> torch.Tensor:
    """Return a matrix or a bias with rows of zeros at its end."""
    return torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])


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


ranks = pytest.mark.parametrize(("rank", "size"), OWN)


@ranks
@pytest.mark.parametrize("expert", EXPERTS)
def test_each_rank_holds_its_rows_of_gate_and_up(rank: int, size: int, expert: int) -> None:
    local = _matrix(_fill(_buffers(rank, size)), "w13", expert)
    start, end, held = OWN[rank, size]
    gate, up = (_rows(_whole(shard, expert)[start:end], held) for shard in ("w1", "w3"))
    assert torch.equal(local, torch.cat([gate, up]))


@ranks
@pytest.mark.parametrize("expert", EXPERTS)
def test_each_rank_holds_its_columns_of_down(rank: int, size: int, expert: int) -> None:
    local = _matrix(_fill(_buffers(rank, size)), "w2", expert)
    start, end, held = OWN[rank, size]
    # What follows is multiplied with zeros.
    assert local.shape[1] == held
    assert torch.equal(local[:, : end - start], _whole("w2", expert)[:, start:end])


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_experts_without_a_gate_hold_their_rows_alone(rank: int, size: int) -> None:
    weights = _fill(_buffers(rank, size, gated=False))
    start, end, held = OWN[rank, size]
    for expert in EXPERTS:
        local = _matrix(weights, "w13", expert)
        assert torch.equal(local, _rows(_whole("w1", expert)[start:end], held))


@ranks
@pytest.mark.parametrize("gated", [True, False])
def test_buffers_take_exactly_the_bytes_of_the_plan(rank: int, size: int, gated: bool) -> None:
    weights = HIDDEN * OWN[rank, size][2]
    matrices = 2 if gated else 1
    codes = sum(weights * (matrices * a + b) // 8 for a, b in zip(W13, W2, strict=True))
    grids = len(W13) * weights * (matrices + 1) // GROUP * 3
    buffers = _buffers(rank, size, gated)
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
        ("weight_packed", "w1", torch.zeros(176, 16, dtype=torch.int8), "torch.uint8 [176, 16]"),
        # Another width, a local part instead of the whole, another group size, padded, transposed.
        ("weight_packed", "w1", torch.zeros(176, 24, dtype=torch.uint8), "[176, 16] for 2 bits"),
        ("weight_packed", "w2", torch.zeros(64, 48, dtype=torch.uint8), "[64, 88] for 4 bits"),
        ("weight_packed", "w3", torch.zeros(96, 16, dtype=torch.uint8), "[176, 16] for 2 bits"),
        ("weight_scale", "w1", torch.zeros(176, 1).half(), "[176, 2] for 2 bits and group size 32"),
        ("weight_packed", "w2", torch.zeros(64, 96, dtype=torch.uint8), "[64, 88] for 4 bits"),
        ("weight_scale", "w2", torch.zeros(64, 6), "torch.float16 [64, 6]"),
        ("weight_zero_point", "w2", torch.zeros(6, 64, dtype=torch.uint8), "[64, 6]"),
        ("weight_zero_point", "w2", torch.zeros(64, dtype=torch.uint8), "[64, 6]"),
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


@pytest.mark.parametrize(("kind", "shard"), [("weight_scale", "w2"), ("bias", "w1")])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_named_and_not_counted(kind: Any, shard: Any, value: float) -> None:
    buffers = _biased(0, 2, alternating=False)
    broken = torch.zeros(SHAPES["w1"][0]) if kind == "bias" else _stored(shard, 1)[1].clone()
    broken.view(-1)[-1] = value  # of the other rank, which is to refuse it as well
    with pytest.raises(FormatError, match="layer: the.tensor holds NaN or infinity"):
        buffers.fill(_buffer(buffers.allocate(), shard, kind), kind, shard, 1, broken, "the.tensor")
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
    ("group", "intermediate", "size"),
    # Qwen3-30B-A3B, DeepSeek-V2-Lite, and others.
    [(128, 768, 4), (128, 1408, 8), (64, 704, 4), (32, 176, 4), (32, 88, 2), (128, 1536, 8)],
)
def test_ranks_hold_every_column_once(group: int, intermediate: int, size: int) -> None:
    shares = [Share.of_rank("layer", group, intermediate, rank, size) for rank in range(size)]
    columns = [range(share.start, share.start + share.columns) for share in shares]
    assert [column for own in columns for column in own] == list(range(intermediate))
    assert all(share.size % group == 0 and share.start % group == 0 for share in shares)
    groups = [share.size // group for share in shares]
    assert max(groups) - min(groups) <= 1


@pytest.mark.parametrize(
    ("group", "intermediate", "size", "hints"),
    [
        (
            128, 768, 8,
            "--enable-expert-parallel, or --tensor-parallel-size 4, or a checkpoint made with "
            "--group-size 64",
        ),
        (
            128, 128, 2,
            "--enable-expert-parallel, or --tensor-parallel-size 1, or a checkpoint made with "
            "--group-size 64",
        ),
        (64, 176, 8, "--enable-expert-parallel, or --tensor-parallel-size 2"),
    ],
)  # fmt: skip
def test_fewer_groups_than_ranks_are_refused_with_what_works(
    group: int, intermediate: int, size: int, hints: str
) -> None:
    with pytest.raises(FormatError) as error:
        Share.of_rank("layer", group, intermediate, 0, size)
    message = str(error.value)
    assert f"layer: {-(-intermediate // group)} groups of {group} columns of w2" in message
    assert message.endswith(f"What works: {hints}")


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

    start, end, held = OWN[rank, size]
    gate, up = (_rows(biases[shard][start:end].float(), held) for shard in ("w1", "w3"))
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

    start, end, held = OWN[rank, size]
    own = torch.stack([_rows(part[start:end], held) for part in parts], 1).flatten(0, 1)
    assert torch.equal(_matrix(weights, "w13", 1), own)
    assert not [
        entry
        for entry in buffers.missing()
        if entry[1:] in (("w1", 1), ("w3", 1)) and entry[0] != "bias"
    ]
