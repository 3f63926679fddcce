"""The host never waits for the GPU: the layer runs where tensors have no data to wait for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.experts import random_experts
from support.no_waiting import DEVICE, HostWaits, Launches, no_waiting
from vllm_moeq.kernels import ExpertLayout, ExpertWeights, FusedExpertsCall
from vllm_moeq.kernels.triton import gemm, layer, weights
from vllm_moeq.kernels.triton.tiles import choose_tiles

E, TOP_K, HIDDEN, INTERMEDIATE = 5, 2, 256, 384
WIDTHS = [1, 2, 3, 4, 8]
KERNELS = (
    (layer, "route_kernel"),
    (layer, "sums_kernel"),
    (gemm, "w13_kernel"),
    (gemm, "w2_kernel"),
    (layer, "combine_kernel"),
)


@pytest.fixture(scope="module")
def prepared() -> tuple[ExpertWeights, torch.Tensor]:
    experts = random_experts(WIDTHS, WIDTHS[::-1], 32, HIDDEN, INTERMEDIATE)
    planes = weights.prepare(experts.weights, experts.layout, "silu")
    return ExpertWeights(*(tensor.to(DEVICE) for tensor in planes)), experts.layout.to_tensor()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launches]:
    """Replace all kernels; on a GPU the last thing that the host does is to launch them."""
    made = {name: Launches() for _, name in KERNELS}
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, made[name])
    return made


def _on_device(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def _run(prepared: tuple[ExpertWeights, torch.Tensor], tokens: int, **case: Any) -> torch.Tensor:
    planes, layout = prepared
    with no_waiting():
        return layer.run(
            FusedExpertsCall.from_op(
                _on_device(tokens, HIDDEN, dtype=torch.bfloat16),
                _on_device(tokens, TOP_K),
                _on_device(tokens, TOP_K, dtype=torch.int32),
                planes,
                case.get("w13_bias"),
                case.get("w2_bias"),
                layout,
                case.get("expert_map"),
                "silu",
                case.get("apply_router_weight_on_input", False),
            )
        )


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 60, 300])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"expert_map": torch.empty(9, dtype=torch.int32, device=DEVICE)},
        {"w13_bias": _on_device(E, 2 * INTERMEDIATE), "w2_bias": _on_device(E, HIDDEN)},
        {"apply_router_weight_on_input": True},
    ],
    ids=["plain", "mapped", "bias", "on input"],
)
def test_sizes_do_not_depend_on_data(
    prepared: tuple[ExpertWeights, torch.Tensor],
    launches: dict[str, Launches],
    tokens: int,
    case: dict[str, Any],
) -> None:
    result = _run(prepared, tokens, **case)
    assert (result.shape, result.device) == ((tokens, HIDDEN), DEVICE)
    direct = tokens * TOP_K * 4 <= E
    counts = {name: len(kernel.grids) for name, kernel in launches.items()}
    expected = dict.fromkeys(counts, 1 if tokens else 0)
    assert counts == expected | ({"route_kernel": 0} if direct else {}) | (
        {"sums_kernel": 0} if choose_tiles(tokens * TOP_K, E).dequantize else {}
    )


PLANTED: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda ids: ids.max().item(),
    "int": lambda ids: int(ids[0, 0]),
    "branch": lambda ids: 1 if (ids > 0).any() else 2,
    "tolist": lambda ids: ids.flatten().tolist(),
    "cpu": lambda ids: ids.cpu(),
    "to": lambda ids: ids.to("cpu", torch.float32),
    "numpy": lambda ids: ids.numpy(force=True),
    "nonzero": lambda ids: ids.nonzero(),
    "where": lambda ids: torch.where(ids > 1),
    "mask": lambda ids: ids[ids > 1],
    "assigned mask": lambda ids: ids.__setitem__(ids > 1, torch.zeros_like(ids)[0]),
    "masked_select": lambda ids: ids.masked_select(ids > 1),
    "unique": lambda ids: ids.unique(),
    "bincount": lambda ids: ids.flatten().bincount(),
    "repeats": lambda ids: ids.repeat_interleave(ids[0], 1),
    "copied to the device": lambda ids: torch.arange(3, device="cpu").to(ids.device),
    "made on the host": lambda ids: torch.tensor([1, 2, 3], device=ids.device),
    "copied into": lambda ids: ids.copy_(torch.zeros(ids.shape, device="cpu")),
    "index on the host": lambda ids: ids[torch.tensor([0], device="cpu")],
}


@pytest.mark.parametrize("read", PLANTED.values(), ids=PLANTED.keys())
def test_planted_reads_are_noticed(
    prepared: tuple[ExpertWeights, torch.Tensor],
    launches: dict[str, Launches],
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[torch.Tensor], object],
) -> None:
    """In place of a check that the layer makes, so on the path that the test above runs."""
    monkeypatch.setattr(layer, "_check", lambda call: read(call.routing.topk_ids))
    with pytest.raises(HostWaits):
        _run(prepared, 7)
    assert not any(kernel.grids for kernel in launches.values())


def test_the_layout_is_read_on_the_host(prepared: tuple[ExpertWeights, torch.Tensor]) -> None:
    with no_waiting():
        assert ExpertLayout.from_tensor(prepared[1]).hidden_size == HIDDEN
