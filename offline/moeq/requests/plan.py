"""What is asked of a bit plan, and of a packed checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moeq.errors import MoeqError
from moeq.requests.checks import (
    DEFAULT_SHARD_SIZE,
    DEFAULT_ZETA,
    DENSE_BITS,
    MAXVARS,
    MEASURED,
    METHODS,
    NO_TEXT,
    REORDERS,
    STRATEGIES,
    check_not_empty,
    check_one_of,
    check_positive,
    check_seed,
    refuse,
)
from moeq.units import parse_size

if TYPE_CHECKING:
    from vllm_moeq.format import BitPlan

_SIDE = ("ranks", "layer_tolerance", "widths_per_layer", "same_width")
_USED = {
    "auto": {"levels", "base_router", "zeta", "maxvar", "reorder", *_SIDE},
    "sensitivity": {"levels", *_SIDE},
    "combined": {"levels", "base_router", "zeta", "maxvar", "reorder"},
    "router-norm": {"levels", "base_router"},
    "maxvar": {"levels", "maxvar"},
    "uniform": set[str](),
    "random": {"levels"},
}
"""Parameters that a strategy heeds, beside the size and the group size."""
_SIZES = ("bits", "bits_per_weight", "target_size")
_PLAN = (
    *_SIZES,
    "dense_bits",
    "quantize_embeddings",
    "strategy",
    "group_size",
    "levels",
    "base_router",
    "zeta",
    "maxvar",
    "reorder",
)
_TEXT = ("nsamples", "seqlen", "seed", "device")


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A bit plan: which expert gets how many bits.

    Attributes:
        model: Folder or hub id of the model.
        output: File to create; None writes none.
        bits: Average width of the expert weights; 2.5 if no size is given. Of a measured plan that
            chooses the widths of dense layers: its size is that with dense layers of 8 bits.
        bits_per_weight: Instead: average of all weights of the result, with scales.
        target_size: Instead: size of all tensors of the result, in bytes or as in ``14GB``.
        dense_bits: Width of attention projections, shared experts and dense MLPs: 16, 8 or 4; or
            ``auto``, with which a measured plan chooses for each, and any other leaves them as they
            are. With it, those that the source stores with 8 or 4 bits can keep them.
        quantize_embeddings: Count the token embeddings and the output head among the dense layers.
        levels: Widths to use, highest first; None takes those next to the average.
        strategy: One of :data:`STRATEGIES`; None takes ``auto`` with text, else ``combined``.
        base_router: Router before training: a checkpoint, or a safetensors file as written by
            :class:`moeq.RouterNormTracker`; None lets the final router norm stand in.
        group_size: Weights of a row that share a scale; measured plans choose from several, with
            as many bytes as the largest would take. None takes what fits the model: of those that
            divide its hidden size the one that serves in the least memory, 128 for most.
        zeta: MaxVar factor that lets an expert overtake.
        maxvar: One of :data:`MAXVARS`: MaxVar as in the paper, or as in its code for Mixtral.
        reorder: One of :data:`REORDERS`: repeat the MaxVar re-order until nothing moves, or not.
        ranks: Expert-parallel ranks that are to hold equal bytes, up to 1 %.
        layer_tolerance: Share by which the bytes of a layer may differ from the mean of all.
        widths_per_layer: Most different widths in a layer.
        same_width: Both projections of an expert get the same width.
        method: One of :data:`METHODS`; None takes ``gptq`` with text, else ``rtn``.
        calib: Calibration text: a file, a folder of ``.txt`` files, a ``.jsonl`` file, a dataset of
            the hub, or ``default``, the manual of Python. None or ``none`` goes without.
        nsamples: Calibration sequences.
        seqlen: Tokens of each.
        seed: Of the draw of sequences.
        device: Where to calibrate: ``auto`` (a CUDA GPU where there is one), ``cpu`` or ``cuda``.

    Raises:
        MoeqError: Values that do not go together, or would have no effect; names them.
    """

    model: str
    output: Path | None = None
    bits: float | None = None
    bits_per_weight: float | None = None
    target_size: str | int | None = None
    dense_bits: str | int = "auto"
    quantize_embeddings: bool = False
    levels: tuple[int, ...] | None = None
    strategy: str | None = None
    base_router: str | None = None
    group_size: int | tuple[int, ...] | None = None
    zeta: float = DEFAULT_ZETA
    maxvar: str = "max-row"
    reorder: str = "stable"
    ranks: int = 1
    layer_tolerance: float | None = None
    widths_per_layer: int | None = None
    same_width: bool = False
    method: str | None = None
    calib: str | None = "default"
    nsamples: int = 128
    seqlen: int = 512
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        self._check_values()
        self._check_plan()
        self._check_text()

    @property
    def text(self) -> str | None:
        """Calibration text; None without."""
        return None if self.calib == NO_TEXT else self.calib

    @property
    def chosen_strategy(self) -> str:
        """The strategy, or the default for it."""
        return self.strategy or ("combined" if self.text is None else "auto")

    @property
    def chosen_method(self) -> str:
        """The rounding method, or the default for it."""
        return self.method or ("rtn" if self.text is None else "gptq")

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Group sizes to choose from, in order; none before one is taken that fits the model."""
        if self.group_size is None:
            return ()
        sizes = self.group_size if isinstance(self.group_size, tuple) else (self.group_size,)
        return tuple(sorted(set(sizes)))

    @property
    def chosen_dense_bits(self) -> int | None:
        """Width of dense layers; None if the plan chooses it for each."""
        if self.dense_bits == "auto":
            return None if self.is_measured else 16
        return int(self.dense_bits)

    @property
    def is_measured(self) -> bool:
        """Whether the plan needs text."""
        return self.chosen_strategy in MEASURED

    @property
    def uses_text(self) -> bool:
        """Whether anything needs text."""
        return self.is_measured

    def _check_values(self) -> None:
        from vllm_moeq.format import GROUP_SIZES, WIDTHS

        check_not_empty(self)
        check_positive(self, "nsamples", "seqlen")
        check_one_of("method", self.method, METHODS)
        check_one_of("maxvar", self.maxvar, MAXVARS)
        check_one_of("dense_bits", self.dense_bits, DENSE_BITS)
        check_one_of("reorder", self.reorder, REORDERS)
        check_seed(self.seed)
        for name, values, choices in (
            ("group_size", self.group_sizes if self.group_size is not None else None, GROUP_SIZES),
            ("levels", self.levels, WIDTHS),
        ):
            if values == ():
                raise MoeqError(f"`{name}` names no value")
            for value in values or ():
                check_one_of(name, value, choices)
        given = [name for name in _SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise MoeqError("give only one of " + " and ".join(f"`{name}`" for name in given))
        if self.target_size is not None:
            parse_size(self.target_size, "target_size")
        if not self.zeta >= 1:
            raise MoeqError(f"`zeta` {self.zeta:g} must be at least 1")

    def _check_plan(self) -> None:
        """Refuse parameters that the strategy would ignore."""
        strategy = self.chosen_strategy
        name, _, seed = strategy.partition(":")
        if name not in _USED or (name == "random") != (":" in strategy):
            raise MoeqError(f"`strategy` {strategy} is not one of {', '.join(STRATEGIES)}")
        if name == "random" and not (seed.isdecimal() and int(seed) < 2**63):
            raise MoeqError(f"`strategy` {strategy}: SEED must be a whole number, as in random:0")
        if strategy in MEASURED and self.text is None:
            raise MoeqError(
                f"`strategy` {strategy} needs calibration text: give `calib` a file, or default"
            )
        if len(self.group_sizes) > 1 and strategy not in MEASURED:
            sizes = ",".join(map(str, self.group_sizes))
            raise MoeqError(
                f"`group_size` {sizes} is a choice that `strategy` {strategy} cannot make; give "
                "one of them, or `strategy` sensitivity"
            )
        if self.quantize_embeddings and self.chosen_dense_bits == 16:
            raise MoeqError(
                "`quantize_embeddings` has no effect beside dense layers of 16 bits; give "
                "`dense_bits` 8 or 4, or a `strategy` that measures"
            )
        unused = {name for used in _USED.values() for name in used} - _USED[name]
        refuse(self, unused, f"has no effect with `strategy` {strategy}")

    def _check_text(self) -> None:
        """Refuse parameters of text that nothing needs."""
        if self.uses_text:
            return
        why = f"has no effect with `strategy` {self.chosen_strategy}"
        refuse(self, ("method",), f"{why}, which rounds nothing")
        refuse(self, _TEXT, why if self.text else "has no effect without `calib`")
        _refuse_text(self, why)


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest(PlanRequest):
    """A packed checkpoint; what is not said here is as in :class:`PlanRequest`.

    Attributes:
        output: Folder to create.
        plan: Use this ``plan.json``, or plan, instead of making one.
        route_all_experts: Round each expert by all tokens, not only by those that the router gives
            to it.
        max_shard_size: Largest file of the result, which is also held in memory.
        resume: Go on with what an interrupted run has finished.
        dry_run: Estimate sizes, memory and time, with the workers of ``ray`` if it is given; write
            nothing.
        ray: Address of a Ray cluster whose machines do the work, as of ``ray.init``; ``auto`` is
            that of this machine. None works on this machine alone.

    Raises:
        MoeqError: Values that do not go together, or would have no effect; names them.
    """

    output: Path = field()  # unlike that of a plan, needed
    plan: "Path | BitPlan | None" = None
    route_all_experts: bool = False
    max_shard_size: str | int = DEFAULT_SHARD_SIZE
    resume: bool = False
    dry_run: bool = False
    ray: str | None = None

    @property
    def is_measured(self) -> bool:
        """Whether the plan needs text."""
        return self.plan is None and self.chosen_strategy in MEASURED

    @property
    def is_calibrated(self) -> bool:
        """Whether rounding needs text."""
        return self.chosen_method == "gptq"

    @property
    def uses_text(self) -> bool:
        """Whether anything needs text."""
        return self.is_measured or self.is_calibrated

    def _check_values(self) -> None:
        super()._check_values()
        parse_size(self.max_shard_size, "max_shard_size")

    def _check_plan(self) -> None:
        if self.plan is not None:
            refuse(self, (*_PLAN, *_SIDE), "has no effect with `plan`; give only one of them")
            return
        super()._check_plan()

    def _check_text(self) -> None:
        method = self.chosen_method
        if self.is_calibrated and self.text is None:
            raise MoeqError("`method` gptq needs calibration text: give `calib` a file, or default")
        why = f"has no effect with `method` {method}"
        if not self.is_calibrated:
            refuse(self, ("route_all_experts",), why)
        if self.dry_run:
            refuse(self, ("resume",), "has no effect with `dry_run`")
        if self.uses_text:
            return
        refuse(self, _TEXT, why if self.text else "has no effect without `calib`")
        _refuse_text(self, why)
        refuse(self, ("resume",), f"{why}, which starts anew")


def _refuse_text(request: PlanRequest, why: str) -> None:
    if request.text not in (None, "default"):
        raise MoeqError(f"`calib` {why}; leave it out")
