"""`boxcar run NAME`: the stages of a workflow in their order, and only those whose inputs or settings have changed.

    scenes ──> convert (also of the workflows that it needs) ──> audit ──> plan ──> train ──> evaluate ──> predict ──> page

Each stage knows by content whether it is done: a conversion by its annotations and settings, a run by the hash that names its folder, an
evaluation by the hash of weights, shards and settings, an audit by the manifest and the settings. A plan is so cheap that it is always
printed.
"""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import xxhash
from rich.console import Console
from rich.text import Text

from boxcar.schemas.errors import ConfigError
from boxcar.schemas.evaluation import ScenesConfig
from boxcar.schemas.manifest import MANIFEST_NAME
from boxcar.schemas.workflow import ConvertConfig, Workflow
from boxcar.tools.plain import visible
from boxcar.tools.workflows import load_any

Stage = Callable[[], str | None]
"""Does it and returns None, or returns why there was nothing to do."""


def run_workflow(path: Path, name: str, overrides: Sequence[str], view: Path | None) -> None:
    """Run every stage. overrides: `train.epochs=2`, `evaluate.max_samples=10` and so on, with the section's name."""
    console = Console(soft_wrap=True)
    workflow = load_any(path, name, overrides)
    others = {other: load_any(path, other, ()) for other in workflow.needs}
    if missing := [other for other, found in others.items() if found.convert is None]:
        raise ConfigError(f"{path}, {name}.needs", found=f"{', '.join(missing)} without a convert section", expected="one to run")
    stages: list[tuple[str, Stage]] = []
    if workflow.scenes:
        stages.append(("scenes", lambda scenes=workflow.scenes: _scenes(scenes)))  # type: ignore[misc]
    for other, one in [(name, workflow), *others.items()]:
        if one.convert:
            stages.append((f"convert {other}", lambda config=one.convert: _convert(config)))  # type: ignore[misc]
    if workflow.convert:
        stages.append(("audit", lambda: _audit(workflow, name, console)))
    if workflow.train:
        if workflow.evaluate:
            stages.append(("check", lambda: _check(workflow, name)))
        stages.append(("plan", lambda: _plan(workflow, name)))
        stages.append(("train", lambda: _train(workflow, name)))
    if workflow.evaluate:
        stages.append(("evaluate", lambda: _evaluate(workflow, name, console)))
        if workflow.scenes:
            stages.append(("predict", lambda: _predict(workflow, name, console)))
        stages.append(("page", lambda: _page(workflow, name, view, console)))
    begin = time.perf_counter()
    for number, (title, stage) in enumerate(stages, start=1):
        console.print(Text(f"[{number}/{len(stages)}] {title}", style="bold"))
        start = time.perf_counter()
        skipped = stage()
        seconds = time.perf_counter() - start
        console.print(Text(f"        skipped: {skipped}" if skipped else f"        {seconds:.0f} s", style="dim"))
    console.print(Text(f"All of {name} in {time.perf_counter() - begin:.0f} s."))


# Each stage imports what it needs when its turn comes: the first lines appear at once.
# ruff: noqa: PLC0415


def _scenes(config: ScenesConfig) -> str | None:
    from boxcar.tools.quickstart.scene_files import draw, is_drawn

    if is_drawn(config):
        return "drawn with these settings"
    draw(config)
    return None


def _convert(config: ConvertConfig) -> str | None:
    from boxcar.tools.converting.progress import convert_with_bar

    manifest, was_complete = convert_with_bar(config)
    if was_complete:
        return "same annotations, same settings"
    counts = manifest.counts
    Console(soft_wrap=True).print(
        Text(f"        {counts.records_read:,} records, {counts.num_rejected:,} rejected: {counts.rows_written:,} rows in {config.output}")
    )
    return None


def _audit(workflow: Workflow, name: str, console: Console) -> str | None:
    from importlib.util import find_spec

    from boxcar.tools.auditing.command import audit_with_progress, write_results
    from boxcar.tools.auditing.result import RESULT_NAME
    from boxcar.tools.auditing.run import Request
    from boxcar.tools.auditing.tables import headline

    request = Request()
    folder = request.work / name
    done, audit = folder / ".fingerprint", folder / RESULT_NAME
    fingerprint = _audit_fingerprint(workflow)
    # The result's own hash stands there, too: `boxcar audit` with other options writes to the same place.
    if done.is_file() and audit.is_file() and done.read_text() == fingerprint + xxhash.xxh3_128_hexdigest(audit.read_bytes()):
        return f"same annotations, same settings: {folder}"
    shards = _audited_shards(workflow)
    # Of several sets that are trained on together the shards are audited: the annotations of one are not what an epoch costs.
    result = audit_with_progress(shards if len(shards) > 1 else name, workflow, request)
    page = write_results(result, folder, page=find_spec("plotly") is not None)
    for family in result.families:
        console.print(Text(f"        {visible(headline(family))}"))
    tables = f"boxcar audit {' '.join(map(str, shards)) if len(shards) > 1 else name}"
    console.print(Text(f"        {f'open {page}' if page else folder}; the tables: {tables}"))
    done.write_text(fingerprint + xxhash.xxh3_128_hexdigest(audit.read_bytes()))
    return None


