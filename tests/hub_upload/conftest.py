from collections.abc import Iterator
from pathlib import Path

import pytest

from hub import upload

from .common import Uploader, make_model
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


@pytest.fixture
def nothing_is_loaded(monkeypatch) -> None:
    """As on a machine on which the model does not fit into memory: loading is for the tests of the round trip."""
    monkeypatch.setattr(upload, "available_memory", lambda: 0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small model's."""
    make_model(tmp_path / "model")
    return tmp_path / "model"
