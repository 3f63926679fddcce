"""Requests: one set of parameters for API and command line, and what is refused at once."""

import argparse
import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

import moeq
from moeq.cli.options import parser, with_dashes
from moeq.errors import MoeqError
from moeq.requests import (
    METHODS,
    CompareRequest,
    EvaluateRequest,
    PlanRequest,
    QuantizeRequest,
)
from moeq.rounding import METHODS as ROUNDING_METHODS

REQUESTS: dict[str, tuple[type, Any]] = {
    "quantize": (QuantizeRequest, moeq.quantize),
    "plan": (PlanRequest, moeq.plan),
    "eval": (EvaluateRequest, moeq.evaluate),
    "compare": (CompareRequest, moeq.compare),
}
every_request = pytest.mark.parametrize("command", REQUESTS)


def _quantize(**parameters: Any) -> QuantizeRequest:
    return QuantizeRequest(model="m", output=Path("o"), **parameters)


@every_request
def test_the_api_has_the_parameters_and_defaults_of_its_request(command: str) -> None:
    request, function = REQUESTS[command]
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("progress")
    defaults = {
        name: MISSING if parameter.default is parameter.empty else parameter.default
        for name, parameter in parameters.items()
    }
    assert defaults == {field.name: field.default for field in fields(request)}


