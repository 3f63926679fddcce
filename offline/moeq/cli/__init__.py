"""The ``moeq`` command."""

import logging
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moeq.cli.commands import COMMANDS
from moeq.cli.flags import with_flags
from moeq.cli.options import START, parser, with_dashes
from moeq.errors import MoeqError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 failed, 2 wrong usage."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(with_dashes(list(given)))
    if options.command is None:
        print(START, end="")
        return 0
    from vllm_moeq.format import FormatError

    try:
        with _messages(options.parser):
            status = COMMANDS[options.command](options)
            sys.stdout.flush()
            return status
    except (MoeqError, FormatError) as error:
        print(f"{options.parser.prog}: {with_flags(str(error), options.parser)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `moeq ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"{options.parser.prog}: interrupted", file=sys.stderr)
        return 130


@contextmanager
def _messages(command: ArgumentParser) -> Iterator[None]:
    """Show what the package logs, with parameters as options, on the standard error."""

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return with_flags(super().format(record), command)

    handler, logger = logging.StreamHandler(), logging.getLogger("moeq")
    handler.setFormatter(Formatter("%(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
