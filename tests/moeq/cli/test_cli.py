"""The ``moeq`` command: what it prints and writes when all is well, and its usage errors."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from moeq.checkpoint.families import FAMILIES, FOUND_BY_TESTS
from moeq.cli import main
from moeq.cli.commands import COMMANDS
from moeq.cli.options import parser
from support.checkpoints import CONTAINERS, plan_dict, write_checkpoint
from support.cli import run_moeq
from support.family_table import END, PAGE, START
from vllm_moeq._version import __version__


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "source")


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(json.dumps(plan_dict()))
    return path


@pytest.mark.slow
def test_quantize_inspect_and_verify_in_real_processes(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = run_moeq(
        "quantize", source, "-o", output, "--bits", "2.6", "--group-size", "64", "--calib=none"
    )
    assert done.returncode == 0, done.stderr
    for line in ("bits requested   2.6000", "bits achieved    2.5000", f"vllm serve {output}"):
        assert line in done.stdout
    inspected = run_moeq("inspect", output, "--json")
    summary = json.loads(inspected.stdout)
    assert summary["experts_at_width"][CONTAINERS[0]] == {
        "w13": {"2": 2, "3": 2},
        "w2": {"2": 2, "3": 2},
    }
    verified = run_moeq("verify", output)
    assert (verified.returncode, verified.stderr) == (0, "")
    assert f"{output} is complete and undamaged" in verified.stdout


def test_plan_file_can_be_used_to_quantize(source: Path, tmp_path: Path) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "out"
    arguments = ["--bits", "2.5", "--strategy", "random:1", "--group-size", "32"]
    assert main(["plan", str(source), "-o", str(plan), *arguments]) == 0
    assert (
        main(["quantize", str(source), "-o", str(output), "--plan", str(plan), "--method=rtn"]) == 0
    )
    stored = json.loads((output / "config.json").read_text())["quantization_config"]
    assert stored["provenance"]["details"].pop("rounding") == "rtn"
    for key in ("expert_bits", "group_size", "provenance"):
        assert stored[key] == json.loads(plan.read_text())[key]


def test_dry_run_prints_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(source), "-o", str(tmp_path / "out"), "--bits", "2", "--dry-run"]
    assert main([*command, "--group-size", "64", "--calib", "none"]) == 0
    printed = capsys.readouterr().out
    for text in ("peak memory", "all tensors", "4 x 2 bit"):
        assert text in printed
    assert list(tmp_path.iterdir()) == []


def test_plan_as_json_is_json_only(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(source), "--bits", "2", "--group-size", "64", "--json", "--calib=none"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["achieved_bits"] == 2.0


def test_inspect_reads_a_plan_file(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(plan_file)]) == 0
    assert f"{CONTAINERS[1]}: 1 x 3 bit, 2 x 2 bit, 1 x 1 bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "2.5", "--group-size", "48"], "--group-size 48 is not one of 32, 64, 128"),
        (["--bits", "2.5", "--group-size", "0"], "--group-size 0 is not one of 32, 64, 128"),
        (["--bits", "2.5", "--levels", "7,2"], "--levels 7 is not one of 1, 2, 3, 4, 8"),
        (
            ["--bits=7", "--strategy=uniform", "--method=rtn", "--group-size=64"],
            "--strategy uniform",
        ),
        (["--bits", "2.5", "--strategy", "best"], "--strategy best"),
        (["--bits", "2.5", "--zeta", "0.5", "--group-size", "64"], "--zeta 0.5"),
        (["--bits", "2", "--max-shard-size", "lots", "--group-size", "64"], "--max-shard-size"),
        (["--bits", "2", "--max-shard-size", "0GB", "--group-size", "64"], "--max-shard-size"),
        (["--bits", "2", "--max-shard-size=-1GB", "--group-size", "64"], "--max-shard-size"),
        (["--plan", "{plan}", "--bits", "2"], "--bits has no effect with --plan"),
        (["--plan", "{plan}", "--levels", "2"], "--levels has no effect with --plan"),
        (["--plan", "{plan}", "--base-router", "x"], "--base-router has no effect with --plan"),
        (["--plan", "/nowhere.json", "--method", "rtn"], "/nowhere.json is missing"),
        (["--plan", "/", "--method", "rtn"], "cannot read /"),
    ],
)
def test_a_wrong_option_is_named(
    source: Path,
    plan_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    filled = [argument.format(plan=plan_file) for argument in arguments]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *filled]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make"], "invalid choice: 'make'"),
        (["quantize", "model"], "-o/--output"),
        (["quantize", "model", "-o", "out", "--bits", "few"], "--bits"),
        (["quantize", "model", "-o", "out", "--levels", "3;2"], "'3;2' is no list of widths"),
        (["quantize", "model", "-o", "out", "--method", "magic"], "--method"),
    ],
)
def test_wrong_usage_exits_with_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("output", ["plan.json", "no/such/folder/plan.json"])
def test_plan_does_not_overwrite_and_names_what_it_cannot_write(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    (tmp_path / "plan.json").write_text("precious")
    command = ["plan", str(source), "--bits", "2", "--group-size", "64", "--calib=none"]
    assert main([*command, "-o", str(tmp_path / output)]) == 1
    assert str(tmp_path / output) in capsys.readouterr().err
    assert (tmp_path / "plan.json").read_text() == "precious"


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("kind", ["nowhere", "empty", "unquantized", "file"])
def test_what_is_no_packed_checkpoint_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    path = source if kind == "unquantized" else tmp_path / kind
    assert main([command, str(path)]) == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    "provenance", [{"achieved_bits": "many"}, {"details": None}, {"expert_bytes": 1.5}, []]
)
def test_a_plan_with_a_broken_provenance_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], provenance: object
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_dict(provenance=provenance)))
    assert main(["inspect", str(path)]) == 1
    assert f"{path}: provenance" in capsys.readouterr().err


def test_alone_it_shows_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    for command in ("moeq quantize MODEL", "moeq eval OUT", "vllm serve OUT", "moeq --help"):
        assert any(line.strip().startswith(command) for line in lines)


def test_every_help_has_an_example_that_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        example = capsys.readouterr().out.split("example:\n")[1].strip()
        words = shlex.split(example.replace('eval "$(', "").replace(')"', ""))
        assert words[:2] == ["moeq", command]
        assert parser().parse_args(words[1:]).command == command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"moeq {__version__}\n"


def test_commands_that_are_printed_can_be_pasted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out of the way; rm -rf"
    options = ["--bits", "2", "--group_size", "64", "--calib", "none"]
    assert main(["quantize", str(source), "-o", str(output), *options]) == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("serve it with: ")
    assert shlex.split(line) == ["vllm", "serve", str(output), "--quantization", "moeq"]


def test_json_for_scripts(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    options = ["--bits=2", "--group-size=64", "--calib=none", "--json"]
    assert main(["quantize", str(source), "-o", str(output), *options]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["written"] and made["path"] == str(output)
    assert made["plan"]["provenance"]["total_bytes"] == made["estimate"]["output_bytes"]
    assert main(["verify", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(output), "problems": []}
    (output / "tokenizer.json").write_text("new")
    (output / "config.json").unlink()
    assert main(["verify", str(output), "--json"]) == 1
    assert "config.json" in json.loads(capsys.readouterr().out)["problems"][0]
    assert main(["families", "--json"]) == 0
    assert {row["model_type"] for row in json.loads(capsys.readouterr().out)} == {
        name for family in FAMILIES for name in family.model_types
    }


def test_families_and_the_page_tell_what_tests_found(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(FOUND_BY_TESTS.read_text())
    page = PAGE.read_text().split(START)[1].split(END)[0]
    lines = [line.strip("| ").split(" | ") for line in page.splitlines()]
    columns = lines[0][1:]
    assert {
        name.strip("`"): dict(zip(columns, cells, strict=True)) for name, *cells in lines[2:]
    } == found
    assert main(["families"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 110
    for name, facts in found.items():
        (block,) = re.findall(rf"^{name} .*\n((?: .*\n)+)", told, re.MULTILINE)
        starts = {}
        for line in re.sub(r"\n {20}", " ", block).splitlines():
            start, _, rest = line.strip().partition(": ")
            starts[start] = rest
        for words, cell in (("tested", "yes"), ("not tested", "-")):
            named = [fact for fact in facts if facts[fact] == cell]
            assert starts.pop(words, "") == ", ".join(named)
        assert starts == {fact: cell for fact, cell in facts.items() if cell not in ("yes", "-")}


def test_without_text_the_rule_is_not_praised(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(source), "--group-size=64", "--calib=none"]) == 0
    assert "this rule was not clearly better than random plans" in capsys.readouterr().out
    options = ["--group-size=64", "--calib=none", "--strategy=random:1"]
    assert main(["plan", str(source), *options]) == 0
    assert "not clearly better" not in capsys.readouterr().out


def test_a_shell_completes_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    ask = (
        f"source {script}; COMP_WORDS=(moeq quantize --group); COMP_CWORD=2; "
        "_shtab_moeq; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["--group-size"], done.stderr
