"""The command line: what people type, what they read, and what they get for a mistake."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from boxcar.pipelines.families.catalog import FAMILIES, find_family
from boxcar.pipelines.readers.catalog import READERS
from boxcar.schemas import manifest as manifests
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.workflow import Workflow
from boxcar.tools.cli import CHAPTERS, COMMANDS, main
from boxcar.tools.workflows import load_workflow
from tests.places import ROOT as REPOSITORY
from tests.small_sets import BOXCAR, ONLY_DETECT, boxcar, config, contents, demo_config, picture, read_rows, run, write_coco

HEAVY = {"torch", "transformers", "ray", "polars", "pyarrow", "numpy", "pandas", "PIL", "cv2", "tokenizers", "pydantic", "yaml", "rich"}


def invoke(*arguments: object, stdin: bytes | str | None = None) -> Result:
    """A command in this process. Only exits are no mistakes of ours."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def flat(text: str) -> str:
    """Text whose lines the console has broken somewhere."""
    return " ".join(text.split())


def mistake(*arguments: object, stdin: bytes | str | None = None) -> str:
    """The message of a command that ends with a mistake of the user."""
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


# ---- help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_waits_for_nothing_heavy(command: str) -> None:
    script = f"""
import sys
from boxcar.tools.cli import main
try:
    main([*{[command] if command else []!r}, "--help"])
finally:
    print("imported:", sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert "Usage:" in done.stdout


def test_help_names_every_command() -> None:
    help_text = invoke("--help").output
    named = re.findall(r"^  ([a-z][a-z-]+)  +[A-Z]", help_text, re.MULTILINE)
    assert named == list(COMMANDS), "each once, in the order of the chapters"
    assert re.findall(r"^([A-Z][a-z]+):$", help_text, re.MULTILINE)[1:] == list(CHAPTERS)


def test_the_version_is_said() -> None:
    assert invoke("--version").output == f"boxcar, version {version('boxcar-vl')}\n"


@pytest.mark.parametrize(
    "arguments", [["pack"], ["convert"], ["convert", "demo", "--fast"], ["show"], ["show", "x", "--row", "two"]], ids=str
)
def test_a_command_that_is_not_understood_ends_with_2(arguments: list[str]) -> None:
    assert "Usage:" in mistake(*arguments)


# ---- from the first command to the last


def test_the_quick_start_works_as_it_is_written(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "workflows.yaml", tmp_path)
    drawn = boxcar("demo", "--images", 6, cwd=tmp_path)
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert "data/demo: 6 scenes" in drawn.stdout
    assert "Next: boxcar convert demo" in drawn.stdout

    converted = boxcar("convert", "demo", "executor=inline", cwd=tmp_path)
    assert converted.returncode == 0, converted.stderr
    assert "records read 6 = 6 written + 0 rejected" in flat(converted.stdout)
    assert "boxcar show shards/demo --row 0" in flat(converted.stdout)

    shown = boxcar("show", "shards/demo", "--row", 0, cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "instances/1 (instances.json, image 1)" in flat(shown.stdout)
    assert Image.open(tmp_path / "row-0.png").format == "PNG"

    verified = boxcar("verify", "shards/demo", cwd=tmp_path)
    assert verified.returncode == 0
    assert "6 rows" in verified.stdout
    assert "all is well" in verified.stdout

    again = boxcar("convert", "demo", "executor=inline", cwd=tmp_path)
    assert again.returncode == 0
    assert "shards/demo is complete already" in flat(again.stderr)
    assert again.stdout == converted.stdout


# ---- convert


def write_workflows(folder: Path, content: str | dict[str, Any]) -> Path:
    path = folder / "flows.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def minimal(**changes: Any) -> dict[str, Any]:
    convert = {"reader": "coco", "annotations": "a.json", "family": "qwen2_5_vl", "tokenizer": "t", "cutoff_len": 64, "output": "out"}
    return {"small": {"convert": {**convert, **changes}}}


def test_converting_prints_the_counts_as_json_alone(demo: Path, tmp_path: Path) -> None:
    flow = write_workflows(tmp_path, {"small": {"convert": demo_config(demo, tmp_path / "out").model_dump(mode="json")}})
    result = invoke("convert", "small", "--file", flow, "--json", "records_per_shard=5")
    assert result.exit_code == 0
    counts = json.loads(result.stdout)
    assert (counts["records_read"], counts["records_written"]) == (12, 12)
    assert len(manifests.load(tmp_path / "out").shards) == 3
    assert json.loads(invoke("convert", "small", "--file", flow, "--json", "records_per_shard=5").stdout) == counts


def test_converting_into_a_folder_with_brackets_says_its_name(demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "a[red]b[/red] [/]c"
    flow = write_workflows(tmp_path, {"small": {"convert": demo_config(demo, output).model_dump(mode="json")}})
    first, second = (boxcar("convert", "small", "--file", flow) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert "a[red]b[/red] [/]c" in flat(first.stdout)
    assert "a[red]b[/red] [/]c is complete already" in flat(second.stderr)


def test_rejections_are_shown_with_their_reason_and_where_they_are_kept(demo: Path, tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "[red]gone[/red].jpg"}, {"id": 2, "file_name": "\x1b[31mgone.jpg"}]
    path = write_coco(tmp_path, images)
    settings = config(path, tmp_path / "out", demo / "tokenizer")
    flow = write_workflows(tmp_path, {"small": {"convert": settings.model_dump(mode="json")}})
    result = invoke("convert", "small", "--file", flow)
    assert result.exit_code == 1, "nothing was written: that is no success"
    assert "every record was rejected" in flat(result.stderr)
    text = flat(result.stdout)
    assert "2 written" not in text
    assert "0 written + 2 rejected" in text
    assert "missing_image 2" in text
    assert "rejected-00000.jsonl" in text
    assert "[red]gone[/red].jpg" in text.replace(" ", "")
    assert "\x1b" not in result.output


BROKEN_WORKFLOWS = [
    pytest.param(minimal(), ["large"], [], ["flows.yaml: found no workflow 'large', expected one of: small"], id="unknown workflow"),
    pytest.param("{}", ["small"], [], ["no workflow 'small', expected one of: none"], id="no workflows"),
    pytest.param("", ["small"], [], ["flows.yaml: found nothing, expected workflow names"], id="empty file"),
    pytest.param("- a\n- b\n", ["small"], [], ["list at the top, expected workflow names"], id="a list"),
    pytest.param("small: 3\n", ["small"], [], ["flows.yaml, small: found 3, expected sections such as `convert:`"], id="a number"),
    pytest.param("small:\n", ["small"], [], ["flows.yaml, small: found None, expected sections"], id="nothing below the name"),
    pytest.param(
        "small: {description: x}\n", ["small"], [], ["found the sections description, expected a section `convert:`"], id="no section"
    ),
    pytest.param("small: {convert: coco}\n", ["small"], [], ["small.convert: found 'coco', expected keys"], id="a word for a section"),
    pytest.param("small: {convert: [1]}\n", ["small"], [], ["small.convert: found [1], expected keys"], id="a list for a section"),
    pytest.param("small:\n  convert: {a: [1\n", ["small"], [], ["flows.yaml: found broken YAML", "line 3|line 2"], id="broken YAML"),
    pytest.param("small:\n\tconvert: 1\n", ["small"], [], ["broken YAML", "line 2"], id="a tab"),
    pytest.param("a: 1\nb: 2\na: 3\n", ["a"], [], ["flows.yaml, line 3: found the key 'a' a second time"], id="a name twice"),
    pytest.param(
        "small:\n  convert:\n    family: a\n    tasks:\n      caption: {share: 1, share: 0}\n",
        ["small"],
        [],
        ["flows.yaml, line 5: found the key 'share' a second time, expected each key once"],
        id="a nested key twice",
    ),
    pytest.param("? [a, b]\n: 1\n", ["small"], [], ["flows.yaml", "line 1"], id="a list as a key"),
    pytest.param("a: !!python/object:os.system {}\n", ["a"], [], ["broken YAML"], id="a Python object"),
    pytest.param(
        minimal(cutof_len=1),
        ["small"],
        [],
        ["small.convert.cutof_len: unknown key, expected one of reader, ", "cutoff_len"],
        id="unknown key",
    ),
    pytest.param(
        minimal(tasks={"caption": {"shares": 1}}),
        ["small"],
        [],
        ["small.convert.tasks.caption.shares: unknown key, expected one of share, max_per_sample, weight, prompts"],
        id="unknown key, deep",
    ),
    pytest.param(
        minimal(cutoff_len="long"),
        ["small"],
        [],
        ["small.convert.cutoff_len: found 'long', input should be a valid integer"],
        id="no number",
    ),
    pytest.param(
        minimal(cutoff_len=0), ["small"], [], ["small.convert.cutoff_len: found 0, input should be greater than 0"], id="too small"
    ),
    pytest.param(
        minimal(rules={"crowd": "fix"}), ["small"], [], ["small.convert.rules.crowd: found 'fix'", "'keep' or 'drop'"], id="not allowed"
    ),
    pytest.param(minimal(executor="dask"), ["small"], [], ["small.convert.executor: found 'dask'", "'ray' or 'inline'"], id="executor"),
    pytest.param(
        minimal(languages={"en": 0.5}), ["small"], [], ["small.convert: ", "the shares in `languages` sum to 0.5, expected 1"], id="shares"
    ),
    pytest.param(minimal(languages={"fr": 1}), ["small"], [], ["small.convert.languages.fr", "'en' or 'zh'"], id="language"),
    pytest.param(
        minimal(image_storage="embed", trust_sizes=True),
        ["small"],
        [],
        ["embeds image files, but trust_sizes opens none"],
        id="two that clash",
    ),
    pytest.param(
        {"small": {"convert": {"reader": "coco", "seed": -1}}},
        ["small"],
        [],
        ["small.convert.annotations: missing", "small.convert.family: missing", "small.convert.seed: found -1"],
        id="all mistakes at once",
    ),
    pytest.param(
        minimal(), ["small", "cutoff_len"], [], ["command line: found 'cutoff_len', expected key=value"], id="override without a value"
    ),
    pytest.param(minimal(), ["small", "=3"], [], ["command line: found '=3', expected key=value"], id="override without a key"),
    pytest.param(
        minimal(),
        ["small", "languages={en: 1"],
        [],
        ["command line: found 'languages={en: 1', expected a value in YAML"],
        id="override no YAML",
    ),
    pytest.param(minimal(), ["small", "cutof_len=1"], [], ["small.convert.cutof_len: unknown key"], id="override of an unknown key"),
    pytest.param(
        minimal(),
        ["small", "tasks.paint.share=1"],
        [],
        ["small.convert.tasks.paint: unknown key, expected one of detect, "],
        id="unknown task",
    ),
    pytest.param(minimal(), ["small", "cutoff_len.x=1"], [], ["small.convert.cutoff_len: found {'x': 1}"], id="override below a number"),
    pytest.param(minimal(), ["small", "tasks.caption=0"], [], ["small.convert.tasks.caption: found 0"], id="override of a whole task"),
    pytest.param(minimal(reader="cocoa"), ["small"], [], ["convert.reader: found 'cocoa', expected one of coco, "], id="reader"),
    pytest.param(minimal(family="gpt"), ["small"], [], ["convert.family: found 'gpt', expected one of qwen2_vl, "], id="family"),
]


@pytest.mark.parametrize(("content", "arguments", "options", "expected"), BROKEN_WORKFLOWS)
def test_a_mistake_in_a_workflow_is_named_with_place_and_way_out(
    tmp_path: Path, content: str | dict[str, Any], arguments: list[str], options: list[str], expected: list[str]
) -> None:
    flow = write_workflows(tmp_path, content)
    message = mistake("convert", *arguments, "--file", flow, *options)
    assert "ConfigError: " in message
    for part in expected:
        assert any(choice in message for choice in part.split("|")), message
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_a_workflow_does_not_recite_the_whole_section(tmp_path: Path) -> None:
    assert len(mistake("convert", "small", "--file", write_workflows(tmp_path, minimal(languages={"en": 0.5})))) < 300


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(lambda path: None, "found no such file, expected a file of workflows. Name it with --file", id="missing"),
        pytest.param(lambda path: path.mkdir(), "found a folder, expected a file of workflows", id="folder"),
        pytest.param(lambda path: path.write_bytes(b"caf\xe9: 1"), "expected a readable UTF-8 file", id="Latin-1"),
        pytest.param(lambda path: path.write_bytes(b"a: \x00"), "broken YAML", id="null byte"),
    ],
)
def test_a_file_of_workflows_that_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], object], expected: str) -> None:
    make(tmp_path / "flows.yaml")
    message = mistake("convert", "small", "--file", tmp_path / "flows.yaml")
    assert f"{tmp_path / 'flows.yaml'}" in message
    assert expected in flat(message)


def test_overrides_change_what_they_name_and_nothing_else(tmp_path: Path) -> None:
    flow = write_workflows(tmp_path, minimal(tasks={"caption": {"share": 0.5, "weight": 2}}, languages={"en": 0.5, "zh": 0.5}))
    overrides = ["cutoff_len=99", "tasks.caption.share=0", "tasks.absent.max_per_sample=null", "rules.crowd=keep", "seed=1", "seed=2"]
    overrides += ["tasks.detect.prompts.en=['Where is {label}?']", "output=a=b c#d", "captions="]
    plain, changed = (load_workflow(flow, "small", "convert", given).convert for given in ([], overrides))
    assert plain is not None
    assert changed is not None
    before, after = plain.model_dump(), changed.model_dump()
    for path, value in {
        "cutoff_len": 99,
        "tasks.caption.share": 0,
        "rules.crowd": "keep",
        "seed": 2,
        "output": "a=b c#d",
    }.items():
        *parents, last = path.split(".")
        at = before
        for parent in parents:
            at = at[parent]
        at[last] = value
    before["tasks"]["detect"]["prompts"] = {"en": ("Where is {label}?",)}
    before["tasks"]["absent"]["max_per_sample"] = None
    assert after == before
    assert after["tasks"]["caption"]["max_per_sample"] == 1, "a default of this task"
    assert after["tasks"]["caption"]["weight"] == 2
    assert load_workflow(flow, "small", "convert").convert == plain, "the file is read anew"


def test_a_workflow_may_build_on_another_by_an_anchor(tmp_path: Path) -> None:
    flow = write_workflows(
        tmp_path,
        "base: &base {convert: &convert {reader: coco, annotations: a, family: f, tokenizer: t, cutoff_len: 64, output: o}}\n"
        "long: {convert: {<<: *convert, cutoff_len: 4096}}\n",
    )
    long = load_workflow(flow, "long", "convert").convert
    assert long is not None
    assert (long.cutoff_len, long.output) == (4096, "o")


CONVERSIONS = [name for name, flow in yaml.safe_load((REPOSITORY / "workflows.yaml").read_text()).items() if "convert" in flow]


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_workflows_of_the_repository_are_sound(name: str) -> None:
    convert = load_workflow(REPOSITORY / "workflows.yaml", name, "convert").convert
    assert convert is not None
    assert convert.reader in READERS
    assert find_family(convert.family).max_sequence >= convert.cutoff_len


def test_a_missing_source_is_a_mistake_with_a_hint(tmp_path: Path, demo: Path) -> None:
    flow = write_workflows(
        tmp_path, minimal(tokenizer=str(demo / "tokenizer"), annotations=str(tmp_path / "data/a.json"), executor="inline")
    )
    message = mistake("convert", "small", "--file", flow, f"output={tmp_path / 'out'}")
    assert "AnnotationError" in message
    assert f"The nearest folder that exists is {tmp_path}" in flat(message)


# ---- schema, families, formats


def schema() -> dict[str, Any]:
    printed: dict[str, Any] = json.loads(invoke("schema").stdout)
    return printed


def test_the_schema_names_readers_and_families() -> None:
    properties = schema()["$defs"]["ConvertConfig"]["properties"]
    assert properties["reader"]["enum"] == list(READERS)
    assert properties["family"]["enum"] == list(FAMILIES)
    for key, about in properties.items():
        assert about.get("description") or "$ref" in about or key in ("tasks", "rules"), key


def test_the_schema_accepts_what_is_right_and_nothing_else() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    printed = schema()
    jsonschema.Draft202012Validator.check_schema(printed)
    validator = jsonschema.Draft202012Validator(printed)
    own = yaml.safe_load((REPOSITORY / "workflows.yaml").read_text())
    assert list(validator.iter_errors(own)) == []
    assert list(validator.iter_errors(minimal(tasks={"caption": {"weight": 2}}))) == []
    wrong = [
        minimal(cutof_len=1),
        minimal(cutoff_len="long"),
        minimal(reader="cocoa"),
        minimal(family="gpt"),
        minimal(tasks={"paint": {"share": 1}}),
        minimal(tasks={"caption": {"share": 2}}),
        minimal(rules={"crowd": "fix"}),
        minimal(languages={"fr": 1.0}),
        {"small": {"convert": {}}},
        {"small": {"trane": {}}},
    ]
    for content in wrong:
        assert list(validator.iter_errors(content)) != [], content


def test_what_the_schema_accepts_the_loader_accepts() -> None:
    for workflow in yaml.safe_load((REPOSITORY / "workflows.yaml").read_text()).values():
        Workflow.model_validate(workflow)
    with pytest.raises(ConfigError):
        load_workflow(REPOSITORY / "workflows.yaml", "demo", "convert", ["reader=3"])


@pytest.mark.parametrize(("command", "names"), [("families", list(FAMILIES)), ("formats", list(READERS))])
def test_the_lists_are_complete(command: str, names: list[str]) -> None:
    result = invoke(command)
    assert result.exit_code == 0
    for name in names:
        assert name in result.stdout


# ---- tokens


def table_cells(output: str) -> list[list[str]]:
    """The rows of a table, by cell."""
    return [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in output.splitlines() if line.startswith("│")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["qwen2_5_vl", "640x480"], ["640x480", "644x476", "1,34,46", "391", "393", "25"], id="a photograph"),
        pytest.param(["qwen2_5_vl", "640X480"], ["640x480", "644x476", "1,34,46", "391", "393", "25"], id="capital X"),
        pytest.param(["qwen2_5_vl", "28x28"], ["28x28", "56x56", "1,4,4", "4", "6", "4"], id="at least 3136 px"),
        pytest.param(
            ["qwen2_5_vl", "1920x1080", "image_max_pixels=1003520"],
            ["1920x1080", "1316x728", "1,52,94", "1,222", "1,224", "49"],
            id="limited",
        ),
        pytest.param(["cogvlm", "1920x1080"], ["1920x1080", "490x490", "1,35,35", "1,225", "1,227", ""], id="one size"),
    ],
)
def test_tokens_of_a_size_are_told_in_a_table(arguments: list[str], expected: list[str]) -> None:
    result = invoke("tokens", *arguments)
    assert result.exit_code == 0
    [cells] = table_cells(result.stdout)
    assert [cell for cell, wanted in zip(cells, expected, strict=True) if wanted] == [wanted for wanted in expected if wanted]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["gpt", "1x1"], "found 'gpt', expected one of qwen2_vl, ", id="family"),
        pytest.param(["qwen2_5_vl"], "found no size, expected WIDTHxHEIGHT such as 1920x1080", id="nothing"),
        pytest.param(["qwen2_5_vl", "1920:1080"], "found '1920:1080', expected WIDTHxHEIGHT", id="colon"),
        pytest.param(["qwen2_5_vl", "1e3x5"], "found '1e3x5'", id="exponent"),
        pytest.param(["qwen2_5_vl", "12345678x1"], "found '12345678x1'", id="too wide"),
        pytest.param(["qwen2_5_vl", "640x480", "max_pixels=5000"], "found 'max_pixels=5000'", id="unknown key"),
        pytest.param(["qwen2_5_vl", "640x480", "image_max_pixels=0"], "found 'image_max_pixels=0'", id="no pixels"),
        pytest.param(["qwen2_5_vl", "640x480", "image_max_pixels=100"], "found 100, expected at least 784", id="less than a token"),
        pytest.param(
            ["cogvlm", "640x480", "image_max_pixels=9999"], "expected nothing: cogvlm resizes every image to one size", id="fixed size"
        ),
        pytest.param(["qwen2_5_vl", "0x5"], "0x5: found a side without pixels", id="no width"),
        pytest.param(["qwen2_5_vl", "201x1"], "201x1: found an aspect ratio of 201.00, expected at most 200", id="thin"),
        pytest.param(["qwen2_5_vl", "--json", "640x480"], "found sizes together with --json", id="sizes and JSON"),
    ],
)
def test_a_size_that_has_no_tokens_is_a_mistake(arguments: list[str], expected: str) -> None:
    assert expected in flat(mistake("tokens", *arguments, stdin=b""))


def test_good_sizes_are_told_beside_a_bad_one() -> None:
    result = invoke("tokens", "qwen2_5_vl", "640x480", "201x1")
    assert result.exit_code == 2
    assert "644x476" in result.stdout
    assert "201x1" in result.stderr


GOOD_ANSWER = {"resized_width": 644, "resized_height": 476, "grid_thw": [1, 34, 46], "visual_tokens": 391}
LINES: list[tuple[str, bytes, dict[str, Any] | str]] = [
    ("good", b'{"width": 640, "height": 480}', GOOD_ANSWER),
    ("other keys", b'{"width": 640, "height": 480, "id": 7}', GOOD_ANSWER),
    (
        "own limit",
        b'{"width": 640, "height": 480, "max_pixels": 100352}',
        {"resized_width": 364, "resized_height": 252, "grid_thw": [1, 18, 26], "visual_tokens": 117},
    ),
    (
        "own lower limit",
        b'{"width": 28, "height": 28, "min_pixels": 100352}',
        {"resized_width": 336, "resized_height": 336, "grid_thw": [1, 24, 24], "visual_tokens": 144},
    ),
    ("null limits", b'{"width": 640, "height": 480, "max_pixels": null}', GOOD_ANSWER),
    ("cut", b'{"width": 640, "hei', "truncated|malformed"),
    ("no JSON", b"640x480", "got `int`"),
    ("a list", b"[640, 480]", "object"),
    ("no height", b'{"width": 640}', "height"),
    ("a text", b'{"width": "640", "height": 480}', "int"),
    ("half a pixel", b'{"width": 640.5, "height": 480}', "int"),
    ("negative", b'{"width": -640, "height": 480}', "side without pixels"),
    ("no pixels", b'{"width": 0, "height": 480}', "side without pixels"),
    ("thin", b'{"width": 1000, "height": 4}', "aspect ratio of 250.00"),
    ("huge", b'{"width": 10000001, "height": 480}', "at most 10,000,000"),
    ("beyond 64 bits", b'{"width": 99999999999999999999, "height": 480}', "at most 10,000,000"),
    ("limits crossed", b'{"width": 640, "height": 480, "min_pixels": 9000, "max_pixels": 8000}', "at most image_max_pixels, 8000"),
    ("limit below a token", b'{"width": 640, "height": 480, "max_pixels": 5}', "at least 784"),
    ("no UTF-8", b'{"width": 640, "height": 480, "name": "caf\xe9"}', GOOD_ANSWER),
    ("no UTF-8 at all", b"\xff\xfe{}", "malformed|invalid"),
]


def test_json_lines_are_answered_one_for_one() -> None:
    result = invoke("tokens", "qwen2_5_vl", "--json", stdin=b"".join(line + b"\n" for _, line, _ in LINES))
    assert result.exit_code == 0
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len(LINES)
    for (name, _, expected), answer in zip(LINES, answers, strict=True):
        if isinstance(expected, str):
            assert list(answer) == ["error"], name
            assert any(part in answer["error"] for part in expected.split("|")), (name, answer)
        else:
            assert answer == expected, name


def test_limits_of_a_line_and_of_the_command_are_judged_together() -> None:
    """A line's lower limit above the command's upper one is as wrong as one above its own."""
    line = b'{"width": 640, "height": 480, "max_pixels": 5000}\n'
    [answer] = invoke("tokens", "qwen2_5_vl", "image_min_pixels=100352", "--json", stdin=line).stdout.splitlines()
    assert "error" in json.loads(answer)


@pytest.mark.parametrize("limit", [0, -5])
def test_a_limit_of_a_line_is_positive(limit: int) -> None:
    line = json.dumps({"width": 640, "height": 480, "min_pixels": limit}) + "\n"
    [answer] = invoke("tokens", "qwen2_5_vl", "--json", stdin=line).stdout.splitlines()
    assert "error" in json.loads(answer)


@pytest.mark.parametrize("stdin", [b"", b"\n\n  \n"], ids=["nothing", "blank lines"])
def test_no_lines_are_no_answers(stdin: bytes) -> None:
    result = invoke("tokens", "qwen2_5_vl", "--json", stdin=stdin)
    assert (result.exit_code, result.stdout) == (0, "")


def test_line_ends_of_windows_and_a_missing_last_one_are_fine() -> None:
    result = invoke("tokens", "qwen2_5_vl", "--json", stdin=b'{"width": 640, "height": 480}\r\n{"width": 640, "height": 480}')
    assert [json.loads(line) for line in result.stdout.splitlines()] == [GOOD_ANSWER] * 2


@pytest.mark.parametrize(
    ("arguments", "reader"),
    [
        pytest.param(["tokens", "qwen2_5_vl", "--json"], "head -1", id="tokens"),
        pytest.param(["tokens", "qwen2_5_vl", "--json"], "true", id="tokens, unread"),
        pytest.param(["schema"], "head -1", id="schema"),
        pytest.param(["schema"], "true", id="schema, unread"),
        pytest.param(["families"], "head -1", id="families"),
        pytest.param(["formats"], "true", id="formats, unread"),
    ],
)
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, arguments: list[str], reader: str) -> None:
    lines = tmp_path / "lines"
    lines.write_bytes(b'{"width": 640, "height": 480}\n' * 100_000)
    command = f"{BOXCAR} {' '.join(arguments)} < {lines} | {reader}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == (1 if reader == "head -1" else 0)


def test_a_hundred_thousand_lines_are_all_answered() -> None:
    lines = b"".join(b'{"width": %d, "height": 480}\n' % (100 + number % 5000) for number in range(100_000))
    done = boxcar("tokens", "qwen2_5_vl", "--json", stdin=lines)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr, len(answers)) == (0, "", 100_000)
    assert answers[540] == GOOD_ANSWER == answers[65_540]


# ---- verify


def test_verifying_says_what_is_wrong_and_ends_with_1(demo: Path, tmp_path: Path) -> None:
    run(demo_config(demo, tmp_path / "[red]out[/]"))
    folder = tmp_path / "[red]out[/]"
    good = invoke("verify", folder)
    assert good.exit_code == 0
    assert f"{folder}: 7 files, 12 rows" in good.stdout
    assert "all is well" in good.stdout
    assert json.loads(invoke("verify", folder, "--json").stdout)["problems"] == []
    (folder / "rows-00001.arrow").unlink()
    (folder / "[bold]x\x1b[2J").touch()
    bad = invoke("verify", folder)
    assert bad.exit_code == 1
    assert "rows-00001.arrow: found No such file or directory" in bad.stdout
    assert "[bold]x" in bad.stdout
    assert "\x1b" not in bad.output
    assert "2 problems" in bad.stdout
    as_json = invoke("verify", folder, "--json")
    assert as_json.exit_code == 1
    assert len(json.loads(as_json.stdout)["problems"]) == 2


def test_verifying_what_is_no_conversion_ends_with_1(tmp_path: Path) -> None:
    result = invoke("verify", tmp_path / "none")
    assert result.exit_code == 1
    assert "expected the manifest of a complete conversion" in result.stdout


# ---- show

FAMILY_SIZES = [
    pytest.param("qwen2_5_vl", (280, 280), id="pixels of the resized image, which is as the original"),
    pytest.param("qwen2_5_vl", (500, 300), id="pixels of the resized image"),
    pytest.param("qwen2_vl", (500, 300), id="thousandths"),
    pytest.param("qwen3_vl", (500, 300), id="thousandths in JSON"),
]
RED, GREEN = (230, 0, 0), (0, 150, 0)
"""Of the first and the second turn."""


def shards_of(
    folder: Path,
    tokenizer: Path,
    size_wh: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    labels: tuple[str, ...] = ("cat", "dog"),
    **changes: Any,
) -> Path:
    """One white picture; box n is of label n."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", size_wh, "white").save(folder / "images" / "a.png")
    annotations = [{"image_id": 1, "category_id": number, "bbox": box} for number, box in enumerate(boxes, 1)]
    image = {"id": 1, "file_name": "a.png", "width": size_wh[0], "height": size_wh[1]}
    path = write_coco(folder, [image], annotations, labels)
    run(config(path, folder / "out", tokenizer, **{"images": str(folder / "images"), "tasks": ONLY_DETECT, **changes}))
    return folder / "out"


