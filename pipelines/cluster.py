"""The connection to Ray: a cluster that the environment names, else one on this machine. Ray is imported only when it is asked for."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from boxcar.schemas.errors import ConfigError


@contextmanager
def connected() -> Iterator[dict[str, float]]:
    """Ray for the time of the block: the cluster that the environment names, else one on this machine. Gives its resources.

    Raises ConfigError where no cluster answers.
    """
    import ray  # noqa: PLC0415

    started_here = not ray.is_initialized()
    if started_here:
        address = os.environ.get("RAY_ADDRESS", "local")
        dashboard = False if address == "local" else None
        try:
            _require_listener(address)
            ray.init(address=address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
        except OSError as error:
            raise ConfigError(
                "RAY_ADDRESS",
                found=f"{address}, where no cluster answers ({error})",
                expected="the address of a running one, or nothing",
                fix="`ray start --head` prints it; a cluster that wants a token needs RAY_AUTH_MODE=token here, too.",
            ) from error
    try:
        yield ray.cluster_resources()
    finally:
        if started_here:
            ray.shutdown()


def _require_listener(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray itself would try for many minutes. Other addresses (auto, local) Ray finds."""
    host, _, port = address.rpartition(":")
    if "://" not in address and host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
