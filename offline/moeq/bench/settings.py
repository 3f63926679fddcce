"""What a benchmark measures: sizes of the layer, widths, numbers of tokens, contenders."""

import os
from dataclasses import dataclass

import torch

from moeq.errors import MoeqError
from vllm_moeq.format import GROUP_SIZES, WIDTHS

AGAINST = ("vllm", "reference")
"""Contenders that ``--against`` can add."""
SMALLEST_RUNS = 3
"""Fewer figures have no quartiles."""


class UsageError(MoeqError):
    """An option has a wrong value; the message names it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one MoE layer with gated experts, all of them on this machine.

    Attributes:
        name: What the results call it.
        hidden_size: Width of a token.
        intermediate_size: Columns of an expert's down projection.
        experts: How many there are.
        top_k: Experts that each token goes through.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    experts: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read one of the names of :data:`SHAPES`, or the four sizes as in ``256,128,4,2``.

        Raises:
            UsageError: It is neither, or tokens cannot have that many different experts.
        """
        if text in SHAPES:
            return SHAPES[text]
        try:
            shape = cls(text, *(_positive_integer("shape", part) for part in text.split(",")))
        except (TypeError, UsageError):
            raise UsageError(
                f"`shape`: {text!r} is neither one of {', '.join(SHAPES)} nor four sizes "
                "HIDDEN,INTERMEDIATE,EXPERTS,TOP_K such as 2048,1024,64,8"
            ) from None
        if shape.top_k > shape.experts:
            raise UsageError(
                f"`shape`: {text}: a token cannot go through {shape.top_k} of "
                f"{shape.experts} experts"
            )
        return shape


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mixtral", 4096, 14336, 8, 2),  # Mixtral-8x7B
        Shape("olmoe", 2048, 1024, 64, 8),  # OLMoE-1B-7B
        Shape("qwen3", 2048, 768, 128, 8),  # Qwen3-30B-A3B
    )
}


@dataclass(frozen=True, slots=True)
class Widths:
    """Bits per weight of the experts: one width for all, or a mix dealt to them in turn."""

    values: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Widths":
        """Read ``4``, or a mix such as ``2/3/4/8``.

        Raises:
            UsageError: A width that the format does not know.
        """
        parts = text.split("/")
        known = [str(width) for width in WIDTHS]
        for part in parts:
            if part not in known:
                raise UsageError(f"`bits`: width {part!r} is not one of {', '.join(known)}")
        return cls(tuple(map(int, parts)))

    @property
    def label(self) -> int | str:
        """What the results call it: the width, or the mix as it is written."""
        return self.values[0] if len(self.values) == 1 else "/".join(map(str, self.values))

    def of(self, expert: int) -> int:
        """Return the width of one expert."""
        return self.values[expert % len(self.values)]


@dataclass(frozen=True, slots=True)
class Settings:
    """One benchmark.

    Attributes:
        shape: Sizes of the layer.
        bits: Widths to measure our kernel at, each a contender of its own.
        tokens: Numbers of tokens to measure, one after another.
        against: Other contenders, of :data:`AGAINST`.
        group_size: Weights that share a scale.
        threads: OpenMP threads.
        runs: Timed calls of each contender for each number of tokens.

    Raises:
        UsageError: Values that do not fit together.
    """

    shape: Shape
    bits: tuple[Widths, ...]
    tokens: tuple[int, ...]
    against: tuple[str, ...]
    group_size: int
    threads: int
    runs: int

    def __post_init__(self) -> None:
        shape, cores = self.shape, len(os.sched_getaffinity(0))
        if self.group_size not in GROUP_SIZES:
            choices = ", ".join(map(str, GROUP_SIZES))
            raise UsageError(f"`group_size`: {self.group_size} is not one of {choices}")
        for size in (shape.hidden_size, shape.intermediate_size):
            if size % self.group_size:
                raise UsageError(
                    f"`shape`: {shape.name}: {size} is not a multiple of the "
                    f"{self.group_size} weights of a group; see `group_size`"
                )
        for widths in self.bits:
            if len(widths.values) > shape.experts:
                raise UsageError(
                    f"`bits`: {widths.label} has more widths than the "
                    f"{shape.experts} experts of `shape` {shape.name}"
                )
        if not 1 <= self.threads <= cores:
            raise UsageError(f"`threads`: {self.threads} is not 1 to {cores} cores")
        if self.runs < SMALLEST_RUNS:
            raise UsageError(f"`runs`: {self.runs} is less than {SMALLEST_RUNS}")

    @classmethod
    def parse(
        cls,
        *,
        shape: str,
        bits: str,
        tokens: str,
        against: str,
        group_size: int,
        threads: int | None,
        runs: int,
    ) -> "Settings":
        """Read the options of the command line; ``threads`` None takes as many as torch.

        Raises:
            UsageError: A wrong value; names it.
        """
        others = _parts("against", against) if against else []
        for other in others:
            if other not in AGAINST:
                raise UsageError(f"`against`: {other!r} is not one of {', '.join(AGAINST)}")
        return cls(
            shape=Shape.parse(shape),
            bits=tuple(map(Widths.parse, _parts("bits", bits))),
            tokens=tuple(_positive_integer("tokens", part) for part in _parts("tokens", tokens)),
            against=tuple(others),
            group_size=group_size,
            threads=torch.get_num_threads() if threads is None else threads,
            runs=runs,
        )


def _parts(name: str, text: str) -> list[str]:
    parts = text.split(",")
    if len(set(parts)) < len(parts):
        raise UsageError(f"`{name}`: {text!r} has the same value twice")
    return parts


def _positive_integer(name: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise UsageError(f"`{name}`: {text!r} is no positive integer")
    return int(text)
