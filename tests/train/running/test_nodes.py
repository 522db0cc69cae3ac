"""What a node says of itself, and where two nodes count as different."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from boxcar.schemas.errors import TrainingError
from boxcar.schemas.training import TrainConfig
from boxcar.train.running import nodes
from boxcar.train.running.nodes import (
    ABSENT,
    Needs,
    NodeFacts,
    alike,
    all_problems,
    code_digest,
    differences,
    hosts_with,
    node_facts,
    require_alike,
    survey,
)
from tests.small_sets import copy_demo, demo_config, run


@pytest.fixture(scope="module")
def scenes(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_demo(demo, tmp_path_factory.mktemp("nodes") / "demo")
    run(demo_config(folder, folder / "shards"))
    return folder


def node(host: str = "a", **same: str) -> NodeFacts:
    return NodeFacts(host, {"torch": "2.9.0", **same}, {"polars": "1.0"}, [])


# ---- between nodes

CASES = [
    pytest.param("python", "3.11.7", "3.11.7", False, id="alike"),
    pytest.param("python", "3.11.7", "3.12.1", True, id="python"),
    pytest.param("python", "3.11.7", "3.11.9", True, id="python's last part: Ray refuses it, too"),
    pytest.param("torch", "2.9.0+cu126", "2.9.0+cu128", True, id="torch's build"),
    pytest.param("torch's cuda", "12.6", "12.8", True, id="cuda"),
    pytest.param("nccl", "2.21.5", "2.27.3", True, id="nccl"),
    pytest.param("transformers", "5.23.0", "5.17.0", True, id="transformers"),
    pytest.param("peft", "0.17.0", "0.17.1", True, id="peft"),
    pytest.param("deepspeed", "0.19.8", ABSENT, True, id="deepspeed on one alone"),
    pytest.param("pillow", "11.0.0", "11.3.0", False, id="pillow's minor version"),
    pytest.param("pillow", "11.3.0", "12.0.0", True, id="pillow's major version"),
    pytest.param("pillow", "11.3.0", ABSENT, True, id="no pillow"),
    pytest.param("numpy", "2.4.6", "1.26.4", True, id="numpy's major version"),
    pytest.param("nvidia driver", "550.54.15", "570.86.10", True, id="driver"),
    pytest.param("shards /data/shards", "00ff", "00fe", True, id="shards"),
    pytest.param("base /models/qwen", "00ff", "not there", True, id="base"),
    pytest.param("boxcar's code", "00ff", "00fe", True, id="two checkouts of one version"),
]


@pytest.mark.parametrize(("fact", "here", "there", "different"), CASES)
def test_what_counts_as_different(fact: str, here: str, there: str, different: bool) -> None:
    found = differences([node("a", **{fact: here}), node("b", **{fact: there})])
    low, high = sorted([(here, "a"), (there, "b")])
    assert found == ([f"{fact}: {low[0]} on {low[1]}; {high[0]} on {high[1]}"] if different else [])


def test_a_fact_that_one_node_lacks_is_a_difference() -> None:
    """A node without a GPU among others has no driver and no nccl to compare."""
    assert differences([node("a", nccl="2.21.5"), node("b")]) == ["nccl: 2.21.5 on a; not installed on b"]


def test_what_people_only_look_at_may_differ() -> None:
    assert differences([node("a"), replace(node("b"), about={"polars": "2.0", "gpus": "H100"})]) == []


def test_many_hosts_are_not_all_named() -> None:
    many = [node(f"n{number}", peft="0.17.0") for number in range(9)]
    assert differences([*many, node("odd", peft="0.18.0")]) == ["peft: 0.17.0 on n0, n1, n2, n3 and 5 more; 0.18.0 on odd"]
    assert hosts_with(many, "polars", "1.0") == "n0, n1, n2, n3 and 5 more"


def test_a_node_without_an_answer_is_a_problem_and_not_a_difference() -> None:
    silent = NodeFacts("b", {}, {}, ["no answer within 180 s"])
    assert all_problems([node("a"), silent]) == ["b: no answer within 180 s"]


def test_training_is_refused_with_all_that_is_wrong() -> None:
    require_alike([node("a"), node("b")])
    with pytest.raises(TrainingError) as caught:
        require_alike([node("a"), replace(node("b", peft="0.1"), same={"torch": "2.8.0"}, problems=["/out: it is not shared storage"])])
    assert "the cluster's 2 nodes" in str(caught.value)
    assert "\n  torch: 2.8.0 on b; 2.9.0 on a\n  b: /out: it is not shared storage\n" in str(caught.value)
    assert "boxcar doctor NAME --cluster" in str(caught.value)


@pytest.mark.parametrize(("fact", "version", "counts"), [("pillow", "11.3.0", "11"), ("torch", "2.9.0", "2.9.0"), ("other", "1.2", "1.2")])
def test_how_much_of_a_version_counts(fact: str, version: str, counts: str) -> None:
    assert alike(fact, version) == counts


# ---- on a node


def test_a_node_says_what_it_runs_on(scenes: Path) -> None:
    import peft  # noqa: PLC0415
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    facts = node_facts(Needs((str(scenes / "shards"),), str(scenes / "base-qwen2_5_vl")))
    assert facts.same["torch"] == torch.__version__
    assert facts.same["transformers"] == transformers.__version__
    assert facts.same["peft"] == peft.__version__
    assert facts.same["torch's cuda"] == str(torch.version.cuda)
    assert len(facts.same[f"shards {scenes / 'shards'}"]) == 32
    assert len(facts.same[f"base {scenes / 'base-qwen2_5_vl'}"]) == 32
    assert facts.problems == []
    assert differences([facts, facts]) == []


@pytest.mark.parametrize(
    ("script", "gpus", "driver"),
    [
        pytest.param("echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15'", "NVIDIA H100 80GB HBM3 (81559 MiB)", "550.54.15", id="one"),
        pytest.param(
            "echo 'NVIDIA L4, 23034 MiB, 570.86.10'; echo 'NVIDIA L4, 23034 MiB, 570.86.10'; echo 'NVIDIA A100, 40960 MiB, 570.86.10'",
            "2 x NVIDIA L4 (23034 MiB), NVIDIA A100 (40960 MiB)",
            "570.86.10",
            id="several",
        ),
        pytest.param("exit 9", "none", None, id="a driver that does not answer"),
        pytest.param("true", "none", None, id="no device"),
        pytest.param(None, "none", None, id="no nvidia-smi"),
    ],
)
def test_gpus_and_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, gpus: str, driver: str | None) -> None:
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = node_facts(Needs())
    assert facts.about["gpus"] == gpus
    assert facts.same.get("nvidia driver") == driver


def test_the_code_has_a_digest_that_a_byte_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("schemas", "train", "tools"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "one.py").write_text("1\n")
    monkeypatch.setattr(nodes, "__file__", str(tmp_path / "train/running/nodes.py"))
    before = code_digest()
    (tmp_path / "tools/one.py").write_text("2\n")
    assert code_digest() == before, "what people look at takes no part in training"
    (tmp_path / "schemas/one.py").write_text("2\n")
    assert code_digest() != before


DAMAGES = [
    pytest.param(lambda folder: (folder / "shards/manifest.json").unlink(), r"manifest\.json: found no such file", id="no manifest"),
    pytest.param(
        lambda folder: (folder / "shards/rows-00000.arrow").unlink(), r"rows-00000\.arrow: found 0 bytes", id="a shard is missing"
    ),
    pytest.param(
        lambda folder: cut(folder / "shards/rows-00001.arrow"), r"rows-00001\.arrow: found \d+ bytes, expected", id="half a shard"
    ),
    pytest.param(lambda folder: shutil.rmtree(folder / "images"), "its images in .*/images are not seen here", id="no images"),
    pytest.param(
        lambda folder: (folder / "base-qwen2_5_vl/config.json").unlink(), r"train\.base: .*config\.json is not there", id="no base"
    ),
]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_what_a_node_does_not_see(demo: Path, tmp_path: Path, damage: Any, message: str) -> None:
    folder = copy_demo(demo, tmp_path / "demo")
    run(demo_config(folder, folder / "shards"))
    needs = Needs((str(folder / "shards"),), str(folder / "base-qwen2_5_vl"))
    before = node_facts(needs)
    damage(folder)
    after = node_facts(needs)
    (problem,) = after.problems
    assert before.problems == []
    assert re.search(message, problem)
    different = [fact for fact in before.same if str(folder) in fact and before.same[fact] != after.same[fact]]
    assert len(different) == ("images" not in message)


def test_storage_that_is_not_shared(tmp_path: Path) -> None:
    token = tmp_path / "runs/.doctor-0"
    (problem,) = node_facts(Needs(token=str(token))).problems
    assert problem == f"{tmp_path / 'runs'}: what the driver writes there is not seen here: it is not shared storage"
    token.parent.mkdir()
    token.touch()
    assert node_facts(Needs(token=str(token))).problems == []
    assert node_facts(Needs(token=f"file://{token}")).problems == []


def test_needs_are_training_and_validation_shards_once(tmp_path: Path) -> None:
    config = TrainConfig.model_validate({"output": "runs", "shards": ["a", "b"], "base": "/base", "validation": {"shards": ["b", "c"]}})
    assert Needs.of(config) == Needs(("a", "b", "c"), "/base")
    assert Needs.of(None) == Needs()
    assert "base a/hub-id" not in node_facts(Needs(base="a/hub-id")).same


# ---- with Ray


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    import ray  # noqa: PLC0415  (seconds, and only here)
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_survey_asks_every_node(two_nodes: None, scenes: Path, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(
        {"output": str(tmp_path / "runs"), "shards": [str(scenes / "shards")], "base": str(scenes / "base-qwen2_5_vl")}
    )
    found = survey(config)
    assert sorted(facts.resources["CPU"] for facts in found) == [1, 2]
    assert len({facts.host for facts in found}) == 2, "two nodes of one machine are told apart"
    here = node_facts(Needs.of(config))
    assert [facts.same for facts in found] == [here.same, here.same]
    assert all_problems(found) == []
    assert list((tmp_path / "runs").iterdir()) == [], "the token is gone"


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_that_fail_or_wait_too_long_say_so(two_nodes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(_: dict[str, object]) -> dict[str, object]:
        import time  # noqa: PLC0415  (on the node)

        time.sleep(20)
        return {}

    # A function by its name, as `_look` is, of a module that no worker finds: as where Boxcar is not installed.
    monkeypatch.setattr(nodes, "_look", node)
    assert [facts.problems for facts in survey(None)] == [["no answer: ModuleNotFoundError: No module named 'test_nodes'"]] * 2
    monkeypatch.setattr(nodes, "_look", sleep)
    monkeypatch.setattr(nodes, "SECONDS_TO_ANSWER", 0.5)
    assert [facts.problems for facts in survey(None)] == [["no answer within 0.5 s"]] * 2


@pytest.mark.ray
@pytest.mark.slow
def test_an_output_that_may_not_be_written(two_nodes: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = TrainConfig.model_validate({"output": str(tmp_path / "file/runs"), "shards": ["s"]})
    with pytest.raises(TrainingError, match=r"train\.output, .*file/runs: found .*expected a folder or bucket that may be written"):
        survey(config)
