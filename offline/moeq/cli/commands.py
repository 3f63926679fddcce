"""What the commands of ``moeq`` do with their options.

Each imports what it needs when it runs: torch and transformers take seconds, which ``--help`` and
errors in options should not.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moeq.cli.arguments import (
    CALIBRATION,
    calibration_tokens,
    check_positive,
    checked_device,
    given_plan_options,
    read_model,
    refuse,
    requested_plan,
)
from moeq.errors import MoeqError

if TYPE_CHECKING:
    from moeq.calibration.calibration import Calibration
    from moeq.checkpoint.writer import Conversion
    from moeq.rounding import Rounding


def quantize(options: argparse.Namespace) -> int:
    """Write a packed checkpoint."""
    from moeq.checkpoint.writer import check_output_is_free

    output = options.output.absolute()
    check_output_is_free(output)
    _check_rounding(options)
    if options.dry_run:
        _prepared(options, None)
        return 0
    from moeq.checkpoint.workspace import clear
    from moeq.cli.printing import describe_result

    with _unfinished(output, options.resume) as measured:
        conversion, rounding = _prepared(options, measured)
        conversion.run(output, options.model, rounding, options.resume)
        clear(measured)
    print(describe_result(rounding), end="")
    print(f"wrote {options.output}")
    print(f"serve it with: vllm serve {options.output} --quantization moeq")
    return 0


@contextmanager
def _unfinished(output: Path, resume: bool) -> Iterator[Path]:
    """Keep other runs away from an output; give a folder for what a killed run leaves of a plan."""
    from moeq.checkpoint.workspace import clear, locked

    folder = output.with_name(f".{output.name}.moeq-plan")
    with locked(folder, f"another `moeq quantize` is writing {output}"):
        if not resume:
            clear(folder)
        try:
            yield folder
        finally:
            with suppress(OSError):  # it is not empty: there is something to go on with
                folder.rmdir()


def _prepared(
    options: argparse.Namespace, measured: Path | None
) -> tuple["Conversion", "Rounding | Calibration"]:
    """Decide what to do, and say it."""
    from moeq.checkpoint.writer import Conversion
    from moeq.cli.printing import describe_conversion, describe_plan, load_plan

    shard_bytes = _size(options.max_shard_size)
    reader, layers = read_model(options.model)
    if options.plan is not None:
        for name in given_plan_options(options):
            option = name.replace("_", "-")
            raise MoeqError(f"--{option} has no effect with --plan; give only one of them")
        refuse(options, "has no effect with --plan", "bits_per_weight", "target_size")
        plan = load_plan(options.plan)
    else:
        plan = requested_plan(options, reader, layers, measured)
    conversion = Conversion.prepare(reader, layers, plan, shard_bytes)
    rounding, note = _rounding(options, conversion)
    conversion = conversion.noting("rounding", note)
    print(describe_plan(conversion.plan))
    print(describe_conversion(conversion, rounding), flush=True)
    return conversion, rounding


def _method(options: argparse.Namespace) -> str:
    return options.method or ("rtn" if options.calib is None else "gptq")


def _check_rounding(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    from moeq.allocation import MEASURED
    from moeq.rounding import DATA_FREE

    method = _method(options)
    if method not in DATA_FREE:
        if options.calib is None:
            raise MoeqError(
                "--method gptq needs calibration text: --calib FILE, or --calib default"
            )
        return
    # With calibration text and nothing else said, the plan is measured.
    is_measured = options.calib is not None and options.strategy in (None, *MEASURED)
    is_measured &= options.plan is None
    useless = ["route_all_experts"]
    if not is_measured:
        useless += ["calib", *CALIBRATION]
    refuse(options, f"has no effect with --method {method}", *useless)
    if options.resume and not is_measured:
        raise MoeqError(f"--resume has no effect with --method {method}, which starts anew")


def _rounding(
    options: argparse.Namespace, conversion: "Conversion"
) -> tuple["Rounding | Calibration", str]:
    """Return how to round, and that in words."""
    from moeq.calibration.calibration import Calibration
    from moeq.rounding import DATA_FREE

    method = _method(options)
    if method in DATA_FREE:
        return DATA_FREE[method], method
    device = checked_device(options.device or "cpu")
    tokens = calibration_tokens(options, conversion.reader)
    count, length = tokens.shape
    # Its name only: a path of this machine is nobody's business who downloads the result.
    text = Path(options.calib).name
    note = f"gptq, {count} x {length} tokens of {text}, seed {options.seed or 0}"
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


def plan(options: argparse.Namespace) -> int:
    """Decide the width of every expert."""
    from moeq.allocation import MEASURED
    from moeq.checkpoint.writer import check_output_is_free
    from moeq.cli.printing import describe_plan, plan_summary, write_plan

    if options.calib is None:
        refuse(options, "has no effect without --calib", "method", *CALIBRATION)
    elif options.strategy not in (None, *MEASURED):
        why = f"has no effect with --strategy {options.strategy}"
        refuse(options, why, "calib", "method", *CALIBRATION)
    if options.output is not None:
        check_output_is_free(options.output)
    plan = requested_plan(options, *read_model(options.model))
    if options.output is not None:
        write_plan(plan, options.output)
    print(json.dumps(plan_summary(plan)) if options.json else describe_plan(plan))
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Show a plan."""
    from moeq.cli.printing import describe_plan, plan_of, plan_summary

    plan = plan_of(options.path)
    print(json.dumps(plan_summary(plan)) if options.json else describe_plan(plan))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check a packed checkpoint."""
    from moeq.checkpoint.verify import verify_checkpoint

    problems = verify_checkpoint(options.path)
    for problem in problems:
        print(f"moeq verify: {options.path}: {problem}", file=sys.stderr)
    if not problems:
        print(f"{options.path} is complete and undamaged")
    return 1 if problems else 0


def evaluate(options: argparse.Namespace) -> int:
    """Compare a packed checkpoint with its original."""
    import torch

    from moeq import evaluation
    from moeq.checkpoint.reader import CheckpointReader, resolve_model
    from moeq.cli.printing import describe_evaluation, evaluation_summary
    from moeq.model.text import evaluation_sequences

    check_positive(options, "nsamples", "seqlen")
    if options.seqlen < 2:
        raise MoeqError("--seqlen 1 leaves no token to predict; give at least 2")
    if options.dtype is not None and options.backend != "vllm":
        raise MoeqError(f"--dtype has no effect with --backend {options.backend}; leave it out")
    original = CheckpointReader(resolve_model(options.against))
    device = torch.device(checked_device(options.device))
    comparison = evaluation.load(options.path, original, device)
    sequences = evaluation_sequences(
        original.folder, options.text, options.nsamples, options.seqlen, options.seed
    )
    with _stdout_to_stderr():  # vLLM logs to the standard output
        found = comparison.evaluate(sequences, options.backend, options.dtype or "auto")
    if options.json:
        print(json.dumps(evaluation_summary(found)))
    else:
        print(describe_evaluation(found))
    return 0


def compare(options: argparse.Namespace) -> int:
    """Try every strategy at every budget; write a page."""
    import torch

    from moeq import comparison
    from moeq.checkpoint.writer import check_output_is_free
    from moeq.cli.printing import write_comparison
    from moeq.model.text import evaluation_sequences
    from moeq.rounding import DATA_FREE

    check_positive(options, "nsamples", "seqlen", "eval_nsamples")
    check_output_is_free(options.output.absolute())
    if find_spec("matplotlib") is None:
        raise MoeqError("the page needs matplotlib: pip install 'vllm-moeq[report]'")
    if options.calib == options.text:
        raise MoeqError("--text must be another text than --calib, or every plan looks too good")
    methods = tuple(options.methods.split(","))
    strategies = comparison.STRATEGIES
    if options.strategies is not None:
        strategies = tuple(options.strategies.split(","))
    for strategy in strategies:
        if strategy not in comparison.STRATEGIES:
            raise MoeqError(
                f"--strategies: {strategy!r} is not one of {', '.join(comparison.STRATEGIES)}"
            )
    for option, values in (
        ("--methods", methods),
        ("--bits", options.bits),
        ("--strategies", strategies),
    ):
        if len(set(values)) < len(values):
            raise MoeqError(f"{option} names the same value twice")
    for method in methods:
        if method != "gptq" and method not in DATA_FREE:
            raise MoeqError(f"--methods {method} is not one of gptq, {', '.join(DATA_FREE)}")
    if options.random < 2:
        raise MoeqError(f"--random {options.random} must be at least 2, for a spread")
    device = torch.device(checked_device(options.device or "cpu"))
    reader, layers = read_model(options.model)
    tokens = calibration_tokens(options, reader)
    heldout = evaluation_sequences(
        reader.folder, options.text, options.eval_nsamples, tokens.shape[1], 0
    )
    study = comparison.Study(
        reader,
        layers,
        options.model,
        options.base_router,
        options.bits,
        methods,
        options.group_size,
        options.random,
        tokens,
        heldout,
        device,
        options.seed or 0,
        strategies,
    )
    findings = study.run()
    judged = sum(part.numel() for part in heldout.values())
    notes = [
        f"Expert weights of {options.model} at lower widths, group size {options.group_size}; at "
        "each average all plans take the same bytes.",
        f"Calibrated on {tokens.shape[0]} x {tokens.shape[1]} tokens of {options.calib}, judged on "
        f"{judged:,} tokens of {options.text}.",
    ]
    write_comparison(options.output, findings, f"Bit plans for {options.model}", notes)
    print(comparison.as_markdown(findings))
    print(f"wrote {options.output}: compare.html, compare.md, compare.json")
    return 0


def bench(options: argparse.Namespace) -> int:
    """Measure one layer."""
    from moeq.bench import Machine, Settings, UsageError, describe, measure, prepare, rows

    if options.tune:
        return _tune(options)
    try:
        settings = Settings.parse(
            shape=options.shape,
            bits="2,3,4,8,2/3/4/8" if options.bits is None else options.bits,
            tokens="1,16,256" if options.tokens is None else options.tokens,
            against=options.against,
            group_size=options.group_size,
            threads=options.threads,
            runs=options.runs,
        )
    except UsageError as error:
        options.usage_error(str(error))
    with _stdout_to_stderr():  # vLLM logs to the standard output
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
            bits="3/2" if options.bits is None else options.bits,
            tokens="1,4,16,64,256,1024" if options.tokens is None else options.tokens,
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


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what is printed to the standard error, by child processes such as vLLM's engine, too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


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
    "compare": compare,
    "bench": bench,
}
"""By the name that the command line takes."""
