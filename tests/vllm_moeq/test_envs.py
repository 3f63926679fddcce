"""The table of environment variables, and what is read from them."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_moeq import envs
from vllm_moeq.kernels import KERNELS
from vllm_moeq.kernels.cpu.build import INSTRUCTION_SETS, PORTABLE

PACKAGE = Path(envs.__file__).parent
ACCESSORS: dict[envs.Variable, Callable[[], object]] = {
    envs.KERNEL: envs.kernel,
    envs.CPU_ISA: envs.cpu_isa,
    envs.CPU_ACTIVATION: envs.cpu_activation,
    envs.TILES: envs.tiles,
    envs.CACHE_DIR: envs.cache_dir,
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [variable.name for variable in envs.VARIABLES] + ["XDG_CACHE_HOME"]:
        monkeypatch.delenv(name, raising=False)


def test_every_variable_that_the_sources_name_is_in_the_table() -> None:
    sources = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    sources = sources.replace("-DMOEQ_ISA_AVX2", "")  # a macro of the C++ code
    names = set(re.findall(r"\bMOEQ_[A-Z_]+\b", sources))
    assert names == {variable.name for variable in envs.VARIABLES} == {v.name for v in ACCESSORS}


def test_only_this_module_reads_them() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name != "envs.py":
            assert not re.search(r"environ[^\n]*MOEQ_", path.read_text()), path


def test_the_table_lists_the_values_that_there_are() -> None:
    assert set(envs.KERNEL.values) == {"auto", *(kernel.name for kernel in KERNELS)}
    assert set(envs.CPU_ISA.values) == {isa.name for isa in (*INSTRUCTION_SETS, PORTABLE)}


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    others = (None, "int16", None, tmp_path / ".cache" / "moeq")
    assert [read() for read in ACCESSORS.values()] == ["auto", *others]
    # Set but empty is unset, except for the kernel, whose empty name the dispatch table refuses.
    for variable in envs.VARIABLES:
        monkeypatch.setenv(variable.name, "")
    assert [read() for read in ACCESSORS.values()] == ["", *others]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert envs.cache_dir() == tmp_path / "xdg" / "moeq"


@pytest.mark.parametrize("variable", ACCESSORS, ids=lambda variable: variable.name)
def test_they_are_read_at_each_use(
    monkeypatch: pytest.MonkeyPatch, variable: envs.Variable
) -> None:
    for value in ("int8", "int16"):  # fits them all
        monkeypatch.setenv(variable.name, value)
        assert str(ACCESSORS[variable]()).endswith(value)


def test_a_wrong_precision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEQ_CPU_ACTIVATION", "int4")
    with pytest.raises(ValueError, match=r"MOEQ_CPU_ACTIVATION='int4' is not one of \['int16',"):
        envs.cpu_activation()


def test_without_a_home_folder_the_error_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(FileNotFoundError, match=r"home directory\. Set MOEQ_CACHE_DIR to a folder"):
        envs.cache_dir()
    monkeypatch.setenv("MOEQ_CACHE_DIR", "cache")
    assert envs.cache_dir() == Path("cache").absolute()


def test_importing_it_needs_no_torch() -> None:
    code = "import sys; from vllm_moeq import envs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True)


def test_the_readme_has_the_same_table() -> None:
    rows = [
        f"| `{v.name}` | {', '.join(v.values)} | {v.default} | {v.meaning} |"
        for v in envs.VARIABLES
    ]
    found = [
        line
        for line in (PACKAGE / "README.md").read_text().splitlines()
        if line.startswith("| `MOEQ_")
    ]
    assert found == rows
