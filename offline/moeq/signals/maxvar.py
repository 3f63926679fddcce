"""MaxVar: how unevenly an expert's first projection spreads its weights."""

import torch

from moeq.checkpoint import MoELayer, SourceModel
from moeq.errors import MoeqError
from moeq.requests import MAXVARS

_WEIGHTS_AT_ONCE = 1 << 22
"""In float32: a whole matrix would take twice its own memory."""


def max_var(source: SourceModel, layer: MoELayer, variant: str = "max-row") -> torch.Tensor:
    """Return MaxVar of each expert, float32 [num_experts].

    ``max-row`` is the paper's definition (arXiv 2604.06515, section 4): the largest biased
    variance of a row of the first projection. ``highest-norm-row`` is what its published code
    computes for Mixtral: the unbiased variance of the row with the highest l2 norm.

    Raises:
        MoeqError: Unknown variant, or weights that are not finite.
    """
    values = []
    for expert in range(layer.num_experts):
        name = layer.tensor_name(expert, layer.projections["w13"][0])
        weight = source.tensor(name)
        parts = torch.split(weight, max(1, _WEIGHTS_AT_ONCE // weight.shape[1]))
        if variant == "max-row":
            value = torch.stack([part.float().var(dim=1, correction=0).max() for part in parts])
            value = value.max()
        elif variant == "highest-norm-row":
            norms = torch.cat([part.float().norm(dim=1) for part in parts])
            value = weight[norms.argmax()].float().var(correction=1)
        else:
            raise MoeqError(f"`maxvar` {variant} is not one of {', '.join(MAXVARS)}")
        if not torch.isfinite(value):
            raise MoeqError(f"{name} holds NaN or infinite weights")
        values.append(value)
    return torch.stack(values)
