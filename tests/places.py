"""Where tests find things: the checkout, and the reference data that lies beside it on the maintainers' machines."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
"""Numbers that other projects' code gave; tests/golden/README.md says which."""
SHARED = ROOT.parent / "shared"
"""Photographs and a published tokenizer. Not part of the project: a test that needs them is skipped where they are missing."""
