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

if TYPE_CHECKING:
    from moeq.calibration import Calibration
    from moeq.checkpoint import CheckpointReader
    from moeq.convert import Conversion, Rounding
    from moeq.families import MoELayer
    from vllm_moeq.format import BitPlan


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
    from moeq.allocation import PlanOptions, make_plan
    from moeq.errors import MoeqError

    if options.bits is None:
        raise MoeqError("--bits is needed, as in --bits 2.5")
    return make_plan(
        reader,
        layers,
        PlanOptions(**_given_plan_options(options)),
        options.model,
    )


def quantize(options: argparse.Namespace) -> int:
    """Write a packed checkpoint."""
    from moeq.convert import Conversion, check_output_is_free
    from moeq.errors import MoeqError
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
    from moeq.calibration import Calibration
    from moeq.convert import DATA_FREE
    from moeq.errors import MoeqError
    from moeq.text import calibration_sequences

    method = options.method or ("rtn" if options.calib is None else "gptq")
    if method in DATA_FREE:
        for name in ("calib", "nsamples", "seqlen", "seed", "device", "route_all_experts"):
            if getattr(options, name) is not None:
                option = name.replace("_", "-")
                raise MoeqError(f"--{option} has no effect with --method {method}; leave it out")
        if options.resume:
            raise MoeqError(f"--resume has no effect with --method {method}, which starts anew")
        return DATA_FREE[method], method
    if options.calib is None:
        raise MoeqError("--method gptq needs calibration text: --calib FILE, or --calib default")
    _check_positive(options, "nsamples", "seqlen")
    device = _device(options.device or "cpu")
    count, length, seed = options.nsamples or 128, options.seqlen or 512, options.seed or 0
    tokens = calibration_sequences(conversion.reader.folder, options.calib, count, length, seed)
    note = f"gptq, {len(tokens)} x {length} tokens of {options.calib}, seed {seed}"
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


def _check_positive(options: argparse.Namespace, *names: str) -> None:
    from moeq.errors import MoeqError

    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise MoeqError(f"--{name} {value} is not a positive number")


def _device(name: str) -> str:
    import torch

    from moeq.errors import MoeqError

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise MoeqError(f"--device {name} cannot be used: {reason}") from error
    return name


def plan(options: argparse.Namespace) -> int:
    """Decide the width of every expert."""
    from moeq.report import describe_plan, plan_summary, write_plan

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
    from moeq.errors import MoeqError
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

    if options.tune:
        return _tune(options)
    try:
        settings = Settings.parse(
            shape=options.shape,
            bits=options.bits or "2,3,4,8,2/3/4/8",
            tokens=options.tokens or "1,16,256",
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


def _tune(options: argparse.Namespace) -> int:
    from moeq.bench import Settings, UsageError
    from moeq.bench.tune import tune_and_write

    for name in ("against", "threads", "json"):
        if getattr(options, name):
            options.usage_error(f"argument --{name}: has no effect with --tune; leave it out")
    try:
        settings = Settings.parse(
            shape=options.shape,
            bits=options.bits or "3/2",
            tokens=options.tokens or "1,4,16,64,256,1024",
            against="",
            group_size=options.group_size,
            threads=None,
            runs=options.runs,
        )
    except UsageError as error:
        options.usage_error(str(error))
    if len(settings.bits) > 1:
        options.usage_error("argument --bits: --tune takes one width or one mix such as 3/2")
    print(tune_and_write(settings, options.seconds))
    return 0


def _size(text: str) -> int:
    from moeq.errors import MoeqError

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
