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
    """Loading takes processes of their own: it is for the tests of the round trip."""
    monkeypatch.setattr(upload, "available_memory", lambda: 0)
    monkeypatch.setattr(upload, "load_in_clean_process", lambda *arguments, **options: {})


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small model's."""
    make_model(tmp_path / "model")
    return tmp_path / "model"
