"""The bit plan: which expert gets how many bits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_moeq.format.errors import FormatError
from vllm_moeq.format.files import check_name
from vllm_moeq.format.linear import check_linear_bits

FORMAT_VERSION = 1
WIDTHS = (1, 2, 3, 4, 8)
"""Bits per weight that the format can hold."""
GROUP_SIZES = (32, 64, 128)
"""Weights of a row that share one scale and one zero point; at most as many in its last group."""

Projection = Literal["w13", "w2"]
PROJECTIONS: tuple[Projection, ...] = ("w13", "w2")
"""What has a width of its own: gate and up together, and down."""


@dataclass(frozen=True, slots=True)
class LayerBits:
    """Widths of one layer's experts, in expert order.

    Attributes:
        w13: Width of the first projections (gate and up together).
        w2: Width of the down projection.
    """

    w13: tuple[int, ...]
    w2: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        """Number of experts in the layer."""
        return len(self.w13)

    def width(self, projection: Projection, expert: int) -> int:
        """Return the width of one expert's projection."""
        return (self.w13 if projection == "w13" else self.w2)[expert]

    def to_dict(self) -> dict[str, list[int]]:
        """Return the JSON form."""
        return {"w13": list(self.w13), "w2": list(self.w2)}

    @classmethod
    def from_dict(cls, container: str, data: Any) -> "LayerBits":
        """Read the JSON form; ``container`` names the layer in errors."""
        if not isinstance(data, Mapping) or set(data) != {"w13", "w2"}:
            raise FormatError(f"expert_bits[{container!r}] must hold exactly 'w13' and 'w2'")
        widths: dict[str, tuple[int, ...]] = {}
        for projection, values in data.items():
            if not isinstance(values, list | tuple) or not values:
                raise FormatError(f"expert_bits[{container!r}][{projection!r}] must be a list")
            for expert, width in enumerate(values):
                if type(width) is not int or width not in WIDTHS:
                    raise FormatError(
                        f"expert_bits[{container!r}][{projection!r}]: width {width!r} of expert "
                        f"{expert} is not one of {list(WIDTHS)}"
                    )
            widths[projection] = tuple(values)
        if len(widths["w13"]) != len(widths["w2"]):
            raise FormatError(
                f"expert_bits[{container!r}]: 'w13' lists {len(widths['w13'])} experts, "
                f"'w2' {len(widths['w2'])}"
            )
        return cls(**widths)


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a plan came about; information for people, never needed to read the weights.

    Attributes:
        strategy: Name of the strategy, as given to the command line.
        requested_bits: Average that was asked for.
        achieved_bits: Average of the widths over all expert weights.
        bits_per_weight: ``achieved_bits`` plus scales and zero points.
        expert_bytes: Bytes of all packed experts.
        total_bytes: Bytes of all tensors of the packed checkpoint.
        source: The model that the plan was made for.
        moeq_version: Version that made the plan.
        details: Anything else worth knowing (levels, zeta, which router signal was used).
    """

    strategy: str = "unknown"
    requested_bits: float | None = None
    achieved_bits: float | None = None
    bits_per_weight: float | None = None
    expert_bytes: int | None = None
    total_bytes: int | None = None
    source: str = "unknown"
    moeq_version: str = "unknown"
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, data: Any) -> "Provenance":
        """Read the JSON form; unknown keys of later versions are ignored."""
        if not isinstance(data, Mapping):
            raise FormatError("provenance must be an object")
        known = {name: data[name] for name in cls.__slots__ if name in data}
        for name, value in known.items():
            if not isinstance(value, _PROVENANCE_TYPES[name]):
                raise FormatError(f"provenance.{name} has a value of the wrong type: {value!r}")
        _check_tried(known.get("details", {}).get("tried", []))
        return cls(**known)


_PROVENANCE_TYPES: Mapping[str, Any] = {
    "strategy": str,
    "requested_bits": int | float | None,
    "achieved_bits": int | float | None,
    "bits_per_weight": int | float | None,
    "expert_bytes": int | None,
    "total_bytes": int | None,
    "source": str,
    "moeq_version": str,
    "details": Mapping,
}


def _check_tried(tried: Any) -> None:
    """Check what a plan says of other ones that were tried.

    Raises:
        FormatError: It is no list of what :data:`_TRIED` has.
    """
    if not isinstance(tried, list) or not all(
        isinstance(plan, Mapping)
        and ("total_bytes" in plan or "expert_bytes" in plan)
        and all(name in plan for name in _TRIED if not name.endswith("_bytes"))
        and all(isinstance(plan.get(name, 0), kind) for name, kind in _TRIED.items())
        for plan in tried
    ):
        raise FormatError(
            f"provenance.details.tried is no list of objects with {', '.join(_TRIED)}"
        )


_TRIED: Mapping[str, Any] = {
    "strategy": str,
    "total_bytes": int,
    "expert_bytes": int,
    "divergence": int | float,
    "loss_increase": int | float,
    "tokens": int,
}


@dataclass(frozen=True, slots=True)
class BitPlan:
    """Widths for every expert of a model.

    Attributes:
        group_size: Weights of a row that share a scale and a zero point.
        expert_bits: On-disk path of an experts container (``model.layers.0.mlp.experts``) to the
            widths of its experts.
        provenance: How the plan came about.
        linear_bits: Name on disk of a dense linear layer (``model.layers.0.self_attn.q_proj``) to
            its width, 4 or 8; all others have 16 bits.
    """

    group_size: int
    expert_bits: Mapping[str, LayerBits]
    provenance: Provenance = field(default_factory=Provenance)
    linear_bits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values that the type system does not.

        Raises:
            FormatError: An unknown group size or width, or no layer at all.
        """
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise FormatError(f"group_size {self.group_size!r} is not one of {list(GROUP_SIZES)}")
        if not self.expert_bits:
            raise FormatError("expert_bits is empty: the plan names no layer")
        check_linear_bits(self.linear_bits)
        for name in (*self.expert_bits, *self.linear_bits):
            check_name(name)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as stored in ``plan.json``."""
        return {
            "format_version": FORMAT_VERSION,
            "group_size": self.group_size,
            "expert_bits": {name: bits.to_dict() for name, bits in self.expert_bits.items()},
            "linear_bits": dict(self.linear_bits),
            "provenance": self.provenance.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Any) -> "BitPlan":
        """Read the JSON form.

        Raises:
            FormatError: A missing key, an unknown version, width or group size; names it.
        """
        if not isinstance(data, Mapping):
            raise FormatError("a plan must be a JSON object")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"format_version {version!r} is not supported; this version of moeq reads "
                f"{FORMAT_VERSION}. Install a matching vllm-moeq or convert the model again"
            )
        for key in ("group_size", "expert_bits"):
            if key not in data:
                raise FormatError(f"{key!r} is missing")
        expert_bits = data["expert_bits"]
        if not isinstance(expert_bits, Mapping):
            raise FormatError("expert_bits must be an object")
        return cls(
            group_size=data["group_size"],
            expert_bits={
                name: LayerBits.from_dict(name, bits) for name, bits in expert_bits.items()
            },
            provenance=Provenance.from_dict(data.get("provenance", {})),
            linear_bits=data.get("linear_bits", {}),
        )
