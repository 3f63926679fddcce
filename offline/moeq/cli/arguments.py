"""The options of each command: those of a request are its parameters, with dashes."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moeq.requests import BACKENDS, MAXVARS, METHODS, REORDERS

T = TypeVar("T")


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of the model")


def json_option(parser: argparse.ArgumentParser) -> None:
    """Add the option to print JSON."""
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")


def _flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup, name: str, text: str) -> None:
    parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)


def quantize_options(parser: argparse.ArgumentParser) -> None:
    """Add those of ``moeq quantize``."""
    _model(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to create")
    parser.add_argument("--plan", type=Path, help="use this plan.json instead of making a plan")
    _flag(parser, "--resume", "go on with what an interrupted run has finished")
    _flag(parser, "--dry-run", "print plan, sizes, memory and time; write nothing")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="largest file of the result, which is also held in memory (default 1GB)",
    )
    json_option(parser)
    _choice_options(parser)
    _rounding_options(parser)
    _flag(
        parser,
        "--route-all-experts",
        "round each expert by all tokens, not only by those that the router gives to it",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="let the machines of a Ray cluster do the work; without ADDRESS the one that this "
        "machine is a node of",
    )


def plan_options(parser: argparse.ArgumentParser) -> None:
    """Add those of ``moeq plan``."""
    _model(parser)
    parser.add_argument("-o", "--output", type=Path, help="file to create; default: only print")
    json_option(parser)
    _choice_options(parser)
    _rounding_options(parser)


def inspect_options(parser: argparse.ArgumentParser) -> None:
    """Add those of ``moeq inspect``."""
    parser.add_argument("path", metavar="OUT|plan.json", type=Path)
    parser.add_argument(
        "--html", type=Path, default=None, help="also write one self-contained page to this file"
    )
    json_option(parser)


def verify_options(parser: argparse.ArgumentParser) -> None:
    """Add those of ``moeq verify``."""
    parser.add_argument("path", metavar="OUT", type=Path)
    json_option(parser)


def doctor_options(parser: argparse.ArgumentParser) -> None:
    """Add those of ``moeq doctor``."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=None, help="folder or hub id (default: none)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where results would be written (default: here)"
    )
    json_option(parser)


