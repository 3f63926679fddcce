"""``moeq verify``: is a packed checkpoint complete, undamaged and true to its own plan?"""

import re
from pathlib import Path

import torch

from moeq.checkpoint.families import Family, MoELayer, family_of
from moeq.checkpoint.linear import linear_widths
from moeq.checkpoint.reader import FLOATS, CheckpointReader
from moeq.checkpoint.servable import check_servable
from moeq.errors import MoeqError
from vllm_moeq.format import (
    BitPlan,
    CheckpointConfig,
    FormatError,
    LayerBits,
    check_manifest,
    linear_tensors,
    packed_tensors,
)

_SAFETENSORS_NAMES = {
    "torch.uint8": "U8", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int32": "I32",
    "torch.int64": "I64",
}  # fmt: skip


def read_plan(reader: CheckpointReader) -> BitPlan:
    """Return the plan of a packed checkpoint.

    Raises:
        MoeqError: ``config.json`` is not that of a moeq checkpoint.
    """
    path = reader.folder / "config.json"
    config = reader.config.get("quantization_config")
    if config is None:
        raise MoeqError(f"{path} has no quantization_config: this is not a moeq checkpoint")
    try:
        return CheckpointConfig.from_dict(config).plan
    except FormatError as error:
        raise MoeqError(f"{path}: {error}") from error


def verify_checkpoint(folder: Path) -> list[str]:
    """Check the files of a packed checkpoint, and its experts.

    Returns:
        One sentence for each problem; empty if the checkpoint is sound.

    Raises:
        MoeqError: The folder is no finished moeq checkpoint, or a file cannot be read at all.
    """
    try:
        problems = check_manifest(folder)
    except FormatError as error:
        raise MoeqError(str(error)) from error
    if problems:
        return problems
    reader = CheckpointReader(folder)
    family = family_of(reader.config)
    plan = read_plan(reader)
    try:
        check_servable(reader.config, folder, reader.tensors)
    except MoeqError as error:
        problems.append(str(error))
    for container, bits in plan.expert_bits.items():
        problems += _layer_problems(reader, family, container, bits, plan.group_size)
    for weight, width in linear_widths(plan).items():
        problems += _linear_problems(reader, weight, width, plan.group_size)
    return problems


def packed_layers(reader: CheckpointReader) -> list[MoELayer]:
    """Return the MoE layers of a packed checkpoint in which there is no problem.

    Raises:
        MoeqError: As :func:`read_plan`.
    """
    family = family_of(reader.config)
    return [
        MoELayer(
            index=family.layer_index(reader.config, container),
            container=container,
            router=_router_name(family, container),
            family=family,
            num_experts=bits.num_experts,
            hidden_size=reader.info(_router_name(family, container)).shape[1],
            intermediate_size=reader.info(_first_scale_name(family, container)).shape[0],
        )
        for container, bits in read_plan(reader).expert_bits.items()
    ]


def _router_name(family: Family, container: str) -> str:
    return container.removesuffix(family.experts) + family.router


def _first_scale_name(family: Family, container: str) -> str:
    return f"{container}.0.{family.gate or family.up}.weight_scale"


def _layer_problems(
    reader: CheckpointReader, family: Family, container: str, bits: LayerBits, group_size: int
) -> list[str]:
    router_name, scale_name = _router_name(family, container), _first_scale_name(family, container)
    router, first = reader.tensors.get(router_name), reader.tensors.get(scale_name)
    if router is None:
        return [f"tensor {router_name} is missing"]
    if first is None:
        return [f"tensor {scale_name} is missing"]
    for name, info in ((router_name, router), (scale_name, first)):
        if len(info.shape) != 2:
            return [f"{name} is {list(info.shape)}, expected a matrix"]
    problems = []
    num_experts, hidden_size = router.shape
    intermediate_size = first.shape[0]
    if num_experts != bits.num_experts:
        return [f"{router_name} has {num_experts} experts, the plan {bits.num_experts}"]
    if hidden_size % group_size:
        return [f"{container}: group size {group_size} does not divide hidden_size {hidden_size}"]
    up_or_gate = (intermediate_size, hidden_size)
    expected = set()
    for expert in range(num_experts):
        for matrix, width, (rows, columns) in (
            *((name, bits.w13[expert], up_or_gate) for name in family.projections["w13"]),
            ("down", bits.w2[expert], up_or_gate[::-1]),
        ):
            if family.biased:
                bias = family.tensor_name(container, expert, matrix, "bias")
                expected.add(bias)
                problems += _bias_problems(reader, bias, rows)
            for tensor in packed_tensors(rows, columns, width, group_size):
                name = family.tensor_name(container, expert, matrix, tensor.suffix)
                expected.add(name)
                problems += _tensor_problems(reader, name, width, tensor.dtype, tensor.shape)
    of_an_expert = re.compile(rf"{re.escape(container)}\.\d+\.")
    return problems + [
        f"tensor {name} is of no packed expert: the plan lists {num_experts} in {container}"
        for name in reader.tensors
        if name not in expected and of_an_expert.match(name)
    ]


def _linear_problems(
    reader: CheckpointReader, weight: str, width: int, group_size: int
) -> list[str]:
    stem = weight.removesuffix("weight")
    if weight in reader.tensors:
        return [f"tensor {weight} is there, though the plan gives it {width} bits"]
    name = f"{stem}weight_shape"
    if name not in reader.tensors:
        return [f"tensor {name} is missing"]
    if problems := _tensor_problems(reader, name, width, torch.int64, (2,)):
        return problems
    shape = reader.tensor(name).tolist()
    if min(shape) < 1 or shape[1] % group_size:
        return [f"{name} is {shape}, no matrix whose rows are whole groups of {group_size}"]
    rows, columns = shape
    return [
        problem
        for suffix, dtype, expected in linear_tensors(rows, columns, width, group_size)
        for problem in _tensor_problems(reader, stem + suffix, width, dtype, expected)
    ]


def _tensor_problems(
    reader: CheckpointReader, name: str, width: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> list[str]:
    stored = reader.tensors.get(name)
    wanted = (_SAFETENSORS_NAMES[str(dtype)], shape)
    if stored is None:
        return [f"tensor {name} is missing"]
    if (stored.dtype, stored.shape) != wanted:
        return [
            f"tensor {name} is {stored.dtype} {list(stored.shape)}, the plan's width {width} "
            f"needs {wanted[0]} {list(wanted[1])}"
        ]
    return []


def _bias_problems(reader: CheckpointReader, name: str, rows: int) -> list[str]:
    stored = reader.tensors.get(name)
    if stored is None:
        return [f"tensor {name} is missing"]
    if stored.shape != (rows,) or stored.dtype not in FLOATS:
        return [
            f"tensor {name} is {stored.dtype} {list(stored.shape)}, expected [{rows}] of "
            f"{', '.join(FLOATS)}"
        ]
    return []
