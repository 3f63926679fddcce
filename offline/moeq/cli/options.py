"""What the command line takes: options are the parameters of the Python API, with dashes.

An option that is not given is left out of the result, so that defaults are in one place, the
requests.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from moeq.cli import arguments
from vllm_moeq._version import __version__

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


def with_dashes(given: list[str]) -> list[str]:
    """Return arguments with ``--group_size`` spelled ``--group-size``."""

    def spelled(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return name.replace("_", "-") + equals + value if name.startswith("--") else argument

    return [spelled(argument) for argument in given]


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
        arguments.quantize_options,
        "Write a packed checkpoint for vLLM. By default the plan is measured with a built-in text\n"
        "and experts are rounded with GPTQ, which takes a while: --dry-run says how long. Much\n"
        "faster: --calib none (no text, seconds: the paper's rule and rounding to nearest).",
    ),
    _Command(
        "plan",
        "decide the width of every expert; write plan.json",
        "moeq plan mistralai/Mixtral-8x7B-v0.1 -o plan.json --target-size 16GB",
        arguments.plan_options,
    ),
    _Command(
        "inspect",
        "show the plan of a checkpoint or plan.json",
        "moeq inspect mixtral-2.5 --html page.html",
        arguments.inspect_options,
    ),
    _Command(
        "verify",
        "check that a packed checkpoint is undamaged",
        "moeq verify mixtral-2.5",
        arguments.verify_options,
    ),
    _Command(
        "eval",
        "compare a packed checkpoint with its original on held-out text",
        "moeq eval mixtral-2.5 --against mistralai/Mixtral-8x7B-v0.1 --text heldout.txt",
        arguments.eval_options,
        "Perplexity, divergence (KL) from the original, how often the likeliest token is the\n"
        "same, and how often routers choose other experts; for each text, and over all.",
    ),
    _Command(
        "compare",
        "try every strategy on a model, at equal bytes; write a page",
        "moeq compare allenai/OLMoE-1B-7B-0924 -o page --text heldout.txt",
        arguments.compare_options,
        "Rounds each expert once for each width, puts plans of every strategy together from\n"
        "that, and judges them on held-out text: size against divergence, as a page, a picture,\n"
        "Markdown and JSON.",
    ),
    _Command(
        "bench",
        "measure the speed of one MoE layer",
        "moeq bench --shape mixtral --tokens 1,16 --against vllm --threads 2",
        arguments.bench_options,
        "Time one MoE layer with random weights on this CPU, or find the fastest tiles for it\n"
        "on this GPU (--tune). The environment chooses the kernel (MOEQ_KERNEL), its\n"
        "instruction set (MOEQ_CPU_ISA) and the precision of activations inside it\n"
        "(MOEQ_CPU_ACTIVATION: int16, the default, or int8).",
    ),
    _Command(
        "doctor",
        "look at versions, kernels, memory and disk, and compare them with a model's need",
        "moeq doctor mistralai/Mixtral-8x7B-v0.1",
        arguments.doctor_options,
    ),
    _Command(
        "families",
        "list the model families that moeq reads",
        "moeq families --json",
        arguments.json_option,
    ),
    _Command(
        "completion",
        "print what makes a shell complete commands and options",
        'eval "$(moeq completion bash)"',
        arguments.completion_options,
    ),
)
"""In the order of the help."""
