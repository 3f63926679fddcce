"""Writes what tests found of each family: ``python -m support.family_table RESULTS``.

It runs in ``tests`` with ``PYTHONPATH=..:../offline``: else ``tests/moeq`` stands for ``moeq``.

RESULTS are files of ``pytest --junitxml`` over ``tests/moeq`` and ``tests/vllm_moeq``. They go into
``families.json``, which ``moeq families`` shows, and from there into the page's table. A cell says
yes where all its tests passed, why not where there can be none, and a dash where none was run; what
RESULTS say nothing of stays as it is.
"""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

from moeq.checkpoint.families import FOUND_BY_TESTS
from support.models import (
    BFLOAT16_IN_VLLM,
    DIFFERENT_IN_VLLM,
    ENCODER_DECODERS,
    FAMILIES,
    NEED_TORCHVISION,
    NOT_LAYERWISE,
    NOT_ON_CPU,
    UNKNOWN_TO_TRANSFORMERS,
)
from support.reference import FUSED_IN_RELEASES

PAGE = Path(__file__).parents[2] / "offline" / "moeq" / "checkpoint" / "README.md"
START, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
_LAYOUTS = "test_a_fused_checkpoint_reads_as_the_one_with_a_tensor_per_expert"
_SOURCES = (
    "test_a_source_reads_as_its_twin", "test_calibration_and_evaluation_cannot_tell_them_apart",
)  # fmt: skip
_PLANNED = "test_every_family_is_planned"
_PACKED = "test_every_family_converts_and_verifies"
_LAYERWISE = "test_logits_are_those_of_transformers", "test_gradients_are_those_of_transformers"
_EVALUATED = "test_scores_are_those_of_transformers"
_SERVED = (
    "test_equals_the_dequantized_model", "test_equals_the_dequantized_model_in_vllm",
    "test_is_the_dequantized_model_in_bfloat16",
)  # fmt: skip
_TENSOR_PARALLEL = "test_two_ranks_split_each_expert"
_EXPERT_PARALLEL = "test_two_ranks_split_the_experts"
_OF_MIXTRAL = {"test_tensor_parallel": _TENSOR_PARALLEL, "test_expert_parallel": _EXPERT_PARALLEL}
_TRANSFORMERS = "hf: test_equals_the_dequantized_model"

Results = dict[tuple[str, str], bool]
"""By test and first parameter: whether all such tests passed."""


def main(files: list[str]) -> None:
    """Write the facts, and the table into the page."""
    names = (*FAMILIES, *ENCODER_DECODERS)
    results, before = _results(files), json.loads(FOUND_BY_TESTS.read_text())
    facts = {family: _facts(family, results, before.get(family, {})) for family in names}
    FOUND_BY_TESTS.write_text(json.dumps(facts, indent=1) + "\n")
    start, end = PAGE.read_text().split(START)[0], PAGE.read_text().split(END)[1]
    PAGE.write_text(f"{start}{START}{table(facts)}{END}{end}")


def table(facts: dict[str, dict[str, str]]) -> str:
    """Return the page's table, a line for each family."""
    columns = list(next(iter(facts.values())))
    lines = [["`model_type`", *columns], ["---"] * (1 + len(columns))]
    lines += [[f"`{family}`", *cells.values()] for family, cells in facts.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _results(files: list[str]) -> Results:
    results: Results = {}
    for file in files:
        of_file: Results = {}
        for case in ElementTree.parse(file).iter("testcase"):
            match = re.fullmatch(r"(\w+)(?:\[([^\]-]+).*\])?", case.get("name", ""))
            if match and case.find("skipped") is None:
                failed = case.find("failure") is not None or case.find("error") is not None
                test = _OF_MIXTRAL.get(match[1], match[1])
                if ".hf." in case.get("classname", ""):
                    test = f"hf: {test}"
                key = test, match[2] or "mixtral"
                of_file[key] = of_file.get(key, True) and not failed
        results |= of_file  # a later run of a test holds
    return results


def _facts(family: str, results: Results, before: dict[str, str]) -> dict[str, str]:
    facts = {
        "as transformers saves it": (
            "fused" if family in FUSED_IN_RELEASES else "a tensor per expert"
        )
    }

    def tell(fact: str, *tests: str, reason: str | None = None, yes: str = "yes") -> None:
        found = [results[test, family] for test in tests if (test, family) in results]
        if reason:
            facts[fact] = f"no: {reason}"
        elif found:
            facts[fact] = yes if all(found) else "FAILED"
        else:
            facts[fact] = before.get(fact, "-")

    unknown = "transformers does not know it" if family in UNKNOWN_TO_TRANSFORMERS else None
    tell("both layouts", _LAYOUTS, reason=unknown)
    tell("FP8, FP4, INT4", *_SOURCES)
    tell("planned", _PLANNED)
    tell("packed", _PACKED)
    tell("calibrated", *_LAYERWISE, reason=NOT_LAYERWISE.get(family))
    tell("evaluated", _EVALUATED)
    tell(
        "vLLM on a CPU",
        *_SERVED,
        reason=NOT_ON_CPU.get(family),
        yes=f"yes{_how(family)}",
    )
    tell("TP 2", _TENSOR_PARALLEL)
    tell("EP 2", _EXPERT_PARALLEL)
    tell("transformers", _TRANSFORMERS, reason=unknown)
    return facts


def _how(family: str) -> str:
    if family in DIFFERENT_IN_VLLM:
        return ", as vLLM itself in float32"
    ways = {"in bfloat16": BFLOAT16_IN_VLLM, "with torchvision": NEED_TORCHVISION}
    return "".join(f", {way}" for way, families in ways.items() if family in families)


if __name__ == "__main__":
    main(sys.argv[1:])
