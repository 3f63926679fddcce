"""What is asked of a judgement: of a packed checkpoint, or of all strategies on a model."""

from dataclasses import dataclass
from pathlib import Path

from moeq.errors import MoeqError
from moeq.requests.checks import (
    BACKENDS,
    METHODS,
    NO_TEXT,
    check_not_empty,
    check_one_of,
    check_positive,
    check_seed,
    refuse,
)


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """A comparison of strategies at equal bytes.

    Attributes:
        model: Folder or hub id of the model.
        output: Folder to create.
        text: Held-out text, in the forms of ``calib``.
        calib: Calibration text, as in :class:`PlanRequest`.
        bits: Average widths.
        methods: Of rounding, each of :data:`METHODS`.
        strategies: Those to compare; None takes all. Uniform and random plans are always in.
        base_router: As in :class:`PlanRequest`.
        group_size: Weights of a row that share a scale; None as in :class:`PlanRequest`.
        random: Random plans of each average.
        nsamples: Calibration sequences.
        seqlen: Tokens of a sequence.
        eval_nsamples: Held-out sequences of a text.
        seed: Of the draw of sequences.
        device: ``auto`` (a CUDA GPU where there is one), ``cpu`` or ``cuda``.

    Raises:
        MoeqError: Values that do not go together; names them.
    """

    model: str
    output: Path
    text: str
    calib: str = "default"
    bits: tuple[float, ...] = (2, 2.25, 2.5, 3, 4)
    methods: tuple[str, ...] = ("gptq",)
    strategies: tuple[str, ...] | None = None
    base_router: str | None = None
    group_size: int | None = None
    random: int = 5
    nsamples: int = 128
    seqlen: int = 512
    eval_nsamples: int = 8
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        from vllm_moeq.format import GROUP_SIZES, WIDTHS

        check_not_empty(self)
        check_positive(self, "nsamples", "seqlen", "eval_nsamples")
        check_one_of("group_size", self.group_size, GROUP_SIZES)
        check_seed(self.seed)
        if self.calib == NO_TEXT:
            raise MoeqError("a comparison needs calibration text: give `calib` a file, or default")
        if self.calib == self.text:
            raise MoeqError(
                "`text` must be another text than `calib`, or every plan looks too good"
            )
        for method in self.methods:
            check_one_of("methods", method, METHODS)
        for name in ("methods", "bits", "strategies"):
            values = getattr(self, name)
            if values is not None and (len(set(values)) < len(values) or not values):
                raise MoeqError(f"`{name}` names the same value twice, or none")
        if self.random < 2:
            raise MoeqError(f"`random` {self.random} must be at least 2, for a spread")
        if not WIDTHS[0] <= min(self.bits) <= max(self.bits) <= WIDTHS[-1]:
            raise MoeqError(f"`bits` must be between {WIDTHS[0]} and {WIDTHS[-1]}")


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """A judgement of a packed checkpoint on held-out text.

    Attributes:
        packed: Folder of the packed checkpoint.
        against: Folder or hub id of the original.
        text: Held-out text, in the forms of ``calib``; each file of a folder is judged by itself.
        backend: One of :data:`BACKENDS`.
        dtype: Of vLLM, as in ``vllm serve``.
        device: ``auto`` (a CUDA GPU where there is one), ``cpu`` or ``cuda``; not of vLLM.
        nsamples: Sequences of each text.
        seqlen: Tokens of each.
        seed: Of the draw of sequences.

    Raises:
        MoeqError: Values that do not go together; names them.
    """

    packed: Path
    against: str
    text: str
    backend: str = "reference"
    dtype: str = "auto"
    device: str = "auto"
    nsamples: int = 16
    seqlen: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check_not_empty(self)
        check_positive(self, "nsamples", "seqlen")
        check_seed(self.seed)
        check_one_of("backend", self.backend, BACKENDS)
        if self.seqlen < 2:
            raise MoeqError("`seqlen` 1 leaves no token to predict; give at least 2")
        if self.backend != "vllm":
            refuse(self, ("dtype",), f"has no effect with `backend` {self.backend}")