@pytest.mark.parametrize(("family", "size_wh"), FAMILY_SIZES)
@pytest.mark.parametrize("image_storage", ["reference", "embed", "embed_resized"])
def test_boxes_are_drawn_where_the_answer_says(
    demo: Path, tmp_path: Path, family: str, size_wh: tuple[int, int], image_storage: str
) -> None:
    first, second = [40, 60, 100, 80], [160, 150, 90, 110]
    folder = shards_of(tmp_path, demo / "tokenizer", size_wh, [first, second], family=family, image_storage=image_storage)
    result = invoke("show", folder, "--out", tmp_path / "drawn.png")
    assert result.exit_code == 0
    drawn = Image.open(tmp_path / "drawn.png").convert("RGB")
    image = read_rows(folder)[0]["images"][0]
    assert drawn.size == (image["resized_width"], image["resized_height"])
    scale_x, scale_y = drawn.width / size_wh[0], drawn.height / size_wh[1]
    for (x, y, width, height), colour in ((first, RED), (second, GREEN)):
        left, right, top, bottom = x * scale_x, (x + width) * scale_x, y * scale_y, (y + height) * scale_y
        for at in (((left + right) / 2, top), ((left + right) / 2, bottom), (left, (top + bottom) / 2), (right, (top + bottom) / 2)):
            assert near(drawn, at, colour), f"{colour} at {at}"
        assert drawn.getpixel((round((left + right) / 2), round((top + bottom) / 2))) == (255, 255, 255), "the inside is left alone"
    assert drawn.getpixel((2, 2)) == (255, 255, 255)


