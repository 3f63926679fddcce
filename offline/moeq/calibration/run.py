"""Rounds weights with what they get: layer by layer, quantized layers feeding the next.

The original model runs beside the rounded one. Before its down projections are rounded, they are
fitted to what brings the residual stream back to where it is in the original: see
:mod:`moeq.rounding.target`. Where a layer does more with the sum of its experts than to add it to
the stream, that sum is brought back to what it is in the original. Neither is done for experts
rounded without calibration.
"""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import torch

from moeq.calibration.config import CalibrationConfig
from moeq.calibration.layer import round_layer
from moeq.calibration.linear import round_linear_layers
from moeq.calibration.result import CalibratedExperts, CalibrationReport, Coverage
from moeq.calibration.snapshots import Snapshots
from moeq.checkpoint.linear import INPUT
from moeq.checkpoint.resume import remove
from moeq.model import ExpertSource, Routed, expert_shares, layerwise_model, run_layer
from moeq.model.activations import mapped
from moeq.model.device import local_workers
from moeq.progress import Progress, silent, stage
from moeq.workers import Workers


@torch.inference_mode()
def calibrate(
    config: CalibrationConfig,
    folder: Path,
    resume: bool,
    progress: Progress = silent,
    workers: Workers | None = None,
) -> CalibratedExperts:
    """Round all experts, and the dense layers that the plan names, with GPTQ, layer by layer.

    What is finished lies in ``folder``, one file for each layer, with the activations that the
    next layer gets: a run that was killed goes on after its last finished layer and gives the
    same bytes.

    Args:
        config: What to round, and how.
        folder: Gets the finished layers, which the result reads.
        resume: Go on with what is there; otherwise it is removed.
        progress: Called after every expert.
        workers: Run experts and round them; by default ``config.device`` does. It makes no
            difference to the result, as long as an expert gets as many cores.

    Raises:
        MoeqError: A weight or an activation is not finite, or what is there was made from
            something else; names it.
    """
    snapshots = Snapshots(folder)
    snapshots.start(config.fingerprint(), resume)
    try:
        workers = workers or local_workers(config.source.layers, torch.device(config.device))
        return _calibrate(config, snapshots, resume, progress, workers)
    except BaseException:  # Ctrl-C, too
        if not snapshots.has_finished:
            remove(folder)
        raise


def _calibrate(
    config: CalibrationConfig,
    snapshots: Snapshots,
    resume: bool,
    progress: Progress,
    workers: Workers,
) -> CalibratedExperts:
    source, folder = config.source, snapshots.folder
    model = layerwise_model(source, torch.device(config.device))
    own = [ExpertSource.original(model)]
    shape = (*config.tokens.shape, source.hidden_size)

    def buffer(name: str) -> torch.Tensor:
        return mapped(folder / f"{name}.bin", shape)

    streams = {name: buffer(name) for name in ("hidden", "original")}
    hidden, original = streams.values()
    residual_error, x = buffer("residual-error"), buffer("x")
    # What experts' shares are added to.
    sums, original_sums = (
        stream if model.adds_up else buffer(f"{name}-sums") for name, stream in streams.items()
    )
    linear = config.linear
    done, saved = snapshots.restore(streams) if resume else (0, {})
    coverage = {container: Coverage(*values) for container, values in saved.items()}
    if done == 0:
        weights, tensors = round_linear_layers(config, model, INPUT, linear, hidden)
        snapshots.save_layer(INPUT, tensors)
        model.embed(config.tokens, hidden, weights)
        if weights:
            model.embed(config.tokens, original)
        else:
            original.copy_(hidden)
    else:
        model.embed(config.tokens, x)  # for what layers get beside hidden states
    last = max([layer.index for layer in source.layers] + [group.layer for group in linear])
    experts = sum(layer.num_experts for layer in source.layers if layer.index >= done)
    with stage(progress, "round", experts, "expert") as advance:
        for index in range(done, last + 1):
            if index == len(model):
                snapshots.save_layer(
                    index, round_linear_layers(config, model, index, linear, hidden)[1]
                )
                break
            run_layer(model, index, original, x, own, original_sums, workers)
            model.check_finite(index, original)
            weights, tensors = round_linear_layers(config, model, index, linear, hidden)
            routed = model.run(index, hidden, x, sums, weights)
            model.check_finite(index, hidden)
            if routed is not None:
                layer = model.moe_layers[index]
                of_layer = _coverage(routed, layer.num_experts)
                kept = mapped(folder / "shares.bin", (routed.ids.numel(), source.hidden_size))
                shares = torch.split(kept[: sum(of_layer.tokens)], of_layer.tokens)
                torch.sub(original_sums, sums, out=residual_error)
                added = expert_shares(model, layer, routed, own, workers)
                _subtract(added, residual_error, kept)
                coverage[layer.container] = of_layer
                rounded = round_layer(
                    config, model, layer, routed, sums, residual_error, shares, workers
                )
                with closing(rounded):  # before workers are gone, whatever happens
                    for stored in rounded:
                        tensors |= stored
                        advance(1)
                model.complete(index, hidden, sums, weights)
            snapshots.save_layer(index, tensors)
            snapshots.save(index + 1, streams, coverage)
    read = snapshots.stored(range(INPUT, last + 1))
    report = CalibrationReport(
        config.tokens.numel(), config.fewest_tokens, config.route_all, coverage
    )
    return CalibratedExperts(report, read)


def _subtract(
    shares: Iterable[tuple[torch.Tensor, torch.Tensor]], sums: torch.Tensor, kept: torch.Tensor
) -> None:
    """Subtract what experts add from sums of all; keep it, one expert's after another's."""
    flat, first = sums.view(-1, sums.shape[-1]), 0
    for places, share in shares:
        flat.index_add_(0, places, share, alpha=-1)
        kept[first : first + len(share)] = share
        first += len(share)


def _coverage(routed: Routed, num_experts: int) -> Coverage:
    shares = [routed.of_expert(expert) for expert in range(num_experts)]
    return Coverage(
        [len(places) for places, _ in shares],
        [float(weights.sum()) for _, weights in shares],
    )
