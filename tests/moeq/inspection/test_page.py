"""``moeq inspect --html``: a page of its own that says what the files say."""

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moeq.cli import main
from support.checkpoints import plan_dict
from support.cli import run_moeq
from support.models import NUM_EXPERTS

pytestmark = pytest.mark.slow

TEXT = "".join(f"Line {i} of a text whose bytes are tokens, {i * i % 97}.\n" for i in range(300))


@pytest.fixture(scope="module")
def packed(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A checkpoint with a measured plan, and its page."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "text.txt").write_text(TEXT)
    done = run_moeq(
        "quantize", tiny_model("mixtral"), "-o", folder / "out", "--bits=2.5", "--group-size=32",
        "--calib", folder / "text.txt", "--nsamples=12", "--seqlen=40",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert main(["inspect", str(folder / "out"), "--html", str(folder / "page.html")]) == 0
    return folder / "out", (folder / "page.html").read_text()


def test_nothing_is_loaded_and_every_screen_is_meant(packed: tuple[Path, str]) -> None:
    _, page = packed
    assert not re.findall(r"(?:src|href|url)\s*[=(]", page)
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_every_expert_is_there_with_what_is_known_of_it(packed: tuple[Path, str]) -> None:
    folder, page = packed
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    coverage = json.loads((folder / "moeq_calibration.json").read_text())["experts"]
    measured = json.loads((folder / "moeq_measurement.json").read_text())["experts"]
    tensors = load_file(next(folder.glob("*.safetensors")))
    titles = [unescape(title) for title in re.findall(r'<td [^>]*aria-label="([^"]+)"', page)]
    assert len(titles) == 2 * NUM_EXPERTS
    for layer, (container, bits) in enumerate(config["expert_bits"].items()):
        router = tensors[container.replace("experts", "gate.weight")].float()
        for expert in range(NUM_EXPERTS):
            title = titles[layer * NUM_EXPERTS + expert]
            widths = f"w13 {bits['w13'][expert]} bit, w2 {bits['w2'][expert]} bit"
            assert title.startswith(f"expert {expert}: {widths}\n")
            assert f"router norm {router[expert].norm():.4g}\n" in title
            assert f"{coverage[container]['tokens'][expert]:,} calibration tokens\n" in title
            loss = measured[container]["errors"]["w2"]["loss"][expert]
            assert f"w2: divergence {loss:.2e} nats" in title


def test_what_was_tried_is_there(packed: tuple[Path, str]) -> None:
    folder, page = packed
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tried = config["provenance"]["details"]["tried"]
    table = page[page.index("Plans that were tried") :]
    for plan in tried:
        assert f"{plan['strategy']}</td><td>{plan['total_bytes']:,}</td>" in table


def test_what_is_measured_of_experts_is_that_of_the_chosen_widths(packed: tuple[Path, str]) -> None:
    """Fewer bits for the same projection would have a larger error: the sum is the estimate."""
    folder, _ = packed
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    report = json.loads((folder / "moeq_measurement.json").read_text())
    measured = report["experts"]
    total = sum(
        sum(layer["errors"][projection]["loss"])
        for layer in measured.values()
        for projection in ("w13", "w2")
    )
    total += sum(dense["loss"] for dense in report["dense"].values())
    details = config["provenance"]["details"]
    if config["provenance"]["strategy"] == "auto: sensitivity":
        assert total == pytest.approx(details["estimated_divergence"], rel=1e-6)
    for layer in measured.values():
        assert sum(layer["frequency"]) == pytest.approx(2)  # experts of a token


def test_a_plan_alone_has_a_page_and_none_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, page = tmp_path / "plan.json", tmp_path / "page.html"
    plan.write_text(json.dumps(plan_dict()))
    assert main(["inspect", str(plan), "--html", str(page)]) == 0
    assert page.read_text().count("aria-label=") == 8
    assert main(["inspect", str(plan), "--html", str(page)]) == 1
    assert f"--html {page} exists already" in capsys.readouterr().err