def near(drawn: Image.Image, at: tuple[float, float], colour: tuple[int, int, int]) -> bool:
    """Whether a pixel at or beside this place has nearly this colour: lines are two pixels wide, with soft edges."""
    around = [(round(at[0]) + dx, round(at[1]) + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    pixels = [drawn.getpixel(place) for place in around if 0 <= place[0] < drawn.width and 0 <= place[1] < drawn.height]
    return any(isinstance(pixel, tuple) and max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 40 for pixel in pixels)


def test_what_is_drawn_is_the_answer_and_not_the_annotation(demo: Path, tmp_path: Path) -> None:
    """Rounding is part of what the model is taught: a box of a third of a pixel's error is drawn with that error."""
    folder = shards_of(tmp_path, demo / "tokenizer", (280, 280), [[100.4, 50.4, 60, 60]])
    shown = invoke("show", folder, "--no-picture").stdout
    assert "box 0: [100, 50, 160, 110] cat" in shown


def test_a_row_is_printed_with_its_costs(demo: Path, tmp_path: Path) -> None:
    folder = shards_of(tmp_path, demo / "tokenizer", (280, 280), [[40, 60, 100, 80]])
    shown = flat(invoke("show", folder, "--no-picture").stdout)
    [row] = read_rows(folder)
    assert f"tokens {row['total_tokens']} with all turns = 100 image placeholders + {row['text_tokens']} text" in shown
    assert "280x280 px -> 280x280 px, grid 1,20,20, 100 visual tokens" in shown
    assert row["turns"][0]["question"] in shown
    assert "drawn" not in shown


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(12, "found row 12, expected 0..11", id="one too far"),
        pytest.param(-1, "found row -1, expected 0..11", id="negative"),
        pytest.param(10**30, "expected 0..11", id="astronomical"),
    ],
)
def test_a_row_that_is_not_there_is_a_mistake(demo: Path, tmp_path: Path, row: int, expected: str) -> None:
    run(demo_config(demo, tmp_path / "out"))
    assert expected in mistake("show", tmp_path / "out", f"--row={row}", "--no-picture")


