"""What only the torch reference does; what every kernel computes is in test_conformance.py."""

import torch

from support.experts import expected_output, random_experts
from support.kernels import random_routing, random_tokens
from vllm_moeq.kernels import FusedExpertsCall
from vllm_moeq.kernels.reference import run


def test_float64_inside_is_exact() -> None:
    experts = random_experts([1, 2, 3, 4, 8], [8, 4, 1, 2, 3])
    x, (weights, ids) = random_tokens(9, 128, torch.float64), random_routing(9)
    call = FusedExpertsCall.from_op(
        x, weights, ids, experts.weights, None, None, experts.layout.to_tensor(), None, "silu",
        False,
    )  # fmt: skip
    expected = expected_output(experts, x, weights, ids)
    torch.testing.assert_close(run(call, torch.float64), expected, rtol=1e-12, atol=1e-14)
