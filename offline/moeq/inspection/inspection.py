"""What there is to see in a packed checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeq.calibration import REPORT_NAME
from moeq.checkpoint import CheckpointReader
from moeq.checkpoint.families import family_of
from moeq.checkpoint.plan_file import plan_of
from moeq.checkpoint.reader import read_json
from moeq.errors import MoeqError
from moeq.planning import MEASUREMENT_NAME
from vllm_moeq.format import BitPlan


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is inside a packed checkpoint, or a plan.

    Attributes:
        name: Of the folder or file.
        plan: Widths of its experts, with sizes and how they came about.
        calibration: What each expert got of the calibration text, as ``moeq_calibration.json`` has
            it; None without calibration, and for a plan alone.
        measurement: What was measured of each expert, as ``moeq_measurement.json`` has it; None if
            the plan was not measured, and for a plan alone.
        router_norms: l2 norm of the router row of each expert, by container; empty for a plan.
    """

    name: str
    plan: BitPlan
    calibration: Mapping[str, Any] | None = None
    measurement: Mapping[str, Any] | None = None
    router_norms: Mapping[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> "Inspection":
        """Look into a folder or a ``plan.json``.

        Raises:
            MoeqError: It is neither; names it.
        """
        plan, name = plan_of(path), path.resolve().name
        if not path.is_dir():
            return cls(name, plan)
        files = (path / file for file in (REPORT_NAME, MEASUREMENT_NAME))
        calibration, measurement = (read_json(file) if file.is_file() else None for file in files)
        return cls(name, plan, calibration, measurement, _router_norms(path, plan))


def _router_norms(folder: Path, plan: BitPlan) -> dict[str, list[float]]:
    reader = CheckpointReader(folder)
    family = family_of(reader.config)
    norms: dict[str, list[float]] = {}
    for container in plan.expert_bits:
        name = container.removesuffix(family.experts) + family.router
        router = reader.tensor(name)
        if router.dim() != 2:
            raise MoeqError(f"{folder}: {name} has shape {list(router.shape)}, expected a matrix")
        norms[container] = router.float().norm(dim=1).tolist()
    return norms