def completion_options(parser: argparse.ArgumentParser) -> None:
    """Add those of ``moeq completion``."""
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def _choice_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--bits", type=float, help="average width of the expert weights (default 2.5)"
    )
    group.add_argument(
        "--bits-per-weight", type=float, help="instead: average of all weights of the result"
    )
    group.add_argument(
        "--target-size",
        metavar="SIZE",
        help="instead: size of all tensors of the result, as in 14GB",
    )
    group.add_argument(
        "--dense-bits",
        type=_width_or_auto,
        metavar="BITS",
        help="width of attention projections, shared experts and dense MLPs: 16, 8, 4, or auto "
        "(default: a measured plan chooses for each; others leave them as they are)",
    )
    _flag(
        group,
        "--quantize-embeddings",
        "count the token embeddings and the output head among the dense layers",
    )
    group.add_argument(
        "--levels",
        type=_list_of(int, "widths such as 3,2"),
        help="widths to use, as in 3,2 (default: those next to --bits)",
    )
    group.add_argument(
        "--strategy",
        help="with text: auto (the default then; tries several plans) or sensitivity; without: "
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
        type=_list_of(int, "sizes such as 64,128"),
        metavar="SIZE",
        help="weights per scale: 32, 64 or 128 (default: what fits the model, 128 for most); "
        "measured plans choose from several, as in 32,64,128, with as many bytes as the largest "
        "would take",
    )
    group.add_argument(
        "--zeta", type=float, help="MaxVar factor that lets an expert overtake (default 3)"
    )
    group.add_argument(
        "--maxvar",
        choices=MAXVARS,
        help="MaxVar as in the paper (default) or as in its published code for Mixtral",
    )
    group.add_argument(
        "--reorder",
        choices=REORDERS,
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
    _flag(side, "--same-width", "both projections of an expert get the same width")


def _rounding_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rounding")
    group.add_argument(
        "--method",
        choices=METHODS,
        help="gptq needs calibration text and is the default with it; hqq and rtn (the default "
        "without) do not",
    )
    group.add_argument(
        "--calib",
        metavar="TEXT",
        help="calibration text: a file, a folder of .txt files, a .jsonl file, a dataset of the "
        "hub, default (the manual of Python, the default), or none",
    )
    _text_options(group)


def _text_options(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    group.add_argument("--nsamples", type=int, help="calibration sequences (default 128)")
    group.add_argument("--seqlen", type=int, help="tokens of each (default 512)")
    group.add_argument("--seed", type=int, help="of the draw of sequences (default 0)")
    group.add_argument(
        "--device", help="where to calibrate: auto (default: a CUDA GPU if there is one), cpu, cuda"
    )


def eval_options(parser: argparse.ArgumentParser) -> None:
    """Add those of ``moeq eval``."""
    parser.add_argument("packed", metavar="OUT", type=Path, help="packed checkpoint")
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
        choices=BACKENDS,
        help="reference (default): layer by layer from disk, float32; transformers: whole models "
        "in memory, float32; vllm: OUT as it is served, against the original in float32",
    )
    parser.add_argument("--dtype", help="of vllm, as in vllm serve (default auto)")
    parser.add_argument("--device", help="auto (default), cpu or cuda; not of vllm")
    parser.add_argument("--nsamples", type=int, help="sequences a text (default 16)")
    parser.add_argument("--seqlen", type=int, help="tokens of each (default 512)")
    parser.add_argument("--seed", type=int, help="of the draw of sequences (default 0)")
    json_option(parser)


def compare_options(parser: argparse.ArgumentParser) -> None:
    """Add those of ``moeq compare``."""
    _model(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to create")
    parser.add_argument(
        "--bits", type=_list_of(float, "averages such as 2,2.5"), help="default 2,2.25,2.5,3,4"
    )
    parser.add_argument(
        "--methods",
        type=_list_of(str, "methods"),
        help="of rounding, as in gptq,rtn,hqq (default gptq)",
    )
    parser.add_argument(
        "--strategies",
        metavar="LIST",
        type=_list_of(str, "strategies"),
        help="as in 'pmq,global sensitivity' (default all); uniform and random plans are always in",
    )
    parser.add_argument("--calib", help="calibration text, as in moeq quantize (default: default)")
    parser.add_argument("--text", required=True, help="held-out text, in the same forms")
    parser.add_argument("--base-router", metavar="SOURCE", help="as in moeq quantize")
    parser.add_argument("--group-size", type=int, help="as in moeq quantize, but only one")
    parser.add_argument("--random", type=int, help="random plans (default 5)")
    parser.add_argument(
        "--eval-nsamples", type=int, help="held-out sequences of a text (default 8)"
    )
    _text_options(parser)
    json_option(parser)


def bench_options(parser: argparse.ArgumentParser) -> None:
    """Add those of ``moeq bench``."""
    parser.add_argument(
        "--shape",
        default="olmoe",
        help="mixtral, olmoe (default), qwen3, or the sizes HIDDEN,INTERMEDIATE,EXPERTS,TOP_K",
    )
    parser.add_argument(
        "--bits",
        default=None,
        help="widths to measure, one after another; a mix such as 2/3/4/8 is dealt to the experts "
        "in turn (default 2,3,4,8,2/3/4/8; with --tune 3/2)",
    )
    parser.add_argument(
        "--tokens",
        default=None,
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
    parser.add_argument("--threads", type=int, default=None, help="default: as many as torch takes")
    parser.add_argument(
        "--runs", type=int, default=9, help="timed calls of each, at least 3 (default %(default)s)"
    )
    json_option(parser)
    parser.add_argument(
        "--tune",
        action="store_true",
        default=False,
        help="find the fastest tiles of the Triton kernel for this shape on this GPU, and add them "
        "to the file that the kernel reads: MOEQ_TILES, else one for each GPU in MOEQ_CACHE_DIR",
    )
    parser.add_argument(
        "--seconds", type=float, default=900, help="time for --tune (default %(default)s)"
    )


def _width_or_auto(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _list_of(kind: Callable[[str], T], what: str) -> Callable[[str], tuple[T, ...]]:
    def parse(text: str) -> tuple[T, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {what}") from None

    return parse
