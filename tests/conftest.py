"""Settings and little real things that every test may use."""

from hypothesis import settings

# Speed is checked by benchmarks, never by tests: these machines are shared.
settings.register_profile("boxcar", deadline=None, print_blob=True)
settings.load_profile("boxcar")
