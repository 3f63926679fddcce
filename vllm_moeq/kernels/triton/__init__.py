"""The GPU kernel: two Triton launches for the matrix products, whatever widths the experts have.

``layer.py`` runs the layer, ``gemm.py`` holds the products, ``planes.py`` the weights in memory,
``tiles.py`` how the products are cut and ``tuned.py`` what was measured about that; this file is
the kernel's row in the dispatch table.
"""

import importlib.util
import os

import torch

from vllm_moeq.kernels.call import FusedExpertsCall
from vllm_moeq.kernels.layout import ExpertLayout, ExpertWeights

OLDEST_CAPABILITY = (8, 0)
"""Of a GPU: the first with bfloat16 tensor cores."""


def unavailable(device: torch.device) -> str | None:
    """Return why the kernel cannot run on ``device``, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return (
                f"it needs a GPU of compute capability {'.'.join(map(str, OLDEST_CAPABILITY))}, "
                f"this one has {'.'.join(map(str, capability))}"
            )
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it computes on a GPU and the weights are on {device}"


def prepare(weights: ExpertWeights, layout: ExpertLayout, activation: str) -> ExpertWeights:
    """Bring canonical weights into planes; see :class:`weights.PlaneWeights`.

    Raises:
        ValueError: The file of measured tiles is damaged; names it.
    """
    from vllm_moeq.kernels.triton import weights as plane_weights
    from vllm_moeq.kernels.triton.tuned import tuned_table

    # While a model is loaded rather than with its first tokens.
    sizes = (layout.hidden_size, layout.intermediate_size, len(layout.slots))
    tuned_table(weights.w13_packed.device, *sizes)
    return ExpertWeights(*plane_weights.prepare(weights, layout, activation))


def run(call: FusedExpertsCall) -> torch.Tensor:
    """Run the experts; see :func:`layer.run`."""
    from vllm_moeq.kernels.triton import layer  # Triton takes long to import

    # Triton launches on the current GPU, which is not that of every layer of a device map. Chosen
    # in here: torch.compile cannot trace it, and would go on into the kernel itself.
    with torch.cuda.device_of(call.x):  # type: ignore[no-untyped-call]
        return layer.run(call)
