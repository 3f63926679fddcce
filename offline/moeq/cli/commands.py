"""What the commands of ``moeq`` do: a request out of the options, and its result in words.

Each imports what it needs when it runs: torch and transformers take seconds, which ``--help`` and
errors in options should not.
"""

import json
import os
import shlex
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Any

from moeq.cli.flags import with_flags
from moeq.cli.progress import Bars
from moeq.requests import CompareRequest, EvaluateRequest, PlanRequest, QuantizeRequest

_COLUMNS = 110


def quantize(options: Namespace) -> int:
    """Write a packed checkpoint."""
    request = QuantizeRequest(**_parameters(options))
    from moeq import pipeline
    from moeq.cli import printing
    from moeq.model.device import torch_device

    with Bars() as progress:
        model = pipeline.quantize(request, progress)
    device = torch_device(request.device)
    if options.json:
        print(json.dumps(printing.model_summary(model, device)))
        return 0
    if not model.written and model.estimate.measuring is not None:
        print("the plan is not measured here; this is one of the same size:")
    print(printing.describe_plan(model.plan))
    print(printing.describe_estimate(model.estimate, device))
    if model.calibration is not None:
        print(printing.describe_calibration(model.calibration))
    if model.written:
        path = shlex.quote(str(model.path))
        print(f"wrote {model.path}")
        if model.in_vllm:
            print(f"serve it with: vllm serve {path} --quantization moeq")
        else:
            print(
                "load it with: import vllm_moeq.hf; "
                f"AutoModelForSeq2SeqLM.from_pretrained({str(model.path)!r})"
            )
    return 0


def plan(options: Namespace) -> int:
    """Decide the width of every expert."""
    request = PlanRequest(**_parameters(options))
    from moeq import pipeline
    from moeq.cli import printing

    with Bars() as progress:
        result = pipeline.plan(request, progress)
    print(
        json.dumps(printing.plan_summary(result))
        if options.json
        else printing.describe_plan(result)
    )
    return 0


def inspect(options: Namespace) -> int:
    """Show a plan."""
    import moeq
    from moeq.cli import printing

    inspection = moeq.inspect(options.path, options.html)
    if options.json:
        known = ("calibration", "measurement", "router_norms")
        more = {name: getattr(inspection, name) for name in known}
        print(json.dumps(printing.plan_summary(inspection.plan) | more))
    else:
        print(printing.describe_plan(inspection.plan))
    return 0


def verify(options: Namespace) -> int:
    """Check a packed checkpoint."""
    import moeq

    problems = moeq.verify(options.path)
    if options.json:
        print(json.dumps({"path": str(options.path), "problems": problems}))
        return 1 if problems else 0
    for problem in problems:
        print(f"moeq verify: {options.path}: {problem}", file=sys.stderr)
    if not problems:
        print(f"{options.path} is complete and undamaged")
    return 1 if problems else 0


def evaluate(options: Namespace) -> int:
    """Compare a packed checkpoint with its original."""
    request = EvaluateRequest(**_parameters(options))
    from moeq import pipeline
    from moeq.cli import printing

    with _stdout_to_stderr(), Bars() as progress:  # vLLM logs to the standard output
        evaluation = pipeline.evaluate(request, progress)
    if options.json:
        print(json.dumps(printing.evaluation_summary(evaluation)))
    else:
        print(printing.describe_evaluation(evaluation))
    return 0


def compare(options: Namespace) -> int:
    """Try every strategy at every budget; write a page."""
    request = CompareRequest(**_parameters(options))
    from moeq import pipeline
    from moeq.comparison import as_json, as_markdown

    with Bars() as progress:
        findings = pipeline.compare(request, progress)
    if options.json:
        print(json.dumps(as_json(findings)))
        return 0
    print(as_markdown(findings))
    print(f"wrote {request.output}: compare.html, .svg, .md and .json")
    return 0


