"""The choice of a kernel: automatic, explicit, and never another one in silence."""

import dataclasses

import pytest
import torch

from vllm_moeq.kernels import KERNELS, dispatch, select_kernel

CPU = torch.device("cpu")


def test_names_are_unique() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    assert "auto" not in names


@pytest.fixture
def broken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a kernel before all others that cannot run anywhere."""
    broken = dataclasses.replace(
        KERNELS[-1], name="broken", unavailable=lambda device: f"no compiler for {device}"
    )
    monkeypatch.setattr(dispatch, "KERNELS", (broken, *KERNELS))


@pytest.mark.parametrize("variable", [None, "auto"])
@pytest.mark.usefixtures("broken_first")
def test_auto_takes_the_first_that_can_run(
    monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    monkeypatch.delenv("MOEQ_KERNEL", raising=False)
    if variable:
        monkeypatch.setenv("MOEQ_KERNEL", variable)
    can_run = [kernel.unavailable(CPU) is None for kernel in dispatch.KERNELS]
    assert select_kernel(CPU) == can_run.index(True) > 0


@pytest.mark.parametrize("name", [kernel.name for kernel in KERNELS if not kernel.unavailable(CPU)])
def test_the_variable_chooses_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MOEQ_KERNEL", name)
    assert KERNELS[select_kernel(CPU)].name == name


def test_an_argument_goes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEQ_KERNEL", "magic")
    assert KERNELS[select_kernel(CPU, "reference")].name == "reference"


@pytest.mark.parametrize("name", ["magic", "", "Reference"])
def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MOEQ_KERNEL", name)
    with pytest.raises(ValueError, match=f"MOEQ_KERNEL='{name}' is unknown.*'auto'.*'reference'"):
        select_kernel(CPU)


@pytest.mark.usefixtures("broken_first")
def test_an_explicit_choice_that_cannot_run_is_refused_with_its_reason() -> None:
    with pytest.raises(ValueError, match="MOEQ_KERNEL='broken' cannot run on cpu: no compiler"):
        select_kernel(CPU, "broken")
