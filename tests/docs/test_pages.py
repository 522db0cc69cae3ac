"""The documentation: the site builds, links lead somewhere, the notebook runs, the files for clusters are what they say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.schemas.workflow import Workflow
from boxcar.tools.cli import COMMANDS
from boxcar.tools.reference import configuration_page, families_table, python_reference
from tests.places import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
CLUSTERS = DOCS / "clusters"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = [target for target, _ in LINK.findall(page.read_text()) if not re.match(r"[a-z]+:", target)]
    generated = {"configuration.md"}
    assert [target for target in links if target.removeprefix("docs/") not in generated and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    commands = set(re.findall(r"^(?:\$ )?(?:ray job submit .* -- )?boxcar ([a-z-]+)", text, re.MULTILINE)) - {"--help"}
    assert commands <= set(COMMANDS)
    named = set(re.findall(r"`((?:pipelines|train|tools|schemas|tests|docs)/[\w./-]+)`", text))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def keys_of(model: type[BaseModel]) -> set[str]:
    keys = set(model.model_fields)
    for field in model.model_fields.values():
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys |= keys_of(candidate)
    return keys


def test_every_configuration_key_is_documented_with_a_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+? \| .+? \| (.*) \|$", configuration_page(), re.MULTILINE)
    assert {key for key, _ in rows} == keys_of(Workflow) - {"scenes", "convert", "train", "evaluate"}, "these are the chapters"
    assert [key for key, meaning in rows if not meaning.strip()] == []


def test_the_tables_of_the_code_are_complete() -> None:
    rows = {line.split("`")[1]: line for line in families_table().splitlines()[2:]}
    assert rows.keys() == FAMILIES.keys()
    assert all(rows[name].endswith(f"| {family.upstream} |") for name, family in FAMILIES.items())
    assert "## boxcar.load" in python_reference()
    assert "Nothing but the manifests is read here" in python_reference()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    commands = pytest.importorskip("mkdocs.commands.build", reason="pip install '.[docs]'")
    from mkdocs.config import load_config  # noqa: PLC0415  (an extra)

    commands.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    page = (tmp_path / "site/configuration/index.html").read_text()
    assert "use_rslora" in page
    assert "examples/coco" not in (tmp_path / "site/data/index.html").read_text(), "the example itself, not its path"


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "quickstart.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "committed without its outputs"
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"quickstart.ipynb, {cell['id']}", "exec"), names)
    output = capfd.readouterr().out
    assert "24 records" in output
    assert "3 of " in output, "the training has ended"


def test_the_files_for_clusters_are_what_their_programs_read() -> None:
    kuberay = yaml.safe_load((CLUSTERS / "kuberay-rayjob.yaml").read_text())
    assert (kuberay["apiVersion"], kuberay["kind"]) == ("ray.io/v1", "RayJob")
    groups = [kuberay["spec"]["rayClusterSpec"]["headGroupSpec"], *kuberay["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]} <= volumes
    sky = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    assert {"resources", "setup", "run", "num_nodes"} <= sky.keys()
    ray = yaml.safe_load((CLUSTERS / "ray-cluster.yaml").read_text())
    assert {"cluster_name", "provider", "auth", "head_start_ray_commands", "worker_start_ray_commands"} <= ray.keys()
    flows = yaml.safe_load((ROOT / "workflows.yaml").read_text())
    started = re.findall(r"boxcar train (\w+)", kuberay["spec"]["entrypoint"] + sky["run"])
    assert len(started) == 2
    assert set(started) <= flows.keys()


def test_the_dockerfile_keeps_the_usual_rules() -> None:
    lines = (CLUSTERS / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    bases = [rest for step, rest in steps if step == "FROM"]
    assert all(":" in base and not base.endswith(":latest") for base in bases)
    assert any(step == "USER" and rest != "root" for step, rest in steps)
    for step, rest in steps:
        if step == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists" in rest
        if step == "RUN" and "pip install" in rest:
            assert rest.count("pip install") == rest.count("--no-cache-dir")


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_hooks_need_no_network() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
