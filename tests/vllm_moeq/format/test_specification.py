"""The specification in the README against the code, and both against lines of plain Python."""

import json
import re
import struct
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import vllm_moeq.format
from vllm_moeq.format import (
    GROUP_SIZES,
    WIDTHS,
    BitPlan,
    CheckpointConfig,
    LayerBits,
    Provenance,
    dequantize,
    pack,
    packed_tensors,
    unpack,
    write_manifest,
)

README = (Path(vllm_moeq.format.__file__).parent / "README.md").read_text()


class Golden(NamedTuple):
    """A row of the table."""

    bits: int
    scale: float
    scale_hex: str
    zero: int
    codes: list[int]
    packed: bytes
    weights: list[float]


def _golden() -> list[Golden]:
    rows = re.findall(
        r"^\| (\d) \| ([\d.]+) \(`(\w+)`\) \| (\d+) \(`(\w+)`\) \| ([\d ]+) \| `(\w+)` \| (.+) \|$",
        README,
        re.MULTILINE,
    )
    return [
        Golden(
            int(bits), float(scale), scale_hex, int(zero), [int(code) for code in codes.split()],
            bytes.fromhex(packed), [float(weight) for weight in weights.split()],
        )
        for bits, scale, scale_hex, zero, _, codes, packed, weights in rows
    ]  # fmt: skip


every_row = pytest.mark.parametrize("row", _golden(), ids=lambda row: f"{row.bits} bits")


def test_every_width_has_a_row() -> None:
    assert [row.bits for row in _golden()] == list(WIDTHS)
    assert all(len(row.codes) == 32 for row in _golden())


@every_row
def test_the_table_is_what_its_words_say(row: Golden) -> None:
    """Without our code: bit n of a row is bit n mod 8 of byte n div 8."""
    bits = [(code >> bit) & 1 for code in row.codes for bit in range(row.bits)]
    packed = [0] * (len(bits) // 8)
    for n, bit in enumerate(bits):
        packed[n // 8] |= bit << (n % 8)
    assert bytes(packed) == row.packed
    assert struct.pack("<e", row.scale).hex() == row.scale_hex
    weights = [row.scale * (code - row.zero * 2**row.bits / 256) for code in row.codes]
    assert weights[:2] == pytest.approx(row.weights, rel=1e-5)


@every_row
def test_the_code_packs_and_reads_the_table(row: Golden) -> None:
    codes = torch.tensor([row.codes], dtype=torch.uint8)
    packed = torch.frombuffer(bytearray(row.packed), dtype=torch.uint8)[None]
    assert torch.equal(pack(codes, row.bits), packed)
    assert torch.equal(unpack(packed, row.bits), codes)
    scale = torch.tensor([[row.scale]], dtype=torch.float16)
    assert scale.numpy().tobytes().hex() == row.scale_hex
    zero = torch.tensor([[row.zero]], dtype=torch.uint8)
    weights = dequantize(packed, scale, zero, row.bits, 32)[0, :2]
    assert weights.tolist() == pytest.approx(row.weights, rel=1e-5)


def test_every_name_that_is_written_is_in_the_specification(tmp_path: Path) -> None:
    plan = BitPlan(64, {"model.layers.0.mlp.experts": LayerBits((2,), (3,))})
    config = CheckpointConfig(plan).to_dict()
    for name in (*config, *(field.name for field in fields(Provenance))):
        assert f"`{name}`" in README, name
    for projection in config["expert_bits"]["model.layers.0.mlp.experts"]:
        assert f"`expert_bits[path].{projection}`" in README
    for tensor in packed_tensors(8, 64, 2, 64):
        kind = str(tensor.dtype).removeprefix("torch.")
        assert f"| `P.{tensor.suffix}` | {kind} |" in README
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path)
    manifest = json.loads((tmp_path / "moeq_manifest.json").read_text())
    for name in (*manifest, *manifest["files"]["config.json"]):
        assert f'"{name}"' in README, name


def test_allowed_values_are_those_of_the_code() -> None:
    text = " ".join(README.split())
    assert (
        "a zero point: " + ", ".join(map(str, GROUP_SIZES[:-1])) + f" or {GROUP_SIZES[-1]}" in text
    )
    assert "expert order: " + ", ".join(map(str, WIDTHS[:-1])) + f" or {WIDTHS[-1]}" in text


def test_the_example_can_be_read() -> None:
    block = re.search(r'```json\n("quantization_config".*?)\n```', README, re.DOTALL)
    assert block is not None
    example = json.loads("{" + block[1] + "}")["quantization_config"]
    plan = CheckpointConfig.from_dict(example).plan
    assert plan.expert_bits["model.layers.0.mlp.experts"].w2 == (4, 2, 2, 2)
