"""What a request begins with: its model and its calibration text, checked."""

import logging
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch

from moeq.checkpoint import SourceModel
from moeq.checkpoint.fits import check_group_size, fitting_group_size
from moeq.checkpoint.linear import FULL_WIDTH, lost_integers
from moeq.checkpoint.servable import not_added
from moeq.errors import MoeqError
from moeq.model.device import torch_device
from moeq.model.structure import check_structure
from moeq.model.text import calibration_sequences
from moeq.requests import PlanRequest
from vllm_moeq.format import GROUP_SIZES

logger = logging.getLogger(__name__)

AnyPlanRequest = TypeVar("AnyPlanRequest", bound=PlanRequest)


class CalibrationText(NamedTuple):
    """Calibration text as tokens int64 [n, L], and where to run them."""

    tokens: torch.Tensor
    device: torch.device


def open_model(model: str, embeddings: bool = False) -> SourceModel:
    """Open a model and check that it is whole; see :meth:`SourceModel.open`."""
    source = SourceModel.open(model, embeddings)
    check_structure(source.reader, source.layers)
    if source.left_out:
        logger.warning(
            "%s: %d tensors of prediction layers are left out, the first is %s: %s",
            source.folder,
            len(source.left_out),
            source.left_out[0],
            "it is not known where vLLM looks for them, and it might not start"
            if source.layers[0].family.derived
            else "vLLM has none for this model and would not start",
        )
    bias = not_added(source.reader.config)
    if bias is not None and source.reader.tensor(bias).any():
        logger.warning(
            "%s: vLLM does not add %s, packed or not: its answers are not those of transformers",
            source.folder,
            bias,
        )
    return source


def open_to_plan(request: PlanRequest, embeddings: bool) -> SourceModel:
    """Open the model of a request.

    Args:
        request: What is asked.
        embeddings: Whether embeddings may be among the dense layers.

    Raises:
        MoeqError: As :func:`open_model`, or embeddings that are asked for cannot be quantized.
    """
    # Of several group sizes it is not known yet what dense layers would take that are copied.
    copied_bits = FULL_WIDTH if len(request.group_sizes) > 1 else request.dense_bits
    source = open_model(request.model, embeddings).asked_for(copied_bits)
    if request.quantize_embeddings and not any(group.embeds for group in source.linear):
        raise MoeqError(
            f"{source.folder}: embeddings of this model stay in 16 bits: tokens and the output "
            "head share one matrix, prediction layers use them, too, their rows are no multiple "
            "of 32, or they have other names. Leave `quantize_embeddings` out"
        )
    return source


def with_group_size(request: AnyPlanRequest, source: SourceModel) -> AnyPlanRequest:
    """Take a group size if none is asked for; refuse what cannot be packed before text is read."""
    if request.group_size is None:
        group_size = fitting_group_size(source.layers)
        request = replace(request, group_size=group_size)
        if group_size != max(GROUP_SIZES):
            logger.info("group size: %d, which fits the sizes of the experts best", group_size)
    for group_size in request.group_sizes:
        check_group_size(group_size, source.layers)
        layer = max(source.layers, key=lambda layer: layer.added_columns(group_size))
        added = layer.added_columns(group_size)
        if added:
            logger.info(
                "group size %d does not divide the intermediate_size %d: serving takes the memory "
                "of %d",
                group_size, layer.intermediate_size, layer.intermediate_size + added,
            )  # fmt: skip
    largest = max(request.group_sizes)
    for group in lost_integers(source.linear, largest)[:1]:
        logger.info(
            "group size %d does not divide that of dense layers of %d bits in the source, %d: they "
            "are dequantized",
            largest, group.stored_bits, group.stored_group_size,
        )  # fmt: skip
    return request


def calibration_text(request: PlanRequest, source: SourceModel) -> CalibrationText | None:
    """Return the calibration text that a request asks for; None if nothing needs it."""
    if not request.uses_text or request.text is None:
        return None
    device = torch_device(request.device)
    tokens = calibration_sequences(
        source.folder, request.text, request.nsamples, request.seqlen, request.seed
    )
    return CalibrationText(tokens, device)
