"""What the user asks for: made once, checked once, never changed.

The Python API and the command line both come down to these. Fields are the parameters of the API
and, with dashes, the options of the command line. Modules that take long to import are left to
those who do the work.
"""

from moeq.requests.checks import (
    BACKENDS,
    DEFAULT_BITS,
    DEFAULT_SHARD_SIZE,
    DEFAULT_ZETA,
    MAXVARS,
    MEASURED,
    METHODS,
    NO_TEXT,
    REORDERS,
    STRATEGIES,
)
from moeq.requests.judge import CompareRequest, EvaluateRequest
from moeq.requests.plan import PlanRequest, QuantizeRequest

__all__ = [
    "BACKENDS",
    "DEFAULT_BITS",
    "DEFAULT_SHARD_SIZE",
    "DEFAULT_ZETA",
    "MAXVARS",
    "MEASURED",
    "METHODS",
    "NO_TEXT",
    "REORDERS",
    "STRATEGIES",
    "CompareRequest",
    "EvaluateRequest",
    "PlanRequest",
    "QuantizeRequest",
]
