"""Measures how fine a zero point has to be, and how near quantize_rtn comes to the best grid."""

import argparse
import itertools
from pathlib import Path

import torch
from results import RESULTS, table, write_section

from moeq.rounding import quantize_rtn
from vllm_moeq.format import zero_point_unit

WIDTHS = (1, 2, 3, 4)
GROUP_SIZES = (32, 64, 128)
STORED = "stored"
COARSER = {"whole steps": 1, "half steps": 2, "quarter steps": 4}
"""Resolutions to compare with what the format stores, in parts of a code."""
SHARES = torch.linspace(0.05, 1.0, 64).tolist()


def sample(distribution: str, weights: int, group_size: int) -> torch.Tensor:
    """Return groups [weights / group_size, group_size] of unit variance, the same every time."""
    torch.manual_seed(0)
    shape = (weights // group_size, group_size)
    if distribution == "Gaussian":
        return torch.randn(shape)
    student = torch.distributions.StudentT(4.0)
    return student.sample(shape) / student.stddev


def search(groups: torch.Tensor, bits: int) -> dict[str, float]:
    """Return the least mean squared error over all ranges, for each resolution.

    Either end of a group's grid is tried at 64 shares of the group's extreme, in all pairs. The
    scale is rounded to float16, as stored; the zero point to the resolution.
    """
    levels = (1 << bits) - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    resolutions = {STORED: round(1 / zero_point_unit(bits)), **COARSER}
    best = {name: torch.full_like(low, torch.inf) for name in resolutions}
    for low_share, high_share in itertools.product(SHARES, repeat=2):
        start = low * low_share
        scale = ((high * high_share - start) / levels).half().float()
        steps = groups / scale
        for name, parts in resolutions.items():
            zero_point = torch.round(-start / scale * parts) / parts
            exact = steps + zero_point
            deviation = exact.round().clamp_(0, levels).sub_(exact)
            error = deviation.square_().mean(-1, keepdim=True) * scale.square()
            best[name] = torch.minimum(best[name], error)
    return {name: error.mean().item() for name, error in best.items()}


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=1 << 15, help="in each distribution")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    whole_loss: dict[int, list[float]] = {bits: [] for bits in WIDTHS}
    product_loss = []
    for distribution, group_size in itertools.product(("Gaussian", "Student-t(4)"), GROUP_SIZES):
        groups = sample(distribution, options.weights, group_size)
        for bits in WIDTHS:
            errors = search(groups, bits)
            stored = errors[STORED]
            product = quantize_rtn(groups, bits, group_size).dequantize(bits)
            errors["quantize_rtn"] = (product - groups).square().mean().item()
            change = {name: error / stored - 1 for name, error in errors.items()}
            whole_loss[bits].append(stored / errors["whole steps"] - 1)
            product_loss.append(change["quantize_rtn"])
            cells = [f"{stored:.5f}" if n == STORED else f"{c:+.1%}" for n, c in change.items()]
            rows.append([distribution, str(group_size), str(bits), *cells])
            print(*rows[-1])

    savings = ", ".join(
        f"{-max(loss):.0%} to {-min(loss):.0%} at {bits}" for bits, loss in whole_loss.items()
    )
    write_section(
        options.results,
        "zero-point resolution",
        [
            "How much squared error does the resolution of the zero point cost? The format stores "
            "it in 1/256 of the code range, which takes the same byte as whole steps and lowers "
            f"their error by {savings} bits. "
            "`quantize_rtn`, which searches 25 ranges and refines the best, is between "
            f"{min(product_loss):+.1%} and {max(product_loss):+.1%} from the best of the "
            f"{len(SHARES) ** 2} ranges tried here.",
            "Mean squared error per weight of unit variance for the stored resolution; the others "
            "relative to it. Each group takes its best range from a search over both ends; "
            f"{options.weights} weights in each row, the same for all columns.",
            table(
                [
                    "weights",
                    "group size",
                    "bits",
                    STORED,
                    *COARSER,
                    "`quantize_rtn`",
                ],
                rows,
            ),
        ],
    )


if __name__ == "__main__":
    main()
