"""The ``moeq`` command."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 failed, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    from moeq.cli import commands
    from moeq.errors import MoeqError
    from vllm_moeq.format import FormatError

    try:
        status: int = commands.COMMANDS[options.command](options)
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
        "--resume", action="store_true", help="go on with what an interrupted run has finished"
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
    quantize.add_argument(
        "--route-all-experts",
        action="store_true",
        default=None,
        help="round each expert by all tokens, not only by those that the router gives to it",
    )

    plan = commands.add_parser("plan", help="decide the width of every expert; write plan.json")
    plan.add_argument("model", metavar="MODEL", help="folder or hub id of the model")
    plan.add_argument("-o", "--output", type=Path, help="file to create; default: only print")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    _add_plan_options(plan)
    _add_rounding_options(plan)

    inspect = commands.add_parser("inspect", help="show the plan of a checkpoint or plan.json")
    inspect.add_argument("path", metavar="OUT|plan.json", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON")

    verify = commands.add_parser("verify", help="check that a packed checkpoint is undamaged")
    verify.add_argument("path", metavar="OUT", type=Path)

    evaluate = commands.add_parser(
        "eval", help="compare a packed checkpoint with its original on held-out text"
    )
    _add_eval_options(evaluate)

    compare = commands.add_parser(
        "compare", help="try every strategy on a model, at equal bytes; write a page"
    )
    _add_compare_options(compare)

    bench = commands.add_parser("bench", help="measure the speed of one MoE layer")
    _add_bench_options(bench)
    bench.set_defaults(usage_error=bench.error)
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plan")
    group.add_argument("--bits", type=float, help="average width of the expert weights, as in 2.5")
    group.add_argument(
        "--bits-per-weight", type=float, help="instead: the same with scales and zero points"
    )
    group.add_argument(
        "--target-size",
        metavar="SIZE",
        help="instead: size of all tensors of the result, as in 14GB",
    )
    group.add_argument(
        "--levels", type=_levels, help="widths to use, as in 3,2 (default: those next to --bits)"
    )
    group.add_argument(
        "--strategy",
        help="with --calib: auto (the default then; tries several plans) or sensitivity; without: "
        "combined (the default then), router-norm, maxvar, uniform or random:SEED",
    )
    group.add_argument(
        "--base-router",
        metavar="SOURCE",
        help="router before training: a checkpoint, or a safetensors file as written by "
        "moeq.RouterNormTracker; without it the final router norm stands in",
    )
    group.add_argument(
        "--group-size",
        type=_group_sizes,
        metavar="SIZE",
        help="weights per scale: 32, 64 or 128 (default); measured plans choose from several, as "
        "in 32,64,128, with as many bytes as the largest would take",
    )
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
    side = parser.add_argument_group("what a measured plan must fulfil beside its size")
    side.add_argument(
        "--ranks", type=int, help="expert-parallel ranks that are to hold equal bytes, up to 1 %%"
    )
    side.add_argument(
        "--layer-tolerance",
        type=float,
        metavar="SHARE",
        help="bytes of a layer may differ from the mean of all layers by this share, as in 0.1",
    )
    side.add_argument("--widths-per-layer", type=int, help="most different widths in a layer")
    side.add_argument(
        "--same-width",
        action="store_true",
        default=None,
        help="both projections of an expert get the same width",
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


def _add_eval_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Perplexity, divergence (KL) from the original, how often the likeliest token is the same, "
        "and how often routers choose other experts; for each text, and over all of them."
    )
    parser.add_argument("path", metavar="OUT", type=Path, help="packed checkpoint")
    parser.add_argument(
        "--against", required=True, metavar="MODEL", help="folder or hub id of the original"
    )
    parser.add_argument(
        "--text",
        required=True,
        help="held-out text, in the forms that --calib of `moeq quantize` takes; each file of a "
        "folder is judged by itself, too",
    )
    parser.add_argument(
        "--backend",
        choices=["reference", "transformers", "vllm"],
        default="reference",
        help="reference (default): layer by layer from disk, float32; transformers: whole models "
        "in memory, float32; vllm: OUT as it is served, against the original in float32",
    )
    parser.add_argument("--dtype", help="of vllm, as in vllm serve (default auto)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda; not of vllm")
    parser.add_argument("--nsamples", type=int, default=16, help="sequences a text (default 16)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of each (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of sequences (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Rounds each expert once for each width, puts plans of every strategy together from that, "
        "and judges them on held-out text: size against divergence, as a page, Markdown and JSON."
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of the model")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to create")
    parser.add_argument(
        "--bits", type=_bits_list, default=(2, 2.25, 2.5, 3, 4), help="default 2,2.25,2.5,3,4"
    )
    parser.add_argument(
        "--methods", default="gptq", help="of rounding, as in gptq,rtn,hqq (default gptq)"
    )
    parser.add_argument(
        "--strategies",
        metavar="LIST",
        help="as in 'pmq,global sensitivity' (default all); uniform and random plans are always in",
    )
    parser.add_argument("--calib", required=True, help="calibration text, as in moeq quantize")
    parser.add_argument("--text", required=True, help="held-out text, in the same forms")
    parser.add_argument("--base-router", metavar="SOURCE", help="as in moeq quantize")
    parser.add_argument("--group-size", type=int, default=128, help="32, 64 or 128 (default)")
    parser.add_argument("--random", type=int, default=5, help="random plans (default 5)")
    parser.add_argument("--nsamples", type=int, help="calibration sequences (default 128)")
    parser.add_argument("--seqlen", type=int, help="tokens of a sequence (default 512)")
    parser.add_argument(
        "--eval-nsamples", type=int, default=8, help="held-out sequences of a text (default 8)"
    )
    parser.add_argument("--seed", type=int, help="of the draw of sequences (default 0)")
    parser.add_argument("--device", help="cpu (default) or cuda")


def _bits_list(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 2,2.5,3") from None


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time one MoE layer with random weights on this CPU, or find the fastest tiles for it on "
        "this GPU (--tune). The environment chooses the kernel (MOEQ_KERNEL), its instruction set "
        "(MOEQ_CPU_ISA) and the precision of activations inside it (MOEQ_CPU_ACTIVATION: int16, "
        "the default, or int8)."
    )
    parser.add_argument(
        "--shape",
        default="olmoe",
        help="mixtral, olmoe (default), qwen3, or the sizes HIDDEN,INTERMEDIATE,EXPERTS,TOP_K",
    )
    parser.add_argument(
        "--bits",
        help="widths to measure, one after another; a mix such as 2/3/4/8 is dealt to the experts "
        "in turn (default 2,3,4,8,2/3/4/8; with --tune 3/2)",
    )
    parser.add_argument(
        "--tokens",
        help="numbers of tokens to measure (default 1,16,256; with --tune 1,4,16,64,256,1024)",
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
    parser.add_argument(
        "--tune",
        action="store_true",
        help="find the fastest tiles of the Triton kernel for this shape on this GPU, and add them "
        "to the file that the kernel reads: MOEQ_TILES, else one for each GPU in MOEQ_CACHE_DIR",
    )
    parser.add_argument(
        "--seconds", type=float, default=900, help="time for --tune (default %(default)s)"
    )


def _group_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size or list such as 64,128") from None


def _levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of widths such as 3,2") from None