def test_the_last_row_is_shown(demo: Path, tmp_path: Path) -> None:
    run(demo_config(demo, tmp_path / "out"))
    assert "instances/12" in invoke("show", tmp_path / "out", "--row=11", "--no-picture").stdout


def test_showing_what_is_no_conversion_is_a_mistake(tmp_path: Path) -> None:
    assert "expected the manifest of a complete conversion" in mistake("show", tmp_path)


def test_an_image_that_went_elsewhere_is_found_with_its_new_folder(demo: Path, tmp_path: Path) -> None:
    folder = shards_of(tmp_path, demo / "tokenizer", (280, 280), [[40, 60, 100, 80]])
    (tmp_path / "images").rename(tmp_path / "moved")
    message = mistake("show", folder, "--out", tmp_path / "drawn.png")
    assert "ImageError" in message
    assert str(tmp_path / "images" / "a.png") in message
    result = invoke("show", folder, "--out", tmp_path / "new folder" / "drawn.png", "--images", tmp_path / "moved")
    assert result.exit_code == 0
    assert (tmp_path / "new folder" / "drawn.png").exists()


def test_a_picture_that_cannot_be_written_is_a_mistake(demo: Path, tmp_path: Path) -> None:
    folder = shards_of(tmp_path, demo / "tokenizer", (280, 280), [[40, 60, 100, 80]])
    (tmp_path / "a file").touch()
    assert "while writing" in mistake("show", folder, "--out", tmp_path / "a file" / "drawn.png")
    assert "while writing" in mistake("show", folder, "--out", tmp_path)


