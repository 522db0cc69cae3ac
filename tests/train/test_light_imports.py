"""The loop and all it needs import where there is no ray, polars or deepspeed: GPU images that hold torch and transformers alone."""

import subprocess
import sys

import pytest

from tests.places import ROOT

ABSENT = ("ray", "polars", "deepspeed")
# What Python itself does for a module that must not be there: `import` raises, and importlib.util.find_spec, by which transformers and
# accelerate ask what is installed, finds nothing. (A finder on sys.meta_path that raises would break those questions, too.)
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))"
LIGHT = (
    "boxcar.train.running.loop",
    "boxcar.train.network.model",
    "boxcar.train.network.attention",
    "boxcar.train.network.objective",
    "boxcar.train.network.loss",
    "boxcar.train.data.collate",
    "boxcar.train.data.documents",
    "boxcar.train.network.flops",
    "boxcar.train.running.strategy",
    "boxcar.train.running.schedule",
    "boxcar.train.running.checkpoint",
    "boxcar.train.planning.plan",
    "boxcar.train.data.store",
    "boxcar.train.data.stream",
    "boxcar.train.worker",
    "boxcar.train.network.native.catalog",
    "boxcar.tools.bench.gpu",
)


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ABSENT)
def test_the_block_blocks(name: str) -> None:
    found = _python(f"{BLOCK}; import importlib.util; assert importlib.util.find_spec({name!r}) is None; import {name}")
    assert found.returncode == 1
    assert f"ModuleNotFoundError: import of {name} halted" in found.stderr


def test_the_loop_and_what_it_needs_import_without_them() -> None:
    steps = "; ".join(f"import {name}" for name in LIGHT)
    found = _python(f"{BLOCK}; {steps}; print(*(name for name in {ABSENT} if sys.modules[name]))")
    assert found.returncode == 0, found.stderr
    assert not found.stdout.strip()
