"""Settings and little real things that every test may use."""

from pathlib import Path

import pytest
from hypothesis import settings

from boxcar.tools.quickstart.demo import write_demo

# Speed is checked by benchmarks, never by tests: these machines are shared.
settings.register_profile("boxcar", deadline=None, print_blob=True)
settings.load_profile("boxcar")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set that `boxcar demo` draws, of 12 scenes. To be read only."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    write_demo(folder, num_images=12)
    return folder
