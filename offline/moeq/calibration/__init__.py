"""Rounds the experts of a model with what they get on a text."""

from moeq.calibration.config import CalibrationConfig
from moeq.calibration.cost import calibration_cost
from moeq.calibration.result import REPORT_NAME, CalibratedExperts, CalibrationReport, Coverage
from moeq.calibration.run import calibrate

__all__ = [
    "REPORT_NAME",
    "CalibratedExperts",
    "CalibrationConfig",
    "CalibrationReport",
    "Coverage",
    "calibrate",
    "calibration_cost",
]
