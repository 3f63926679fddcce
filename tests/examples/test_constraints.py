"""The environment that is tested is the one that ``examples/constraints*.txt`` describe."""

from importlib.metadata import distributions
from pathlib import Path
from sysconfig import get_path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXAMPLES = Path(__file__).parents[2] / "examples"
UNPINNED = {"pip", "setuptools", "uv", "vllm-moeq"}
"""What makes the environment, and what is made in it."""


@pytest.mark.skipif(torch.version.cuda is not None, reason="pins are those of a CPU")
def test_everything_that_is_installed_is_pinned() -> None:
    files = EXAMPLES.glob("constraints*.txt")
    lines = [line for file in files for line in file.read_text().splitlines()]
    pins = {
        canonicalize_name(requirement.name): next(iter(requirement.specifier)).version
        for requirement in (Requirement(line) for line in lines if line and line[0] != "#")
    }
    wrong = []
    # Not all of `sys.path`: Ray puts copies of its own there.
    for found in distributions(path=[get_path("purelib")]):
        name = canonicalize_name(found.metadata["Name"])
        public = Version(found.version).public  # torch's is 2.13.0+cpu
        if name not in UNPINNED and pins.get(name) != public:
            wrong.append(f"{name} {public}, pinned: {pins.get(name)}")
    assert not wrong
