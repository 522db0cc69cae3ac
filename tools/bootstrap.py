"""Set up and run, on a machine with nothing but Python and pip. Standard library only.

    python tools/bootstrap.py quickstart    a virtual environment in .venv; then `boxcar run quickstart`: convert, train, measure, a page
    python tools/bootstrap.py test          a virtual environment in .venv-test; lint, types, imports, unused code, documentation, tests

constraints.txt pins what was tested; the package itself states ranges.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIN_PYTHON = (3, 11)
BIN = "Scripts" if os.name == "nt" else "bin"


def run(*command: str) -> None:
    print(f"$ {' '.join(command)}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def environment(folder: Path, *requirements: str) -> Path:
    """Make the virtual environment, or bring it up to date. Returns its folder of programs."""
    if not (folder / "pyvenv.cfg").exists():
        print(f"making the virtual environment {folder.name}", flush=True)
        venv.create(folder, with_pip=True)
    programs = folder / BIN
    pip = (str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt")
    for requirement in requirements:
        run(*pip, *requirement.split())
    return programs


def quickstart() -> None:
    # torch first: on a machine without a GPU the pinned version is the CPU build, and nothing after it may choose another.
    programs = environment(ROOT / ".venv", "torch", "-e .[train,eval,audit]")
    run(str(programs / "boxcar"), "run", "quickstart")
    print(f"\nDone. Open the page. The command is {programs / 'boxcar'}; `boxcar --help` says what else there is.")


def test() -> None:
    programs = environment(ROOT / ".venv-test", "torch", "-e .[cluster,train,deepspeed,eval,audit,captions,docs,dev]")
    python = str(programs / "python")
    run(str(programs / "ruff"), "check", ".")
    run(str(programs / "ruff"), "format", "--check", ".")
    run(str(programs / "mypy"))
    run(python, "-m", "tools.floors")
    run(str(programs / "vulture"))
    run(python, "-m", "pytest")


def main() -> int:
    commands = {"quickstart": quickstart, "test": test}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print(__doc__)
        return 2
    if sys.version_info < MIN_PYTHON:
        print(f"found Python {sys.version.split()[0]}, expected 3.11 or newer")
        return 2
    try:
        commands[sys.argv[1]]()
    except subprocess.CalledProcessError as error:
        print(f"\nstopped: {' '.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
