"""Sizes and times as people write and read them."""

import pytest

from moeq.errors import MoeqError
from moeq.units import duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("14GB", 14 * 10**9),
        ("14 GiB", 14 * 2**30),
        ("0.1GB", 10**8),
        ("1.5TiB", 3 * 2**39),
        ("2.3MB", 2_300_000),
        ("3MiB", 3 * 2**20),
        ("5kB", 5000),
        ("5KiB", 5120),
        ("7B", 7),
        ("12gb", 12 * 10**9),
        ("1.9B", 1),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, "target_size") == size


@pytest.mark.parametrize("text", ["", "14", "GB", "-1GB", "1e9B", "14G", "0GB", "nanGB", "1,5GB"])
def test_sizes_without_a_meaning_are_refused(text: str) -> None:
    with pytest.raises(MoeqError, match=f"`target_size` {text}.* 14GB or 13.5GiB"):
        parse_size(text, "target_size")


def test_a_number_means_bytes() -> None:
    assert parse_size(1234, "max_shard_size") == 1234


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 second"),
        (44, "44 seconds"),
        (61, "a minute"),
        (170, "3 minutes"),
        (7300, "2 hours"),
        (3 * 86400, "3 days"),
    ],
)
def test_times_are_coarse(seconds: float, text: str) -> None:
    assert duration(seconds) == text
