"""The quick start in a shortened form: every stage, and none of them twice."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from boxcar.tools.cli import main
from tests.small_sets import demo_config

SHORT = (
    "scenes.num_train=20",
    "scenes.num_held_out=10",
    "convert.executor=inline",
    "train.placement.executor=inline",
    "train.max_steps=2",
    "evaluate.max_samples=4",
    "evaluate.max_new_tokens=64",
)


@pytest.mark.slow
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = CliRunner().invoke(main, ["run", "quickstart", *SHORT], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    assert "skipped" not in first.output
    (results,) = tmp_path.glob("runs/quickstart-*/evaluation-*/results.json")
    figures = json.loads(results.read_text())
    assert list(figures["arms"]) == ["adapter", "base"]
    assert list(figures["forgetting"]["arms"]) == ["adapter", "base"]
    page = Path(re.search(r"open (\S+index\.html)", first.output.replace("\n", ""))[1])  # type: ignore[index]
    assert page.is_file()
    assert len(list((tmp_path / "data" / "quickstart" / "new").glob("*-found.png"))) == 3
    assert json.loads(Path("audits/quickstart/audit.json").read_text())["families"][0]["family"] == "qwen3_vl"
    assert "nothing is lost" in first.output
    steps = {re.search(r"(\d+) steps of 2[ ,.]", first.output)[1], re.search(r"steps +(\d+) +of 2 packs", first.output)[1]}  # type: ignore[index]
    assert len(steps) == 1, "the audit counts with the workflow's own batch, as the plan does"
    second = CliRunner().invoke(main, ["run", "quickstart", *SHORT], catch_exceptions=False)
    assert second.exit_code == 0, second.output
    assert second.output.count("skipped: same annotations, same settings") == 6, "five conversions and the audit"
    assert "skipped: drawn with these settings" in second.output
    assert "skipped: finished in" in second.output
    assert "skipped: same weights, shards and settings" in second.output
    Path("audits/quickstart/audit.json").write_text("{}")  # as an audit with other options would
    third = CliRunner().invoke(main, ["run", "quickstart", *SHORT], catch_exceptions=False)
    assert third.output.count("skipped: same annotations, same settings") == 5
    assert json.loads(Path("audits/quickstart/audit.json").read_text())["families"]


def test_an_unknown_workflow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, ["run", "nothing"])
    assert found.exit_code == 2
    assert "no such file" in found.output


def test_what_evaluation_would_refuse_is_refused_before_training(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert = demo_config(demo, tmp_path / "shards").model_dump(mode="json")
    place = {"output": str(tmp_path / "runs"), "base": str(demo / "base-qwen2_5_vl"), "init": "random"}
    flow = {"convert": convert, "train": place, "evaluate": {"shards": [str(tmp_path / "shards")]}}
    (tmp_path / "workflows.yaml").write_text(yaml.safe_dump({"leaking": flow}))
    found = CliRunner().invoke(main, ["run", "leaking"])
    assert found.exit_code == 2
    assert "images that were trained on" in found.output
    assert not (tmp_path / "runs").exists(), "nothing was trained"


def test_every_command_knows_the_built_in_workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("convert", "plan", "train", "audit"):
        found = CliRunner().invoke(main, [command, "quickstart"])
        assert found.exit_code == 2
        assert "no workflow" not in found.output
        assert "data/quickstart" in found.output or "shards/quickstart" in found.output, found.output
