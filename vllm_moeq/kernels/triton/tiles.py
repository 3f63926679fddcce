"""The choice of tile sizes: one table, by how many tokens an expert gets."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a matrix product is cut into programs.

    Attributes:
        block_m: Tokens of a program.
        block_n: Rows of weights of a program.
        num_warps: Warps of a program.
        num_stages: Blocks of columns in flight.
        group_m: Blocks of tokens that take turns on the same weights, which stay in the cache.
        programs_per_sm: Programs of each streaming multiprocessor that split-K of the second
            product aims at.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 4
    group_m: int = 1
    programs_per_sm: int = 2

    @property
    def dequantize(self) -> bool:
        """Whether codes become weights before they are multiplied; see ``mainloop.py``."""
        return self.block_m >= DEQUANTIZE_FROM


DEQUANTIZE_FROM = 64
"""Tokens of a program that outweigh a scale and a zero point for each of its weights."""

Table = tuple[tuple[float, Tiles], ...]
"""(most tokens per expert, tiles), in rising order; the last is for any number."""

# Few tokens: memory is the limit. More programs with half the rows where there is little to share
# out, then deep pipelines of wide tiles. Many: as many tokens as registers hold without spilling,
# so that each weight is decoded seldom. On an H100, of the 9 to 24 tiles that were tried for each
# product apart (by a script outside this repository; moeq bench --tune tries tiles anew), these
# were within 2 % of the fastest for Qwen3's shape at 1, 16, 64, 256, 1024 and 4096 tokens, and for
# Mixtral's at 1. Not tried like that: 32 tokens for each expert, Mixtral's shape with more tokens,
# other GPUs. 32 x 128 was the fastest once, but its result differed once, and nobody knows why.
TABLE: Table = (
    (0.5, Tiles(16, 64)),
    (16, Tiles(16, 128, num_stages=3, programs_per_sm=4)),
    (32, Tiles(32, 64)),
    (128, Tiles(64, 128, num_stages=3, group_m=8)),
    (float("inf"), Tiles(128, 128, num_warps=8, num_stages=3, group_m=8)),
)
"""What is used where nothing was measured; see ``tuned.py``."""

DIRECT_SHARE = 4
"""Below one choice for this many experts two seldom meet: each choice is a block of its own, which
saves the kernel that sorts them."""
_FEWEST_BLOCKS = 4  # of columns that a part of a split gets


def choose_tiles(choices: int, experts: int, table: Table = TABLE) -> Tiles:
    """Return the tiles for a number of choices (tokens times top-k) of local experts."""
    return next(tiles for limit, tiles in table if choices <= limit * experts)


def is_direct(choices: int, experts: int) -> bool:
    """Say whether each choice becomes a block of its own."""
    return choices * DIRECT_SHARE <= experts


def most_blocks(choices: int, experts: int, block_m: int) -> int:
    """Return the most blocks of tokens that any routing leads to."""
    return min(choices, (choices + experts * (block_m - 1)) // block_m)


def choose_split(programs: int, blocks_k: int, wanted_programs: int) -> int:
    """Return how many programs share the columns of a product.

    Args:
        programs: Programs that have work when nothing is split.
        blocks_k: Blocks of columns.
        wanted_programs: How many should have work.
    """
    wanted = -(-wanted_programs // max(1, programs))
    return max(1, min(wanted, blocks_k // _FEWEST_BLOCKS))