def bench(options: Namespace) -> int:
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
        _usage_error(options.parser, str(error))
    with _stdout_to_stderr():  # vLLM logs to the standard output
        machine = Machine.detect()
        measurement = measure(settings, machine, prepare(settings, machine))
    if options.json:
        print(json.dumps([asdict(row) for row in rows(measurement)]))
    else:
        print(describe(measurement))
    return 0


def _tune(options: Namespace) -> int:
    from moeq.bench import Settings, UsageError
    from moeq.bench.tune import tune_and_write

    for name in ("against", "threads", "json"):
        if getattr(options, name):
            _usage_error(options.parser, f"`{name}`: has no effect with `tune`; leave it out")
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
        _usage_error(options.parser, str(error))
    if len(settings.bits) > 1:
        _usage_error(options.parser, "`bits`: `tune` takes one width or one mix such as 3/2")
    print(tune_and_write(settings, options.seconds))
    return 0


def doctor(options: Namespace) -> int:
    """Say what fits and what does not; fail if something does not."""
    from moeq.doctor import findings

    with _stdout_to_stderr():  # vLLM logs to the standard output
        results = list(findings(options.model, options.folder))
    if options.json:
        print(json.dumps([finding._asdict() for finding in results]))
    else:
        width = max(len(finding.name) for finding in results)
        for finding in results:
            print(f"{finding.name:<{width}}  {finding.state:<7}  {finding.text}")
    return 1 if any(finding.state == "problem" for finding in results) else 0


def families(options: Namespace) -> int:
    """List the families."""
    from moeq.checkpoint.families import FAMILIES, FOUND_BY_TESTS

    tested = json.loads(FOUND_BY_TESTS.read_text())
    rows = [
        {
            "model_type": name,
            "experts": f"{family.example}{family.experts}",
            "router": f"{family.example}{family.router}",
            "projections": ", ".join(filter(None, (family.gate, family.up, family.down))),
            "tested": tested.get(name, {}),
        }
        for family in FAMILIES
        for name in family.model_types
    ]
    if options.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(f"{row['model_type']:<17} {row['experts']}.E.{{{row['projections']}}}")
        for line in _tested(row["tested"]):
            print(
                textwrap.fill(line, _COLUMNS, initial_indent=" " * 18, subsequent_indent=" " * 20)
            )
    print(
        "a tensor for each expert or fused ones, 16 or 32 bits, FP8, MXFP4 or INT4;\n"
        "routed experts are quantized, and with --dense-bits attention and dense MLPs;\n"
        "other models are read as transformers describes them, where it does"
    )
    return 0


def _tested(facts: Mapping[str, str]) -> Iterator[str]:
    """Yield lines on what tests found of a family: what is true, what is not tested, the rest."""
    for words, cell in (("tested", "yes"), ("not tested", "-")):
        named = [fact for fact in facts if facts[fact] == cell]
        if named:
            yield f"{words}: {', '.join(named)}"
    for fact, cell in facts.items():
        if cell not in ("yes", "-"):
            yield f"{fact}: {cell}"


def completion(options: Namespace) -> int:
    """Print a completion script."""
    import shtab

    from moeq.cli.options import parser

    print(shtab.complete(parser(), shell=options.shell))
    return 0


def _parameters(options: Namespace) -> dict[str, Any]:
    """Return the parameters of a request: what was given on the command line."""
    ours = ("command", "parser", "json")
    return {name: value for name, value in vars(options).items() if name not in ours}


def _usage_error(parser: ArgumentParser, message: str) -> None:
    parser.error(f"argument {with_flags(message, parser)}")


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


COMMANDS = {
    "quantize": quantize,
    "plan": plan,
    "inspect": inspect,
    "verify": verify,
    "eval": evaluate,
    "compare": compare,
    "bench": bench,
    "doctor": doctor,
    "families": families,
    "completion": completion,
}
"""By the name that the command line takes."""
