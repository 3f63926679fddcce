"""The moeq checkpoint format, version 1: torch only, shared by the offline step and the plugin."""

from vllm_moeq.format.errors import FormatError, first_few
from vllm_moeq.format.files import check_inside, check_name, read_object
from vllm_moeq.format.linear import (
    LINEAR_TENSORS,
    LINEAR_WIDTHS,
    linear_bytes,
    linear_tensors,
    to_compressed_tensors,
)
from vllm_moeq.format.manifest import MANIFEST_NAME, check_manifest, write_manifest
from vllm_moeq.format.packing import (
    CODES_PER_WORD,
    dequantize,
    num_groups,
    pack,
    packed_columns,
    spread,
    unpack,
    zero_point_unit,
)
from vllm_moeq.format.plan import (
    FORMAT_VERSION,
    GROUP_SIZES,
    PROJECTIONS,
    WIDTHS,
    BitPlan,
    LayerBits,
    Projection,
    Provenance,
)
from vllm_moeq.format.schema import (
    QUANT_METHOD,
    TRANSFORMERS_GUARD,
    CheckpointConfig,
    ExpertTensor,
    guarded,
    packed_bytes,
    packed_tensors,
)

__all__ = [
    "CODES_PER_WORD",
    "FORMAT_VERSION",
    "GROUP_SIZES",
    "LINEAR_TENSORS",
    "LINEAR_WIDTHS",
    "MANIFEST_NAME",
    "PROJECTIONS",
    "QUANT_METHOD",
    "TRANSFORMERS_GUARD",
    "WIDTHS",
    "BitPlan",
    "CheckpointConfig",
    "ExpertTensor",
    "FormatError",
    "LayerBits",
    "Projection",
    "Provenance",
    "check_inside",
    "check_manifest",
    "check_name",
    "dequantize",
    "first_few",
    "guarded",
    "linear_bytes",
    "linear_tensors",
    "num_groups",
    "pack",
    "packed_bytes",
    "packed_columns",
    "packed_tensors",
    "read_object",
    "spread",
    "to_compressed_tensors",
    "unpack",
    "write_manifest",
    "zero_point_unit",
]