def test_labels_are_printed_as_they_are_and_obeyed_by_no_terminal(demo: Path, tmp_path: Path) -> None:
    labels = ("[red]cat[/red]", "\x1b[31mdog\x1b[0m\x1b]0;owned\x07", "[/]", "a\rb\x08", "🙂 猫 [link=http://x]")
    boxes = [[10 + 50 * number, 20, 40, 50] for number in range(len(labels))]
    folder = shards_of(tmp_path, demo / "tokenizer", (280, 280), boxes, labels, rules={"control_characters": "keep"})
    for environment in ({}, {"FORCE_COLOR": "1"}):
        done = CliRunner(env=environment).invoke(main, ["show", str(folder), "--no-picture"])
        assert done.exit_code == 0
        for label in ("[red]cat[/red]", "[/]", "🙂 猫 [link=http://x]"):
            assert f"] {label}" in done.output, "below the answer, decoded"
        for control in ("\x1b[31m", "\x1b]0;", "\x07", "\x08", "a\rb"):
            assert control not in done.output
    assert "\\x1b[31mdog" in invoke("show", folder, "--no-picture").stdout


def test_several_images_are_drawn_side_by_side(demo: Path, tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (280, 140))
    picture(tmp_path / "b.png", (140, 280))
    row = {"id": "x", "images": ["a.png", "b.png"], "dialogue": [{"question": "<image><image>Same?", "answer": "No."}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run(config(tmp_path / "rows.jsonl", tmp_path / "out", demo / "tokenizer", reader="jsonl"))
    assert invoke("show", tmp_path / "out", "--out", tmp_path / "drawn.png").exit_code == 0
    drawn = Image.open(tmp_path / "drawn.png")
    assert (drawn.width, drawn.height) == (280 + 140 + 2 * 4, 280)


# ---- demo


DEMO = {"images", "instances.json", "captions.json", "tokenizer", "base-qwen2_vl", "base-qwen2_5_vl", "base-qwen3_vl"}


def test_the_demo_is_drawn_twice_the_same(tmp_path: Path) -> None:
    assert invoke("demo", "--out", tmp_path / "demo", "--images", 3).exit_code == 0
    before = contents(tmp_path / "demo")
    assert {name.partition("/")[0] for name in before} == DEMO
    assert invoke("demo", "--out", tmp_path / "demo", "--images", 3).exit_code == 0
    assert contents(tmp_path / "demo") == before


def test_the_demos_boxes_are_where_its_shapes_are(demo: Path) -> None:
    source = json.loads((demo / "instances.json").read_bytes())
    files = {image["id"]: image["file_name"] for image in source["images"]}
    for box in source["annotations"]:
        x, y, width, height = box["bbox"]
        with Image.open(demo / "images" / files[box["image_id"]]) as scene:
            background = scene.getpixel((0, 0)) if x > 0 and y > 0 else None
            middle = scene.getpixel((x + width // 2, y + height // 2))
            assert background is None or middle != background


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["thesis.tex"], id="a file"),
        pytest.param(["instances.json"], id="annotations of somebody"),
        pytest.param(["instances.json", "images/a.jpg"], id="a data set of somebody"),
        pytest.param(["instances.json", "captions.json", "tokenizer/tokenizer.json", "images/a.jpg"], id="a data set with a tokenizer"),
    ],
)
def test_a_demo_overwrites_nothing_of_somebody_else(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    message = mistake("demo", "--out", tmp_path, "--images", 2)
    assert "a folder with other files" in message
    assert {name: data.decode() for name, data in contents(tmp_path).items()} == dict.fromkeys(names, "precious")


@pytest.mark.parametrize("out", ["a file", "a file/below"])
def test_a_demo_in_the_place_of_a_file_is_a_mistake(tmp_path: Path, out: str) -> None:
    (tmp_path / "a file").write_text("precious")
    assert "a file" in mistake("demo", "--out", tmp_path / out, "--images", 2)
    assert (tmp_path / "a file").read_text() == "precious"


@pytest.mark.parametrize("num_images", [0, -1])
def test_a_demo_has_at_least_one_image(tmp_path: Path, num_images: int) -> None:
    mistake("demo", "--out", tmp_path / "demo", f"--images={num_images}")
    assert not (tmp_path / "demo").exists()
