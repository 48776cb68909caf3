from collections.abc import Iterator

import pytest

from .common import Uploader
from .hub_server import HubServer


@pytest.fixture(scope="session")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def uploader(server, tmp_path_factory) -> Iterator[Uploader]:
    uploader = Uploader(server, tmp_path_factory.mktemp("uploader"))
    yield uploader
    uploader.close()


@pytest.fixture
def hub(server) -> Iterator[HubServer]:
    """The server, holding nothing."""
    server.repositories.clear()
    server.faults.clear()
    server.log.clear()
    server.parts.clear()
    server.multipart_size = 10**9
    yield server
