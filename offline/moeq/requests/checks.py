"""What values of parameters can be, and checks that several requests share."""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from moeq.errors import MoeqError

METHODS = ("gptq", "hqq", "rtn")
"""Of rounding; only the first needs calibration text."""
MEASURED = ("auto", "sensitivity")
"""Strategies that need calibration text."""
STRATEGIES = (*MEASURED, "combined", "router-norm", "maxvar", "uniform", "random:SEED")
MAXVARS = ("max-row", "highest-norm-row")
REORDERS = ("stable", "one-pass")
DEFAULT_ZETA = 3.0
DEFAULT_SHARD_SIZE = "1GB"
BACKENDS = ("reference", "transformers", "vllm")
DENSE_BITS = ("auto", 16, 8, 4)
DEFAULT_BITS = 2.5
NO_TEXT = "none"


def check_not_empty(request: Any) -> None:
    """Refuse empty text, as of a variable of the shell that is not set."""
    for parameter in fields(request):
        value = getattr(request, parameter.name)
        if isinstance(value, str) and not value.strip():
            way = "give it a value"
            if parameter.default is not MISSING:
                way += ", or leave it out"
            raise MoeqError(f"`{parameter.name}` is empty; {way}")


def check_positive(request: Any, *names: str) -> None:
    """Refuse parameters that are not positive."""
    for name in names:
        value = getattr(request, name)
        if value < 1:
            raise MoeqError(f"`{name}` {value} is not a positive number")


def check_seed(seed: int) -> None:
    """Refuse a seed that torch does not take."""
    if not 0 <= seed < 2**63:
        raise MoeqError(f"`seed` {seed} is not between 0 and 2**63")


def check_one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a value that is none of the choices; None is left to the default."""
    if value is not None and value not in choices:
        raise MoeqError(f"`{name}` {value} is not one of {', '.join(map(str, choices))}")


def refuse(request: Any, names: Iterable[str], why: str) -> None:
    """Refuse parameters that are not left at their defaults."""
    for parameter in fields(request):
        name = parameter.name
        if name in names and getattr(request, name) != parameter.default:
            hint = "" if ";" in why else "; leave it out"
            raise MoeqError(f"`{name}` {why}{hint}")
