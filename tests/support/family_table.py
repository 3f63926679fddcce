"""Writes the table of families from what tests found: ``python -m support.family_table RESULTS``.

It runs in ``tests`` with ``PYTHONPATH=..:../offline``: else ``tests/moeq`` stands for ``moeq``.

RESULTS are files of ``pytest --junitxml`` over ``tests/moeq/checkpoint``, ``tests/moeq/model`` and
``tests/vllm_moeq``. A cell says yes where all its tests passed, why not where there can be none,
and a dash where none was run.
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

from support.models import DIFFERENT_IN_VLLM, FAMILIES, NOT_ON_CPU, UNKNOWN_TO_TRANSFORMERS
from support.reference import FUSED_IN_RELEASES

PAGE = Path(__file__).parents[2] / "offline" / "moeq" / "checkpoint" / "README.md"
START, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
HEADER = (
    "| `model_type` | as transformers saves it | read from both layouts | packed | calibrated "
    "| vLLM on a CPU |",
    "|---|---|---|---|---|---|",
)
_LAYOUTS = "test_a_fused_checkpoint_reads_as_the_one_with_a_tensor_per_expert"
_PACKED = "test_every_family_converts_and_verifies"
_LAYERWISE = "test_logits_are_those_of_transformers", "test_gradients_are_those_of_transformers"
_SERVED = "test_equals_the_dequantized_model", "test_equals_the_dequantized_model_in_vllm"
_GPT_OSS = "test_equals_transformers"

Results = dict[tuple[str, str], bool]
"""By test and first parameter: whether all such tests passed."""


def main(files: list[str]) -> None:
    """Write the table into the page."""
    results = _results(files)
    rows = "\n".join([*HEADER, *(_row(family, results) for family in FAMILIES)])
    page = PAGE.read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{START}{rows}\n{END}{after}")


def _results(files: list[str]) -> Results:
    results: Results = {}
    for file in files:
        of_file: Results = {}
        for case in ElementTree.parse(file).iter("testcase"):
            match = re.fullmatch(r"(\w+)\[([^\]-]+).*\]", case.get("name", ""))
            if match and case.find("skipped") is None:
                failed = case.find("failure") is not None or case.find("error") is not None
                key = match[1], match[2]
                of_file[key] = of_file.get(key, True) and not failed
        results |= of_file  # a later run of a test holds
    # Ranks are the parameters of this test.
    ranks = [passed for key, passed in results.items() if key[0] == _GPT_OSS]
    if ranks:
        results[_SERVED[0], "gpt_oss"] = all(ranks)
    return results


def _row(family: str, results: Results) -> str:
    def cell(tests: tuple[str, ...], reason: str | None = None, yes: str = "yes") -> str:
        if reason:
            return f"no: {reason}"
        found = [results[test, family] for test in tests if (test, family) in results]
        return (yes if all(found) else "FAILED") if found else "-"

    unknown = "transformers does not know it" if family in UNKNOWN_TO_TRANSFORMERS else None
    dtype = DIFFERENT_IN_VLLM.get(family)
    same = "yes" if dtype is None else f"yes, as vLLM itself in {dtype}"
    cells = (
        f"`{family}`",
        "fused" if family in FUSED_IN_RELEASES else "a tensor per expert",
        cell((_LAYOUTS,), unknown),
        cell((_PACKED,)),
        cell(_LAYERWISE),
        cell(_SERVED, NOT_ON_CPU.get(family), same),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
