"""Rounds weights with what they get: layer by layer, quantized layers feeding the next.

The original model runs beside the rounded one. Before its down projections are rounded, they are
fitted to what brings the residual stream back to where it is in the original: see
:mod:`moeq.rounding.target`. Where a layer does more with the sum of its experts than to add it to
the stream, that sum is brought back to what it is in the original. Neither is done for experts
rounded without calibration.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from moeq.calibration.config import CalibrationConfig
from moeq.calibration.layer import round_experts
from moeq.calibration.linear import round_linear_layers
from moeq.calibration.result import CalibratedExperts, CalibrationReport, Coverage
from moeq.calibration.snapshots import Snapshots, Tensors
from moeq.calibration.streams import Streams
from moeq.checkpoint import MoELayer
from moeq.checkpoint.linear import INPUT
from moeq.checkpoint.resume import remove
from moeq.model import (
    ExpertSource,
    LayerwiseModel,
    Routed,
    expert_shares,
    layerwise_model,
    run_layer,
)
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
    """Go from the embeddings, or the last snapshot, layer by layer to the output head."""
    model = layerwise_model(config.source, torch.device(config.device))
    streams = Streams.create(model, config.tokens, snapshots.folder)
    calibration = _Calibration(config, model, streams, snapshots, workers)
    done, saved = snapshots.restore(streams.between_layers) if resume else (0, {})
    coverage = {container: Coverage(*values) for container, values in saved.items()}
    if done == 0:
        calibration.embed()
    else:
        # Computes what layers get beside hidden states; those themselves are restored.
        model.embed(config.tokens, streams.x)
    layers = config.source.layers
    last = max([layer.index for layer in layers] + [group.layer for group in config.linear])
    experts = sum(layer.num_experts for layer in layers if layer.index >= done)
    with stage(progress, "round", experts, "expert") as advance:
        for index in range(done, min(last + 1, len(model))):
            coverage |= calibration.round_layer(index, advance)
            snapshots.save(index + 1, streams.between_layers, coverage)
        if last == len(model):  # the output head
            _, tensors = round_linear_layers(config, model, last, streams.hidden)
            snapshots.save_layer(last, tensors)
    read = snapshots.stored(range(INPUT, last + 1))
    report = CalibrationReport(
        config.tokens.numel(), config.fewest_tokens, config.route_all, coverage
    )
    return CalibratedExperts(report, read)


@dataclass(frozen=True, slots=True)
class _Calibration:
    """The original model and the rounded one, run beside each other layer by layer.

    Attributes:
        config: What to round, and how.
        model: Runs the layers of both.
        streams: How far both have come.
        snapshots: Gets the rounded weights.
        workers: Run experts and round them.
    """

    config: CalibrationConfig
    model: LayerwiseModel
    streams: Streams
    snapshots: Snapshots
    workers: Workers

    def embed(self) -> None:
        """Start both models, the rounded one with rounded embeddings if the plan names them."""
        tokens, streams = self.config.tokens, self.streams
        weights, tensors = round_linear_layers(self.config, self.model, INPUT, streams.hidden)
        self.snapshots.save_layer(INPUT, tensors)
        self.model.embed(tokens, streams.hidden, weights)
        if weights:
            self.model.embed(tokens, streams.original)
        else:
            streams.original.copy_(streams.hidden)

    def round_layer(self, index: int, advance: Callable[[int], None]) -> dict[str, Coverage]:
        """Run a layer of the original model, then round that of the other one and run it.

        Args:
            index: Which layer.
            advance: Called after every expert.

        Returns:
            What its experts got, by their container; empty for a layer without experts.
        """
        config, model, streams = self.config, self.model, self.streams
        self._run_original(index)
        weights, tensors = round_linear_layers(config, model, index, streams.hidden)
        routed = model.run_without_experts(index, streams.hidden, streams.x, streams.sums, weights)
        model.check_finite(index, streams.hidden)
        coverage: dict[str, Coverage] = {}
        if routed is not None:
            layer = model.moe_layers[index]
            experts, coverage[layer.container] = self._round_experts(layer, routed, advance)
            tensors |= experts
            model.finish(index, streams.hidden, streams.sums, weights)
        self.snapshots.save_layer(index, tensors)
        return coverage

    def _run_original(self, index: int) -> None:
        streams, experts = self.streams, [ExpertSource.original(self.model)]
        run_layer(
            self.model, index, streams.original, streams.x, experts, streams.original_sums,
            self.workers,
        )  # fmt: skip
        self.model.check_finite(index, streams.original)

    def _round_experts(
        self, layer: MoELayer, routed: Routed, advance: Callable[[int], None]
    ) -> tuple[Tensors, Coverage]:
        """Round experts by what they get, and add their shares to the sums."""
        streams, tensors = self.streams, Tensors()
        coverage = _coverage(routed, layer.num_experts)
        shares = self._run_unrounded(layer, routed, coverage)
        rounded = round_experts(
            self.config, self.model, layer, routed, streams.sums, streams.residual_error, shares,
            self.workers,
        )  # fmt: skip
        with closing(rounded):  # before workers are gone, whatever happens
            for stored in rounded:
                tensors |= stored
                advance(1)
        return tensors, coverage

    def _run_unrounded(
        self, layer: MoELayer, routed: Routed, coverage: Coverage
    ) -> tuple[torch.Tensor, ...]:
        """Run experts as they are in the original on what they get behind rounded layers.

        What is still missing to the sums of the original model becomes the residual error.

        Returns:
            What each expert adds [n, hidden_size], for the n tokens that it gets.
        """
        streams, experts = self.streams, [ExpertSource.original(self.model)]
        error = torch.sub(streams.original_sums, streams.sums, out=streams.residual_error)
        error = error.view(routed.x.shape)
        every_choice = routed.ids.numel(), layer.hidden_size
        shares, last = mapped(self.snapshots.folder / "shares.bin", every_choice), 0
        for places, share in expert_shares(self.model, layer, routed, experts, self.workers):
            error.index_add_(0, places, share, alpha=-1)
            first, last = last, last + len(share)
            shares[first:last] = share
        return torch.split(shares[:last], coverage.tokens)


def _coverage(routed: Routed, num_experts: int) -> Coverage:
    shares = [routed.of_expert(expert) for expert in range(num_experts)]
    return Coverage(
        [len(places) for places, _ in shares],
        [float(weights.sum()) for _, weights in shares],
    )
