"""Bit plans: the paper's rule, or measured on the model itself and judged on text held back."""

from moeq.planning.candidates import Candidate
from moeq.planning.cost import measuring_cost
from moeq.planning.decide import decide, measurement_of, stand_in
from moeq.planning.judge import judge
from moeq.planning.measurement import MEASUREMENT_NAME, Measurement
from moeq.planning.planner import Decision, check, measured_plan
from moeq.planning.stamp import without_stale_claims

__all__ = [
    "MEASUREMENT_NAME",
    "Candidate",
    "Decision",
    "Measurement",
    "check",
    "decide",
    "judge",
    "measured_plan",
    "measurement_of",
    "measuring_cost",
    "stand_in",
    "without_stale_claims",
]
