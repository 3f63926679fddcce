"""What quantizing a model takes, and what it gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeq.calibration import REPORT_NAME, CalibrationReport
from moeq.model.cost import Cost
from moeq.planning import MEASUREMENT_NAME
from vllm_moeq.format import BitPlan


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a quantization takes.

    Attributes:
        source_bytes: Of all tensors of the model.
        output_bytes: Of all tensors of the result.
        output_files: Number of its files with tensors.
        memory_bytes: Peak beyond Python and torch themselves.
        measuring: What making the plan takes; None if nothing is measured for it.
        rounding: What calibrated rounding takes; None without calibration.
        workers: That share the experts in both: of all devices, or of a cluster; None without text.
    """

    source_bytes: int
    output_bytes: int
    output_files: int
    memory_bytes: int
    measuring: Cost | None
    rounding: Cost | None
    workers: int | None = None

    @property
    def disk_bytes(self) -> int:
        """Bytes of the result and of what rounding leaves beside it until it is done."""
        return self.output_bytes + (self.rounding.disk_bytes if self.rounding else 0)


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A packed checkpoint, or after ``dry_run`` what it would be.

    Attributes:
        path: Its folder.
        written: Whether it is there.
        plan: Widths of its experts, with all sizes and how they came about. After ``dry_run`` of a
            measured plan, another one of the same size.
        estimate: What making it takes.
        calibration: What each expert got of the calibration text; None without calibration, and
            after ``dry_run``.
        in_vllm: Whether vLLM has such models; all run in transformers.
    """

    path: Path
    written: bool
    plan: BitPlan
    estimate: Estimate
    calibration: CalibrationReport | None = None
    in_vllm: bool = True

    @property
    def tried(self) -> list[Mapping[str, Any]]:
        """Plans that ``auto`` tried, the best first, with bytes, divergence and loss in nats."""
        return list(self.plan.provenance.details.get("tried", []))

    @property
    def reports(self) -> list[Path]:
        """Files of the result beside its weights: model card, what was measured, and coverage."""
        paths = [self.path / name for name in ("README.md", MEASUREMENT_NAME, REPORT_NAME)]
        return [path for path in paths if path.exists()]
