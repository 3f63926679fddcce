"""What the commands of ``moeq`` do with their options.

Each imports what it needs when it runs: torch and transformers take seconds, which ``--help`` and
errors in options should not.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from moeq.errors import MoeqError

if TYPE_CHECKING:
    import torch

    from moeq.calibration import Calibration
    from moeq.checkpoint import CheckpointReader
    from moeq.convert import Conversion
    from moeq.families import MoELayer
    from moeq.rounding import Rounding
    from vllm_moeq.format import BitPlan


_CALIBRATION = ("nsamples", "seqlen", "seed", "device")
"""Options that say how the calibration text is used."""


def _read_model(model: str) -> tuple["CheckpointReader", list["MoELayer"]]:
    from moeq.checkpoint import CheckpointReader, resolve_model

    reader = CheckpointReader(resolve_model(model))
    return reader, reader.moe_layers()


def _given_plan_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the group "plan" that the user gave; the rest has its default."""
    from moeq.allocation import PlanOptions

    names = (field.name for field in fields(PlanOptions))
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _make_plan(
    options: argparse.Namespace, reader: "CheckpointReader", layers: list["MoELayer"]
) -> "BitPlan":
    import torch

    from moeq.allocation import MEASURED, PlanOptions, make_plan, plan_sizes
    from moeq.planning import Planner
    from moeq.report import describe_candidates

    if options.strategy is None and options.calib is not None:
        options.strategy = "auto"
    budget = _budget(options, reader, layers)
    wanted = PlanOptions(**_given_plan_options(options))
    if wanted.strategy not in MEASURED or options.calib is None:
        plan = make_plan(reader, layers, wanted, options.model)
    else:
        wanted.check()
        device = torch.device(_device(options.device or "cpu"))
        planner = Planner(
            reader,
            layers,
            wanted,
            options.model,
            _calibration_tokens(options, reader),
            options.method or "gptq",
            device,
            options.seed or 0,
        )
        plan, tried = planner.run()
        print(describe_candidates(tried), end="", file=sys.stderr)
    size = plan_sizes(plan, reader, layers).expert_bytes
    if budget is not None and size > budget:
        raise MoeqError(
            f"--strategy {wanted.strategy} cannot stay within {budget:,} bytes of experts at these "
            f"widths: its plan takes {size:,}; ask for a little less"
        )
    return plan


def _budget(
    options: argparse.Namespace, reader: "CheckpointReader", layers: list["MoELayer"]
) -> int | None:
    """Set ``options.bits`` from the option for the size that was given.

    Returns:
        The bytes that experts may take; None if only their average width was given.
    """
    from moeq.allocation import (
        DEFAULT_GROUP_SIZE,
        average_bits,
        bits_per_weight_budget,
        target_size_budget,
    )

    given = [options.bits, options.bits_per_weight, options.target_size]
    if sum(value is not None for value in given) != 1:
        raise MoeqError("give one of --bits (as in --bits 2.5), --bits-per-weight, --target-size")
    if options.bits is not None:
        return None
    group_size = options.group_size or DEFAULT_GROUP_SIZE
    if options.bits_per_weight is not None:
        budget = bits_per_weight_budget(options.bits_per_weight, layers, group_size)
    else:
        budget = target_size_budget(options.target_size, reader, layers, group_size)
    options.bits = average_bits(budget, layers, group_size)
    return budget


def quantize(options: argparse.Namespace) -> int:
    """Write a packed checkpoint."""
    from moeq.convert import Conversion, check_output_is_free
    from moeq.report import describe_conversion, describe_plan, describe_result, load_plan

    output = options.output.absolute()
    check_output_is_free(output)
    reader, layers = _read_model(options.model)
    if options.plan is not None:
        for name in _given_plan_options(options):
            option = name.replace("_", "-")
            raise MoeqError(f"--{option} has no effect with --plan; give only one of them")
        plan = load_plan(options.plan)
    else:
        plan = _make_plan(options, reader, layers)
    conversion = Conversion.prepare(reader, layers, plan, _size(options.max_shard_size))
    rounding, note = _rounding(options, conversion)
    conversion = conversion.noting("rounding", note)
    print(describe_plan(conversion.plan))
    print(describe_conversion(conversion, rounding), flush=True)
    if not options.dry_run:
        conversion.run(output, options.model, rounding, options.resume)
        print(describe_result(rounding), end="")
        print(f"wrote {options.output}")
        print(f"serve it with: vllm serve {options.output} --quantization moeq")
    return 0


