"""What the command line takes: options are the parameters of the Python API, with dashes.

An option that is not given is left out of the result, so that defaults are in one place, the
requests.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from moeq.requests import BACKENDS, MAXVARS, METHODS, REORDERS
from vllm_moeq._version import __version__

T = TypeVar("T")

START = """\
moeq quantizes Mixture-of-Experts models, each expert to its own bit-width.

  moeq quantize MODEL -o OUT --bits 2.5          a packed checkpoint from a folder or hub id
  moeq eval OUT --against MODEL --text HELDOUT   how far it is from the original
  vllm serve OUT --quantization moeq             serve it
  moeq --help                                    all commands; moeq COMMAND --help: one of them
"""
"""What ``moeq`` alone prints."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="moeq",
        description="Quantize Mixture-of-Experts models, each expert to its own bit-width.",
    )
    result.add_argument("--version", action="version", version=f"moeq {__version__}")
    commands = result.add_subparsers(dest="command", metavar="COMMAND")
    for command in _COMMANDS:
        added = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description
            or f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        added.set_defaults(parser=added)
        command.add_options(added)
    return result


def with_dashes(arguments: list[str]) -> list[str]:
    """Return arguments with ``--group_size`` spelled ``--group-size``."""

    def spelled(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return name.replace("_", "-") + equals + value if name.startswith("--") else argument

    return [spelled(argument) for argument in arguments]


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of the model")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")


def _flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup, name: str, text: str) -> None:
    parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)


def _quantize_options(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to create")
    parser.add_argument("--plan", type=Path, help="use this plan.json instead of making a plan")
    _flag(parser, "--resume", "go on with what an interrupted run has finished")
    _flag(parser, "--dry-run", "print plan, sizes, memory and time; write nothing")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="largest file of the result, which is also held in memory (default 2GB)",
    )
    _json(parser)
    _choice_options(parser)
    _rounding_options(parser)
    _flag(
        parser,
        "--route-all-experts",
        "round each expert by all tokens, not only by those that the router gives to it",
    )


def _plan_options(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("-o", "--output", type=Path, help="file to create; default: only print")
    _json(parser)
    _choice_options(parser)
    _rounding_options(parser)


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OUT|plan.json", type=Path)
    parser.add_argument(
        "--html", type=Path, default=None, help="also write one self-contained page to this file"
    )
    _json(parser)


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OUT", type=Path)
    _json(parser)


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=None, help="folder or hub id (default: none)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where results would be written (default: here)"
    )
    _json(parser)


def _completion_options(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument(
        "--quantize-embeddings",
        action="store_true",
        help="count the token embeddings and the output head among the dense layers",
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


def _eval_options(parser: argparse.ArgumentParser) -> None:
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
    _json(parser)


def _compare_options(parser: argparse.ArgumentParser) -> None:
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
    _json(parser)


def _bench_options(parser: argparse.ArgumentParser) -> None:
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
    _json(parser)
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


class _Command(NamedTuple):
    """One command: what it does in a line, an example, its options, and more words if need be."""

    name: str
    summary: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    description: str = ""


_COMMANDS = (
    _Command(
        "quantize",
        "write a packed checkpoint for vLLM",
        "moeq quantize mistralai/Mixtral-8x7B-v0.1 -o mixtral-2.5 --bits 2.5",
        _quantize_options,
        "Write a packed checkpoint for vLLM. By default the plan is measured with a built-in text\n"
        "and experts are rounded with GPTQ, which takes a while: --dry-run says how long. Quick\n"
        "ways out: --calib none (no text, seconds: the paper's rule and rounding to nearest).",
    ),
    _Command(
        "plan",
        "decide the width of every expert; write plan.json",
        "moeq plan mistralai/Mixtral-8x7B-v0.1 -o plan.json --target-size 16GB",
        _plan_options,
    ),
    _Command(
        "inspect",
        "show the plan of a checkpoint or plan.json",
        "moeq inspect mixtral-2.5 --html page.html",
        _inspect_options,
    ),
    _Command(
        "verify",
        "check that a packed checkpoint is undamaged",
        "moeq verify mixtral-2.5",
        _verify_options,
    ),
    _Command(
        "eval",
        "compare a packed checkpoint with its original on held-out text",
        "moeq eval mixtral-2.5 --against mistralai/Mixtral-8x7B-v0.1 --text heldout.txt",
        _eval_options,
        "Perplexity, divergence (KL) from the original, how often the likeliest token is the\n"
        "same, and how often routers choose other experts; for each text, and over all.",
    ),
    _Command(
        "compare",
        "try every strategy on a model, at equal bytes; write a page",
        "moeq compare allenai/OLMoE-1B-7B-0924 -o page --text heldout.txt",
        _compare_options,
        "Rounds each expert once for each width, puts plans of every strategy together from\n"
        "that, and judges them on held-out text: size against divergence, as a page, a picture,\n"
        "Markdown and JSON.",
    ),
    _Command(
        "bench",
        "measure the speed of one MoE layer",
        "moeq bench --shape mixtral --tokens 1,16 --against vllm --threads 2",
        _bench_options,
        "Time one MoE layer with random weights on this CPU, or find the fastest tiles for it\n"
        "on this GPU (--tune). The environment chooses the kernel (MOEQ_KERNEL), its\n"
        "instruction set (MOEQ_CPU_ISA) and the precision of activations inside it\n"
        "(MOEQ_CPU_ACTIVATION: int16, the default, or int8).",
    ),
    _Command(
        "doctor",
        "look at versions, kernels, memory and disk, and compare them with a model's need",
        "moeq doctor mistralai/Mixtral-8x7B-v0.1",
        _doctor_options,
    ),
    _Command("families", "list the model families that moeq reads", "moeq families --json", _json),
    _Command(
        "completion",
        "print what makes a shell complete commands and options",
        'eval "$(moeq completion bash)"',
        _completion_options,
    ),
)
"""In the order of the help."""
