"""What a command costs, as the benches print it."""

import sys

import pytest

from boxcar.tools.bench.measure import BOXCAR, run

SPIN = "import time\nend = time.process_time() + {s}\nwhile time.process_time() < end: pass\n"
CHILD = f"subprocess.Popen([sys.executable, '-c', {SPIN.format(s=0.6)!r}], start_new_session=True)"
ORPHAN = f"import subprocess, sys, time\n{CHILD}\ntime.sleep(1.5)"
"""A process that starts another and never waits for it, as Ray does with its servers."""


@pytest.mark.parametrize(("code", "least_s"), [(SPIN.format(s=0.4), 0.4), (ORPHAN, 0.5)], ids=["itself", "a child that nobody waits for"])
def test_every_process_counts(code: str, least_s: float) -> None:
    cost = run([sys.executable, "-c", code])
    assert cost.exit_code == 0
    assert least_s <= cost.cpu_s < least_s + 1.5


def test_boxcar_is_that_of_the_running_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert run([*BOXCAR, "--version"]).exit_code == 0