@every_request
def test_the_command_line_has_an_option_for_each_parameter(command: str) -> None:
    request, _ = REQUESTS[command]
    (commands,) = (
        action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    options = {action.dest for action in commands.choices[command]._actions}
    assert options - {"help", "json"} == {field.name for field in fields(request)}


@every_request
def test_options_that_are_not_given_are_left_to_the_request(command: str) -> None:
    needed = {
        "quantize": ["m", "-o", "o"],
        "plan": ["m"],
        "eval": ["p", "--against", "m", "--text", "t"],
        "compare": ["m", "-o", "o", "--text", "t"],
    }[command]
    given = vars(parser().parse_args([command, *needed]))
    request, _ = REQUESTS[command]
    required = {field.name for field in fields(request) if field.default is MISSING}
    assert given.keys() - {"command", "parser", "json"} == required


def test_underlines_are_taken_for_dashes() -> None:
    given = with_dashes(["plan", "my_model", "--group_size=64", "--base_router", "my_file", "-o"])
    assert given == ["plan", "my_model", "--group-size=64", "--base-router", "my_file", "-o"]


def test_methods_are_those_that_exist() -> None:
    assert set(METHODS) == set(ROUNDING_METHODS)


@pytest.mark.parametrize(
    ("parameters", "strategy", "method", "measured"),
    [
        ({}, "auto", "gptq", True),
        ({"calib": None}, "combined", "rtn", False),
        ({"calib": "none"}, "combined", "rtn", False),
        ({"calib": "text.txt"}, "auto", "gptq", True),
        ({"strategy": "uniform", "bits": 3}, "uniform", "gptq", False),
        ({"method": "rtn"}, "auto", "rtn", True),
        ({"plan": Path("plan.json")}, "auto", "gptq", False),
    ],
)
def test_defaults_go_by_the_text(
    parameters: dict[str, Any], strategy: str, method: str, measured: bool
) -> None:
    request = _quantize(**parameters)
    assert request.chosen_strategy == strategy
    assert request.chosen_method == method
    assert request.is_measured == measured
    assert request.uses_text == (measured or method == "gptq")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bits": 2, "target_size": "1GB"}, "give only one of `bits` and `target_size`"),
        ({"group_size": 48}, "`group_size` 48 is not one of 32, 64, 128"),
        ({"group_size": (32, 48)}, "`group_size` 48 is not one of"),
        ({"levels": (7, 2)}, "`levels` 7 is not one of 1, 2, 3, 4, 8"),
        ({"strategy": "best"}, "`strategy` best is not one of auto, "),
        ({"strategy": "random"}, "`strategy` random is not one of"),
        ({"strategy": "uniform:1"}, "`strategy` uniform:1 is not one of"),
        ({"strategy": "random:x"}, "SEED must be a whole number"),
        ({"strategy": f"random:{2**63}"}, "SEED must be a whole number"),
        ({"strategy": "maxvar", "zeta": 5.0}, "`zeta` has no effect with `strategy` maxvar"),
        ({"strategy": "uniform", "ranks": 2}, "`ranks` has no effect with `strategy` uniform"),
        ({"strategy": "sensitivity", "base_router": "r"}, "`base_router` has no effect"),
        ({"zeta": 0.5}, "`zeta` 0.5 must be at least 1"),
        ({"zeta": float("nan")}, "`zeta` nan must be at least 1"),
        ({"maxvar": "mean"}, "`maxvar` mean is not one of"),
        ({"reorder": "twice"}, "`reorder` twice is not one of"),
        ({"method": "magic"}, "`method` magic is not one of"),
        ({"nsamples": 0}, "`nsamples` 0 is not a positive number"),
        ({"seqlen": -1}, "`seqlen` -1 is not a positive number"),
        ({"strategy": "auto", "calib": None}, "`strategy` auto needs calibration text"),
        ({"method": "gptq", "calib": None}, "`method` gptq needs calibration text"),
        ({"group_size": (32, 64), "calib": None}, "`group_size` 32,64 is a choice that"),
        ({"plan": Path("p"), "bits": 2.0}, "`bits` has no effect with `plan`; give only one"),
        ({"plan": Path("p"), "ranks": 2}, "`ranks` has no effect with `plan`"),
        ({"calib": None, "seed": 1}, "`seed` has no effect without `calib`; leave it out"),
        ({"calib": None, "resume": True}, "`resume` has no effect with `method` rtn"),
        ({"method": "hqq", "route_all_experts": True}, "`route_all_experts` has no effect"),
        ({"strategy": "maxvar", "method": "hqq", "calib": "t"}, "`calib` has no effect"),
        ({"max_shard_size": "lots"}, "`max_shard_size` lots is no size"),
        ({"target_size": "1"}, "`target_size` 1 is no size with a unit"),
        ({"target_size": 0.5}, "`target_size` 0.5 is no size with a unit"),
        ({"group_size": ()}, "`group_size` names no value"),
        ({"levels": ()}, "`levels` names no value"),
        ({"seed": 2**63}, "is not between 0 and 2**63"),
        ({"dry_run": True, "resume": True}, "`resume` has no effect with `dry_run`"),
        ({"dense_bits": 16, "quantize_embeddings": True}, "beside dense layers of 16 bits"),
        ({"plan": Path("p"), "quantize_embeddings": True}, "no effect with `plan`"),
        ({"calib": ""}, "`calib` is empty; give it a value, or leave it out"),
        ({"strategy": " "}, "`strategy` is empty"),
        ({"base_router": ""}, "`base_router` is empty"),
        ({"ray": ""}, "`ray` is empty"),
        ({"target_size": float("nan")}, "`target_size` nan is no size with a unit"),
        ({"target_size": float("inf")}, "`target_size` inf is no size with a unit"),
    ],
)
def test_what_does_not_go_together_is_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(MoeqError) as error:
        _quantize(**parameters)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"strategy": "combined", "calib": "t"}, "`calib` has no effect with `strategy` combined"),
        ({"strategy": "combined", "method": "hqq"}, "`method` has no effect"),
        ({"calib": None, "nsamples": 3}, "`nsamples` has no effect without `calib`"),
    ],
)
def test_a_plan_alone_needs_less(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(MoeqError) as error:
        PlanRequest(model="m", **parameters)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"calib": "none"}, "a comparison needs calibration text"),
        ({"text": "default"}, "`text` must be another text than `calib`"),
        ({"methods": ("gptq", "magic")}, "`methods` magic is not one of"),
        ({"bits": (2, 2)}, "`bits` names the same value twice"),
        ({"bits": (0.5, 2)}, "`bits` must be between 1 and 8"),
        ({"random": 1}, "`random` 1 must be at least 2"),
        ({"eval_nsamples": 0}, "`eval_nsamples` 0 is not a positive number"),
        ({"group_size": 1}, "`group_size` 1 is not one of"),
        ({"text": ""}, "`text` is empty; give it a value"),
    ],
)
def test_a_comparison_is_checked(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(MoeqError) as error:
        CompareRequest(**{"model": "m", "output": Path("o"), "text": "t", **parameters})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"seqlen": 1}, "`seqlen` 1 leaves no token to predict"),
        ({"dtype": "float32"}, "`dtype` has no effect with `backend` reference"),
        ({"backend": "onnx"}, "`backend` onnx is not one of"),
        ({"text": ""}, "`text` is empty; give it a value"),
    ],
)
def test_an_evaluation_is_checked(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(MoeqError) as error:
        EvaluateRequest(**{"packed": Path("p"), "against": "m", "text": "t", **parameters})
    assert message in str(error.value)
