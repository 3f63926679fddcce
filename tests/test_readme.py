"""The front page keeps its promises: its commands run, its links lead somewhere, it stays short."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from perplexity import call

from moeq.cli.options import parser
from support.cli import COMMAND, ROOT, environment
from support.server import serve

README = (ROOT / "README.md").read_text()
GUIDES = (
    "README.md", "offline/README.md", "vllm_moeq/README.md", "vllm_moeq/format/README.md",
    "vllm_moeq/kernels/README.md", "examples/benchmarks/README.md", "examples/theory/README.md",
)  # fmt: skip
TEXT = "".join(f"Line {i} of a text whose bytes are tokens, {i * i % 97}.\n" for i in range(400))


def _commands(text: str, program: str) -> Iterator[list[str]]:
    """Yield the commands of a program in the code blocks of a page, without their comments."""
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith(f"{program} "):
                yield shlex.split(line, comments=True)


def test_it_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide: str) -> None:
    page = ROOT / guide
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_are_ones_that_exist(guide: str) -> None:
    for command in _commands((ROOT / guide).read_text(), "moeq"):
        words = [word for word in command[1:] if not word.startswith("[") and "]" not in word]
        parser().parse_args(words)


@pytest.mark.slow
@pytest.mark.vllm
def test_the_commands_run_as_they_stand(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """All of them in order, with a tiny model in the place of MODEL."""
    (tmp_path / "MODEL").symlink_to(tiny_model("mixtral"))
    (tmp_path / "HELDOUT").write_text(TEXT)
    commands = list(_commands(README, "moeq"))
    assert [command[1] for command in commands] == [
        "doctor", "quantize", "eval", "inspect", "quantize",
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run(
            [*COMMAND, *command[1:]], cwd=tmp_path, env=environment() | {"OMP_NUM_THREADS": "2"},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "page.html").exists() and (tmp_path / "OUT2").exists()

    ((program, verb, model, *options),) = _commands(README, "vllm")
    assert (program, verb, model) == ("vllm", "serve", "OUT")
    with serve(tmp_path / model, tmp_path / "log", *options, "--enforce-eager") as address:
        body = {"model": str(tmp_path / model), "prompt": "Line 7", "max_tokens": 4}
        assert call(f"{address}/v1/completions", body)["choices"][0]["text"]


def test_python_in_the_guides_is_python() -> None:
    for guide in GUIDES:
        for block in re.findall(r"```python\n(.*?)```", (ROOT / guide).read_text(), re.DOTALL):
            compile(block, guide, "exec")


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moeq.cli", "--version"],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("moeq ")