def _audit_fingerprint(workflow: Workflow) -> str:
    """Of what was converted (its manifest knows the annotations by content), and of the settings that an audit reads."""
    assert workflow.convert is not None
    manifests = b"".join((folder / MANIFEST_NAME).read_bytes() for folder in _audited_shards(workflow))
    train = workflow.train.model_dump_json() if workflow.train else ""
    return xxhash.xxh3_128_hexdigest("|".join([version("boxcar-vl"), workflow.convert.model_dump_json(), train]).encode() + manifests)


def _audited_shards(workflow: Workflow) -> list[Path]:
    assert workflow.convert is not None
    return [Path(folder) for folder in (workflow.train.shards if workflow.train else ()) or (workflow.convert.output,)]


def _check(workflow: Workflow, name: str) -> str | None:
    """What `evaluate` would refuse after the training, refused before it."""
    from boxcar.train.job import complete_run, resolve
    from boxcar.train.planning.index import load_manifest
    from boxcar.train.scoring.evaluate import require_unseen, ways_to_ask

    config = workflow.evaluate
    assert config is not None
    if config.adapter:
        return "evaluate.adapter names another training"
    if complete_run(resolve(workflow), name) is not None:
        return "trained already"
    trained = {folder: load_manifest(folder) for folder in resolve(workflow).shards}
    contract = next(iter(trained.values())).contract
    for folder in config.shards:
        ways_to_ask(config, contract, load_manifest(folder).contract, [folder])
    said = require_unseen(config, {folder: manifest.manifest_xxh3_128 for folder, manifest in trained.items()})
    Console(soft_wrap=True).print(Text(f"        held-out shards are of the frame that is trained; {said}"))
    return None


def _plan(workflow: Workflow, name: str) -> str | None:
    from boxcar.tools.training.plan_report import report

    report(workflow, name, 0, as_json=False, plot=None)
    return None


def _train(workflow: Workflow, name: str) -> str | None:
    from boxcar.tools.training.train import train_with_progress
    from boxcar.train.job import complete_run, resolve, run_uri
    from boxcar.train.running.run_folder import RUN, RunFolder

    config = resolve(workflow)
    if state := complete_run(config, name):
        return f"finished in {state['folder']}"
    train_with_progress(workflow, name, resume=RunFolder(run_uri(config, name)).read(RUN) is not None, as_json=False)
    return None


def _evaluate(workflow: Workflow, name: str, console: Console) -> str | None:
    from boxcar.tools.measuring.evaluate import adapter_of, measure, print_results

    assert workflow.evaluate is not None
    results, known = measure(workflow.evaluate, adapter_of(workflow, name))
    print_results(results, console)
    return "same weights, shards and settings" if known else None


def _predict(workflow: Workflow, name: str, console: Console) -> str | None:
    from boxcar.tools.measuring.evaluate import adapter_of
    from boxcar.tools.measuring.predict import predict_and_draw
    from boxcar.tools.quickstart.scene_files import new_images
    from boxcar.train.answering.predict_job import PredictSpec

    assert workflow.scenes is not None
    assert workflow.evaluate is not None
    adapter = adapter_of(workflow, name)
    spec = PredictSpec(adapter, max_new_tokens=workflow.evaluate.max_new_tokens, use_gpu=workflow.evaluate.use_gpu)
    predict_and_draw(spec, new_images(workflow.scenes), console)
    return None


def _page(workflow: Workflow, name: str, view: Path | None, console: Console) -> str | None:
    from boxcar.tools.measuring.evaluate import adapter_of, measure
    from boxcar.tools.pages.view import write_page

    assert workflow.evaluate is not None
    results, known = measure(workflow.evaluate, adapter_of(workflow, name))
    page = (view or Path(results["folder"]) / "view") / "index.html"
    if known and view is None and page.is_file():
        return f"there already: {page}"
    page = write_page(results["folder"], view)
    console.print(Text(f"        open {page}"))
    return None
