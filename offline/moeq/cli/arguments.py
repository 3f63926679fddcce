"""Turns the options of the command line into what the commands work with."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeq.errors import MoeqError

if TYPE_CHECKING:
    import torch

    from moeq.allocation import PlanOptions
    from moeq.checkpoint.families import MoELayer
    from moeq.checkpoint.reader import CheckpointReader
    from vllm_moeq.format import BitPlan

CALIBRATION = ("nsamples", "seqlen", "seed", "device")
"""Options that say how the calibration text is used."""


def read_model(model: str) -> tuple["CheckpointReader", list["MoELayer"]]:
    """Open a folder or hub id; return it with its MoE layers."""
    from moeq.checkpoint.reader import CheckpointReader, resolve_model

    reader = CheckpointReader(resolve_model(model))
    return reader, reader.moe_layers()


def given_plan_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the group "plan" that the user gave; the rest has its default."""
    from moeq.allocation import PlanOptions

    given = {field.name: getattr(options, field.name, None) for field in fields(PlanOptions)}
    return {name: value for name, value in given.items() if value is not None}


def requested_plan(
    options: argparse.Namespace,
    reader: "CheckpointReader",
    layers: list["MoELayer"],
    kept: "Path | None" = None,
) -> "BitPlan":
    """Decide the plan that was asked for.

    Args:
        options: Of the command line.
        reader: The checkpoint.
        layers: Its MoE layers.
        kept: Folder for what is finished of a measured plan, so that the command can be resumed.
    """
    from moeq.allocation import MEASURED, PlanOptions, make_plan, plan_sizes
    from vllm_moeq.format import GROUP_SIZES

    if options.strategy is None and options.calib is not None:
        options.strategy = "auto"
    if options.group_size is not None:
        for group_size in options.group_size:
            if group_size not in GROUP_SIZES:
                sizes = ", ".join(map(str, GROUP_SIZES))
                raise MoeqError(f"--group-size {group_size} is not one of {sizes}")
        options.group_sizes = options.group_size if len(options.group_size) > 1 else None
        options.group_size = max(options.group_size)
    budget = _budget(options, reader, layers)
    wanted = PlanOptions(**given_plan_options(options))
    if wanted.strategy not in MEASURED or options.calib is None:
        plan = make_plan(reader, layers, wanted, options.model)
    else:
        plan = _measured_plan(options, wanted, reader, layers, budget, kept)
    size = plan_sizes(plan, reader, layers).expert_bytes
    if budget is not None and size > budget:
        raise MoeqError(
            f"--strategy {wanted.strategy} cannot stay within {budget:,} bytes of experts at these "
            f"widths: its plan takes {size:,}; ask for a little less"
        )
    return plan


def _measured_plan(
    options: argparse.Namespace,
    wanted: "PlanOptions",
    reader: "CheckpointReader",
    layers: list["MoELayer"],
    budget: int | None,
    kept: "Path | None",
) -> "BitPlan":
    import torch

    from moeq.allocation import PlanOptions, make_plan
    from moeq.cli.printing import describe_candidates, describe_measurement
    from moeq.planning.planner import Planner

    wanted.check()
    device = torch.device(checked_device(options.device or "cpu"))
    tokens = calibration_tokens(options, reader)
    planner = Planner(
        reader, layers, wanted, options.model, tokens, options.method or "gptq", device,
        options.seed or 0, budget,
    )  # fmt: skip
    if getattr(options, "dry_run", False):
        planner.check()
        print(describe_measurement(planner))
        shown = PlanOptions(wanted.bits, group_size=wanted.group_size)
        return make_plan(reader, layers, shown, options.model)
    plan, tried = planner.run() if kept is None else planner.run_in(kept)
    if not tried and options.strategy == "auto":
        print("going on with the plan that was measured before", file=sys.stderr)
    print(describe_candidates(tried), end="", file=sys.stderr)
    return plan


def _budget(
    options: argparse.Namespace, reader: "CheckpointReader", layers: list["MoELayer"]
) -> int | None:
    """Set ``options.bits`` from the option for the size that was given.

    Returns:
        The bytes that experts may take; None if only their average width was given.
    """
    from moeq.allocation import (
        DEFAULT_GROUP_SIZE,
        average_bits,
        bits_per_weight_budget,
        target_size_budget,
    )

    sizes = [options.bits, options.bits_per_weight, options.target_size]
    given = sum(value is not None for value in sizes)
    if given == 0:
        raise MoeqError(
            "--bits is needed, as in --bits 2.5; or one of --bits-per-weight and --target-size"
        )
    if given > 1:
        raise MoeqError("give only one of --bits, --bits-per-weight and --target-size")
    if options.bits is not None:
        return None
    group_size = options.group_size or DEFAULT_GROUP_SIZE
    if options.bits_per_weight is not None:
        budget = bits_per_weight_budget(options.bits_per_weight, layers, group_size)
    else:
        budget = target_size_budget(options.target_size, reader, layers, group_size)
    options.bits = average_bits(budget, layers, group_size)
    return budget


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Refuse options that were given and are not above zero."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise MoeqError(f"--{name.replace('_', '-')} {value} is not a positive number")


def calibration_tokens(options: argparse.Namespace, reader: "CheckpointReader") -> "torch.Tensor":
    """Return the calibration sequences that were asked for, int64 [n, L].

    They are kept with the options: a measured plan and the rounding after it need the same.
    """
    from moeq.model.text import calibration_sequences

    if getattr(options, "tokens", None) is None:
        check_positive(options, "nsamples", "seqlen")
        options.tokens = calibration_sequences(
            reader.folder,
            options.calib,
            options.nsamples or 128,
            options.seqlen or 512,
            options.seed or 0,
        )
    tokens: torch.Tensor = options.tokens
    return tokens


def refuse(options: argparse.Namespace, why: str, *names: str) -> None:
    """Refuse options that would be ignored."""
    for name in names:
        if getattr(options, name) is not None:
            raise MoeqError(f"--{name.replace('_', '-')} {why}; leave it out")


def checked_device(name: str) -> str:
    """Return the name of a device that torch can use."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise MoeqError(f"--device {name} cannot be used: {reason}") from error
    return name
