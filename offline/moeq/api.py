"""The Python API: what the ``moeq`` command does, as functions.

Each parameter has the name of its option on the command line, and equal calls give equal bytes.
Nothing is printed: progress goes to a callback, what is worth knowing to ``logging``, and results
come back. Errors are :class:`moeq.MoeqError`; their messages name parameters in backticks.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from moeq.progress import Progress, silent
from moeq.requests import (
    DEFAULT_SHARD_SIZE,
    DEFAULT_ZETA,
    CompareRequest,
    EvaluateRequest,
    PlanRequest,
    QuantizeRequest,
)

if TYPE_CHECKING:
    from moeq.comparison import Findings
    from moeq.evaluation import Evaluation
    from moeq.inspection import Inspection
    from moeq.result import QuantizedModel
    from vllm_moeq.format import BitPlan

# The work is imported when it is asked for: torch and transformers take seconds.

AnyPath = str | PathLike[str]


def quantize(
    model: AnyPath,
    output: AnyPath,
    *,
    bits: float | None = None,
    bits_per_weight: float | None = None,
    target_size: str | int | None = None,
    dense_bits: str | int = "auto",
    quantize_embeddings: bool = False,
    plan: "AnyPath | BitPlan | None" = None,
    levels: Sequence[int] | None = None,
    strategy: str | None = None,
    base_router: AnyPath | None = None,
    group_size: int | Sequence[int] | None = None,
    zeta: float = DEFAULT_ZETA,
    maxvar: str = "max-row",
    reorder: str = "stable",
    ranks: int = 1,
    layer_tolerance: float | None = None,
    widths_per_layer: int | None = None,
    same_width: bool = False,
    method: str | None = None,
    calib: AnyPath | None = "default",
    nsamples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    device: str = "auto",
    route_all_experts: bool = False,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    resume: bool = False,
    dry_run: bool = False,
    ray: str | None = None,
    progress: Progress = silent,
) -> "QuantizedModel":
    """Quantize a Mixture-of-Experts model, each expert to its own bit-width.

    By default the plan is measured on the model itself, with a built-in text, and experts are
    rounded with GPTQ; ``calib=None`` needs no text and takes seconds, with the rule of Chowdhury et
    al. (ICLR 2026, arXiv 2604.06515) and rounding to nearest.

    Args:
        model: Folder or hub id of a checkpoint, its experts in 16 or 32 bits, FP8, MXFP4 or INT4.
        output: Folder to create; it appears when it is complete.
        bits: Average width of the expert weights in bits; 2.5 if no size is given. Of a measured
            plan that chooses the widths of dense layers: its size is that with dense layers of 8.
        bits_per_weight: Instead of ``bits``: average of all weights of the result, with scales.
        target_size: Instead of ``bits``: size of all tensors, in bytes or as in ``"14GB"``.
        dense_bits: Width of attention projections, shared experts and dense MLPs: 16, 8 or 4; or
            ``"auto"``, with which a measured plan chooses for each and any other leaves them. With
            it, those that the source stores with 8 or 4 bits can keep them.
        quantize_embeddings: Count the token embeddings and the output head among the dense layers.
        plan: What :func:`plan` returned, or a ``plan.json``, to use instead of making a plan.
        levels: Widths to use, highest first; None takes those next to the average.
        strategy: One of :data:`moeq.requests.STRATEGIES`; None takes ``auto`` with text, else
            ``combined``.
        base_router: The router before training: a checkpoint, or the file that
            :class:`moeq.RouterNormTracker` writes; None lets the final router norm stand in.
        group_size: Weights of a row that share a scale: 32, 64 or 128. Measured plans choose from
            several, with as many bytes as the largest would take. None takes the one that fits the
            sizes of the model best, 128 for most.
        zeta: MaxVar factor that lets an expert overtake in ``combined``, at least 1.
        maxvar: MaxVar as in the paper (``max-row``) or as in its code (``highest-norm-row``).
        reorder: Repeat the MaxVar re-order until ``stable``, or go through it in ``one-pass``.
        ranks: Expert-parallel ranks that are to hold equal bytes, up to 1 %.
        layer_tolerance: Share by which the bytes of a layer may differ from the mean of all.
        widths_per_layer: Most different widths in a layer.
        same_width: Both projections of an expert get the same width.
        method: Of rounding, one of :data:`moeq.requests.METHODS`; None takes ``gptq`` with text,
            else ``rtn``.
        calib: Calibration text: a file, a folder of ``.txt`` files, a ``.jsonl`` file, a dataset of
            the hub, or ``"default"``, the manual of Python; None goes without.
        nsamples: Calibration sequences.
        seqlen: Tokens of each.
        seed: Of the draw of sequences.
        device: Where to calibrate: ``auto`` (a CUDA GPU where there is one), ``cpu``, ``cuda``.
        route_all_experts: Round each expert by all tokens, not only by those that it gets.
        max_shard_size: Largest file of the result, in bytes or as in ``"1GB"``; it is held in
            memory.
        resume: Go on with what an interrupted call has finished; the bytes are the same.
        dry_run: Estimate sizes, memory and time; write nothing.
        ray: Address of a Ray cluster whose machines do the work, as of ``ray.init``: ``"auto"`` is
            that of this machine; None works on this machine alone. The bytes are the same.
        progress: Called after every step.

    Raises:
        MoeqError: Bad input, or a full disk; names the file, tensor or parameter.
    """
    from moeq import pipeline

    request = QuantizeRequest(
        model=str(model),
        output=Path(output),
        bits=bits,
        bits_per_weight=bits_per_weight,
        target_size=target_size,
        dense_bits=dense_bits,
        quantize_embeddings=quantize_embeddings,
        plan=Path(plan) if isinstance(plan, str | PathLike) else plan,
        levels=None if levels is None else tuple(levels),
        strategy=strategy,
        base_router=None if base_router is None else str(base_router),
        group_size=tuple(group_size) if isinstance(group_size, Sequence) else group_size,
        zeta=zeta,
        maxvar=maxvar,
        reorder=reorder,
        ranks=ranks,
        layer_tolerance=layer_tolerance,
        widths_per_layer=widths_per_layer,
        same_width=same_width,
        method=method,
        calib=None if calib is None else str(calib),
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        device=device,
        route_all_experts=route_all_experts,
        max_shard_size=max_shard_size,
        resume=resume,
        dry_run=dry_run,
        ray=ray,
    )
    return pipeline.quantize(request, progress)


def plan(
    model: AnyPath,
    output: AnyPath | None = None,
    *,
    bits: float | None = None,
    bits_per_weight: float | None = None,
    target_size: str | int | None = None,
    dense_bits: str | int = "auto",
    quantize_embeddings: bool = False,
    levels: Sequence[int] | None = None,
    strategy: str | None = None,
    base_router: AnyPath | None = None,
    group_size: int | Sequence[int] | None = None,
    zeta: float = DEFAULT_ZETA,
    maxvar: str = "max-row",
    reorder: str = "stable",
    ranks: int = 1,
    layer_tolerance: float | None = None,
    widths_per_layer: int | None = None,
    same_width: bool = False,
    method: str | None = None,
    calib: AnyPath | None = "default",
    nsamples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
) -> "BitPlan":
    """Decide the width of every expert, as :func:`quantize` does, and round nothing.

    The plan's provenance holds its sizes in bytes and, with ``auto``, what was tried.

    Args:
        model: Folder or hub id of a checkpoint, its experts in 16 or 32 bits, FP8, MXFP4 or INT4.
        output: A ``plan.json`` to create.
        bits: As in :func:`quantize`, here and below.
        bits_per_weight: Instead of ``bits``: average of all weights of the result, with scales.
        target_size: Instead of ``bits``: size of all tensors.
        dense_bits: As in :func:`quantize`.
        quantize_embeddings: Count the token embeddings and the output head among the dense layers.
        levels: Widths to use, highest first.
        strategy: One of :data:`moeq.requests.STRATEGIES`.
        base_router: The router before training.
        group_size: Weights of a row that share a scale; None takes what fits the model.
        zeta: MaxVar factor that lets an expert overtake.
        maxvar: Definition of MaxVar.
        reorder: How often the MaxVar re-order runs.
        ranks: Expert-parallel ranks that are to hold equal bytes.
        layer_tolerance: Share by which the bytes of a layer may differ from the mean.
        widths_per_layer: Most different widths in a layer.
        same_width: Both projections of an expert get the same width.
        method: How experts are rounded to measure them.
        calib: Calibration text.
        nsamples: Calibration sequences.
        seqlen: Tokens of each.
        seed: Of the draw of sequences.
        device: Where to measure.
        progress: Called after every step.

    Raises:
        MoeqError: Bad input; names the file, tensor or parameter.
    """
    from moeq import pipeline

    request = PlanRequest(
        model=str(model),
        output=None if output is None else Path(output),
        bits=bits,
        bits_per_weight=bits_per_weight,
        target_size=target_size,
        dense_bits=dense_bits,
        quantize_embeddings=quantize_embeddings,
        levels=None if levels is None else tuple(levels),
        strategy=strategy,
        base_router=None if base_router is None else str(base_router),
        group_size=tuple(group_size) if isinstance(group_size, Sequence) else group_size,
        zeta=zeta,
        maxvar=maxvar,
        reorder=reorder,
        ranks=ranks,
        layer_tolerance=layer_tolerance,
        widths_per_layer=widths_per_layer,
        same_width=same_width,
        method=method,
        calib=None if calib is None else str(calib),
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        device=device,
    )
    return pipeline.plan(request, progress)


def evaluate(
    packed: AnyPath,
    *,
    against: AnyPath,
    text: AnyPath,
    backend: str = "reference",
    dtype: str = "auto",
    device: str = "auto",
    nsamples: int = 16,
    seqlen: int = 512,
    seed: int = 0,
    progress: Progress = silent,
) -> "Evaluation":
    """Judge a packed checkpoint against its original on held-out text.

    Args:
        packed: Folder of the packed checkpoint.
        against: Folder or hub id of the original.
        text: Held-out text, in the forms of ``calib``; each file of a folder is judged by itself.
        backend: ``reference`` (layer by layer from disk, float32), ``transformers`` (whole models
            in memory, float32) or ``vllm`` (as it is served).
        dtype: Of vLLM.
        device: ``auto`` (a CUDA GPU where there is one), ``cpu`` or ``cuda``; not of vLLM.
        nsamples: Sequences of each text.
        seqlen: Tokens of each, at least 2.
        seed: Of the draw of sequences.
        progress: Called after every layer that runs from disk.

    Returns:
        Losses and divergences in nats per token, and shares of routing that changed.

    Raises:
        MoeqError: Bad input, or the backend cannot run the models.
    """
    from moeq import pipeline

    request = EvaluateRequest(
        packed=Path(packed),
        against=str(against),
        text=str(text),
        backend=backend,
        dtype=dtype,
        device=device,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
    )
    return pipeline.evaluate(request, progress)


def compare(
    model: AnyPath,
    output: AnyPath,
    *,
    text: AnyPath,
    calib: AnyPath | None = "default",
    bits: Sequence[float] = (2, 2.25, 2.5, 3, 4),
    methods: Sequence[str] = ("gptq",),
    strategies: Sequence[str] | None = None,
    base_router: AnyPath | None = None,
    group_size: int | None = None,
    random: int = 5,
    nsamples: int = 128,
    seqlen: int = 512,
    eval_nsamples: int = 8,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
) -> "Findings":
    """Try every strategy at every average, at equal bytes, and judge the plans on held-out text.

    Writes ``compare.html``, ``.svg``, ``.md`` and ``.json``; needs matplotlib.

    Args:
        model: Folder or hub id of the model.
        output: Folder to create.
        text: Held-out text, in the forms of ``calib``.
        calib: Calibration text, as in :func:`quantize`.
        bits: Average widths.
        methods: Of rounding, each of :data:`moeq.requests.METHODS`.
        strategies: Those of :data:`moeq.comparison.STRATEGIES` to compare; None takes all. Uniform
            and random plans are always in.
        base_router: The router before training, as in :func:`quantize`.
        group_size: Weights of a row that share a scale; None takes what fits the model.
        random: Random plans of each average, at least 2.
        nsamples: Calibration sequences.
        seqlen: Tokens of a sequence.
        eval_nsamples: Held-out sequences of a text.
        seed: Of the draw of sequences.
        device: ``auto`` (a CUDA GPU where there is one), ``cpu`` or ``cuda``.
        progress: Called after every step.

    Raises:
        MoeqError: Bad input; names the file, tensor or parameter.
    """
    from moeq import pipeline

    request = CompareRequest(
        model=str(model),
        output=Path(output),
        text=str(text),
        calib="none" if calib is None else str(calib),
        bits=tuple(bits),
        methods=tuple(methods),
        strategies=None if strategies is None else tuple(strategies),
        base_router=None if base_router is None else str(base_router),
        group_size=group_size,
        random=random,
        nsamples=nsamples,
        seqlen=seqlen,
        eval_nsamples=eval_nsamples,
        seed=seed,
        device=device,
    )
    return pipeline.compare(request, progress)


def verify(path: AnyPath) -> list[str]:
    """Check that a packed checkpoint is complete, undamaged and true to its own plan.

    Returns:
        One sentence for each problem; none if it is sound.

    Raises:
        MoeqError: The folder is no finished moeq checkpoint, or a file cannot be read at all.
    """
    from moeq import pipeline

    return pipeline.verify(Path(path))


def inspect(path: AnyPath, html: AnyPath | None = None) -> "Inspection":
    """Look into a packed checkpoint, or a ``plan.json``.

    Args:
        path: Folder or file.
        html: File to create: the same as one self-contained page.

    Raises:
        MoeqError: It is neither, or the page exists already or cannot be written; names it.
    """
    from moeq.inspection import Inspection, write_page

    inspection = Inspection.of(Path(path))
    if html is not None:
        write_page(inspection, Path(html))
    return inspection
