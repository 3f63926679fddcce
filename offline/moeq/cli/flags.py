"""Shows the parameters in a message as options of the command line."""

import re
from argparse import ArgumentParser


def with_flags(message: str, parser: ArgumentParser) -> str:
    """Return a message with its parameters, in backticks, as the options of a command.

    As in "``group_size`` 48 is not one of 32, 64, 128": ``--group-size 48 is ...``.
    """
    flags = {
        action.dest: max(action.option_strings, key=len, default=str(action.metavar))
        for action in parser._actions
    }
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), message)