def _rounding(
    options: argparse.Namespace, conversion: "Conversion"
) -> tuple["Rounding | Calibration", str]:
    """Return how to round, and that in words."""
    from moeq.allocation import MEASURED
    from moeq.calibration import Calibration
    from moeq.rounding import DATA_FREE

    method = options.method or ("rtn" if options.calib is None else "gptq")
    if method in DATA_FREE:
        useless = ["route_all_experts"]
        if options.strategy not in MEASURED:
            useless += ["calib", *_CALIBRATION]
        _refuse(options, f"has no effect with --method {method}", *useless)
        if options.resume:
            raise MoeqError(f"--resume has no effect with --method {method}, which starts anew")
        return DATA_FREE[method], method
    if options.calib is None:
        raise MoeqError("--method gptq needs calibration text: --calib FILE, or --calib default")
    device = _device(options.device or "cpu")
    tokens = _calibration_tokens(options, conversion.reader)
    count, length = tokens.shape
    note = f"gptq, {count} x {length} tokens of {options.calib}, seed {options.seed or 0}"
    if options.route_all_experts:
        note += ", every expert by all tokens"
    calibration = Calibration(
        conversion.reader,
        conversion.layers,
        conversion.plan,
        tokens,
        device,
        bool(options.route_all_experts),
    )
    return calibration, note


def _calibration_tokens(options: argparse.Namespace, reader: "CheckpointReader") -> "torch.Tensor":
    from moeq.text import calibration_sequences

    _check_positive(options, "nsamples", "seqlen")
    return calibration_sequences(
        reader.folder,
        options.calib,
        options.nsamples or 128,
        options.seqlen or 512,
        options.seed or 0,
    )


def _refuse(options: argparse.Namespace, why: str, *names: str) -> None:
    """Refuse options that would be ignored."""
    for name in names:
        if getattr(options, name) is not None:
            raise MoeqError(f"--{name.replace('_', '-')} {why}; leave it out")


def _check_positive(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise MoeqError(f"--{name} {value} is not a positive number")


def _device(name: str) -> str:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise MoeqError(f"--device {name} cannot be used: {reason}") from error
    return name


def plan(options: argparse.Namespace) -> int:
    """Decide the width of every expert."""
    from moeq.report import describe_plan, plan_summary, write_plan

    if options.calib is None:
        _refuse(options, "has no effect without --calib", "method", *_CALIBRATION)
    plan = _make_plan(options, *_read_model(options.model))
    if options.output is not None:
        write_plan(plan, options.output)
    print(json.dumps(plan_summary(plan)) if options.json else describe_plan(plan))
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Show a plan."""
    from moeq.report import describe_plan, plan_of, plan_summary

    plan = plan_of(options.path)
    print(json.dumps(plan_summary(plan)) if options.json else describe_plan(plan))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check a packed checkpoint."""
    from moeq.verify import verify_checkpoint

    problems = verify_checkpoint(options.path)
    for problem in problems:
        print(f"moeq verify: {options.path}: {problem}", file=sys.stderr)
    if not problems:
        print(f"{options.path} is complete and undamaged")
    return 1 if problems else 0


def evaluate(options: argparse.Namespace) -> int:
    """Compare a packed checkpoint with its original."""
    import torch

    from moeq import evaluate
    from moeq.checkpoint import CheckpointReader, resolve_model
    from moeq.report import describe_evaluation, evaluation_summary
    from moeq.text import evaluation_sequences

    _check_positive(options, "nsamples", "seqlen")
    if options.dtype is not None and options.backend != "vllm":
        raise MoeqError(f"--dtype has no effect with --backend {options.backend}; leave it out")
    original = CheckpointReader(resolve_model(options.against))
    device = torch.device(_device(options.device))
    comparison = evaluate.load(options.path, original, device)
    sequences = evaluation_sequences(
        original.folder, options.text, options.nsamples, options.seqlen, options.seed
    )
    with redirect_stdout(sys.stderr):  # vLLM logs to the standard output
        found = comparison.evaluate(sequences, options.backend, options.dtype or "auto")
    if options.json:
        print(json.dumps(evaluation_summary(found)))
    else:
        print(describe_evaluation(found))
    return 0


def bench(options: argparse.Namespace) -> int:
    """Measure one layer."""
    from moeq.bench import Machine, Settings, UsageError, describe, measure, prepare, rows

    try:
        settings = Settings.parse(
            shape=options.shape,
            bits=options.bits,
            tokens=options.tokens,
            against=options.against,
            group_size=options.group_size,
            threads=options.threads,
            runs=options.runs,
        )
    except UsageError as error:
        options.usage_error(str(error))
    with redirect_stdout(sys.stderr):  # vLLM logs to the standard output
        machine = Machine.detect()
        measurement = measure(settings, machine, prepare(settings, machine))
    if options.json:
        print(json.dumps([asdict(row) for row in rows(measurement)]))
    else:
        print(describe(measurement))
    return 0


def _size(text: str) -> int:
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.isdecimal() or int(number) == 0:
        raise MoeqError(f"--max-shard-size {text} is no size such as 2GB or 500MB")
    return int(number) * units[unit]


COMMANDS = {
    "quantize": quantize,
    "plan": plan,
    "inspect": inspect,
    "verify": verify,
    "eval": evaluate,
    "bench": bench,
}
"""By the name that the command line takes."""
