"""The ``moeq`` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeq.calibration import Calibration
    from moeq.checkpoint import CheckpointReader
    from moeq.convert import Conversion, Rounding
    from moeq.families import MoELayer
    from vllm_moeq.format import BitPlan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 failed, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    from moeq.errors import MoeqError
    from vllm_moeq.format import FormatError

    try:
        status: int = options.run(options)
    except (MoeqError, FormatError) as error:
        print(f"moeq {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"moeq {options.command}: interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moeq",
        description="Quantize Mixture-of-Experts models, each expert to its own bit-width.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quantize = commands.add_parser("quantize", help="write a packed checkpoint for vLLM")
    quantize.add_argument("model", metavar="MODEL", help="folder or hub id of the model")
    quantize.add_argument("-o", "--output", required=True, type=Path, help="folder to create")
    quantize.add_argument("--plan", type=Path, help="use this plan.json instead of making a plan")
    quantize.add_argument(
        "--resume", action="store_true", help="go on with a calibration that was interrupted"
    )
    quantize.add_argument(
        "--dry-run", action="store_true", help="print plan, sizes and memory; write nothing"
    )
    quantize.add_argument(
        "--max-shard-size",
        default="2GB",
        metavar="SIZE",
        help="largest file of the result, which is also held in memory (default 2GB)",
    )
    _add_plan_options(quantize)
    _add_rounding_options(quantize)
    quantize.set_defaults(run=_quantize)

    plan = commands.add_parser("plan", help="decide the width of every expert; write plan.json")
    plan.add_argument("model", metavar="MODEL", help="folder or hub id of the model")
    plan.add_argument("-o", "--output", type=Path, help="file to create; default: only print")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    _add_plan_options(plan)
    plan.set_defaults(run=_plan)

    inspect = commands.add_parser("inspect", help="show the plan of a checkpoint or plan.json")
    inspect.add_argument("path", metavar="OUT|plan.json", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="check that a packed checkpoint is undamaged")
    verify.add_argument("path", metavar="OUT", type=Path)
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="measure the speed of one MoE layer on this CPU")
    _add_bench_options(bench)
    bench.set_defaults(run=_bench, usage_error=bench.error)
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plan")
    group.add_argument("--bits", type=float, help="average width of the expert weights, as in 2.5")
    group.add_argument(
        "--levels", type=_levels, help="widths to use, as in 3,2 (default: those next to --bits)"
    )
    group.add_argument(
        "--strategy",
        help="combined (default), router-norm, maxvar, uniform or random:SEED",
    )
    group.add_argument(
        "--base-router",
        metavar="SOURCE",
        help="router before training: a checkpoint, or a safetensors file as written by "
        "moeq.RouterNormTracker; without it the final router norm stands in",
    )
    group.add_argument("--group-size", type=int, help="weights per scale: 32, 64 or 128 (default)")
    group.add_argument(
        "--zeta", type=float, help="MaxVar factor that lets an expert overtake (default 3)"
    )
    group.add_argument(
        "--maxvar",
        choices=["max-row", "highest-norm-row"],
        help="MaxVar as in the paper (default) or as in its published code for Mixtral",
    )
    group.add_argument(
        "--reorder",
        choices=["stable", "one-pass"],
        help="repeat the MaxVar re-order until stable (default), or visit each place once",
    )


def _add_rounding_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rounding")
    group.add_argument(
        "--method",
        choices=["gptq", "hqq", "rtn"],
        help="gptq needs calibration text and is the default with --calib; hqq and rtn (the "
        "default without) do not",
    )
    group.add_argument(
        "--calib",
        metavar="TEXT",
        help="calibration text: a file, a folder of .txt files, a .jsonl file, a dataset of the "
        "hub, or default (the manual of Python)",
    )
    group.add_argument("--nsamples", type=int, help="calibration sequences (default 128)")
    group.add_argument("--seqlen", type=int, help="tokens of each (default 512)")
    group.add_argument("--seed", type=int, help="of the draw of sequences (default 0)")
    group.add_argument("--device", help="where to calibrate: cpu (default) or cuda")


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time one MoE layer with random weights. The environment chooses the kernel (MOEQ_KERNEL), "
        "its instruction set (MOEQ_CPU_ISA) and the precision of activations inside it "
        "(MOEQ_CPU_ACTIVATION: int16, the default, or int8)."
    )
    parser.add_argument(
        "--shape",
        default="olmoe",
        help="mixtral, olmoe (default), qwen3, or the sizes HIDDEN,INTERMEDIATE,EXPERTS,TOP_K",
    )
    parser.add_argument(
        "--bits",
        default="2,3,4,8,2/3/4/8",
        help="widths to measure, one after another; a mix such as 2/3/4/8 is dealt to the experts "
        "in turn (default %(default)s)",
    )
    parser.add_argument(
        "--tokens", default="1,16,256", help="numbers of tokens to measure (default %(default)s)"
    )
    parser.add_argument(
        "--against",
        default="",
        metavar="CONTENDERS",
        help="vllm, reference or both: vLLM's own bfloat16 kernel, and our torch reference",
    )
    parser.add_argument(
        "--group-size", type=int, default=128, help="weights per scale: 32, 64 or 128 (default)"
    )
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument(
        "--runs", type=int, default=9, help="timed calls of each, at least 3 (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of rows as JSON")


def _levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of widths such as 3,2") from None


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


def _quantize(options: argparse.Namespace) -> int:
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
        for name in ("calib", "nsamples", "seqlen", "seed", "device"):
            if getattr(options, name) is not None:
                raise MoeqError(f"--{name} has no effect with --method {method}; leave it out")
        if options.resume:
            raise MoeqError(f"--resume has no effect with --method {method}, which starts anew")
        return DATA_FREE[method], method
    if options.calib is None:
        raise MoeqError("--method gptq needs calibration text: --calib FILE, or --calib default")
    counts = {"nsamples": options.nsamples, "seqlen": options.seqlen}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise MoeqError(f"--{name} {value} is not a positive number")
    device = _device(options.device or "cpu")
    count, length, seed = options.nsamples or 128, options.seqlen or 512, options.seed or 0
    tokens = calibration_sequences(conversion.reader.folder, options.calib, count, length, seed)
    note = f"gptq, {len(tokens)} x {length} tokens of {options.calib}, seed {seed}"
    calibration = Calibration(conversion.reader, conversion.layers, conversion.plan, tokens, device)
    return calibration, note


def _device(name: str) -> str:
    import torch

    from moeq.errors import MoeqError

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise MoeqError(f"--device {name} cannot be used: {reason}") from error
    return name


def _plan(options: argparse.Namespace) -> int:
    from moeq.report import describe_plan, plan_summary, write_plan

    plan = _make_plan(options, *_read_model(options.model))
    if options.output is not None:
        write_plan(plan, options.output)
    print(json.dumps(plan_summary(plan)) if options.json else describe_plan(plan))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from moeq.report import describe_plan, plan_of, plan_summary

    plan = plan_of(options.path)
    print(json.dumps(plan_summary(plan)) if options.json else describe_plan(plan))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from moeq.verify import verify_checkpoint

    problems = verify_checkpoint(options.path)
    for problem in problems:
        print(f"moeq verify: {options.path}: {problem}", file=sys.stderr)
    if not problems:
        print(f"{options.path} is complete and undamaged")
    return 1 if problems else 0


def _bench(options: argparse.Namespace) -> int:
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
    from moeq.errors import MoeqError

    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.isdecimal() or int(number) == 0:
        raise MoeqError(f"--max-shard-size {text} is no size such as 2GB or 500MB")
    return int(number) * units[unit]


if __name__ == "__main__":
    sys.exit(main())
