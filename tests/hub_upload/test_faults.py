"""What goes wrong between here and the Hub: success after another try, or one clear error and nothing half-made."""

import hashlib
import re

import pytest

from .common import environment, make_model, run
from .hub_server import Fault


pytestmark = pytest.mark.once

LFS_UPLOAD, COMMIT, DOWNLOAD = "^/upload/", "/commit/", "^/cdn/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, shards=4)
    return folder


def one_line_error(outcome) -> str:
    """The error, after checking that it is one line and no traceback."""
    assert outcome.code == 1, outcome.output
    assert "Traceback" not in outcome.output, outcome.output
    errors = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and outcome.output.strip().endswith(errors[0]), outcome.output
    return errors[0]


def is_empty(hub, name="someone/t6") -> bool:
    """Whether the repository, if it is there at all, holds nothing that could be loaded."""
    return name not in hub.repositories or set(hub.repositories[name].files()) == {".gitattributes"}


def is_whole(hub, folder, name="someone/t6", revision="main") -> bool:
    files = hub.repositories[name].files(revision)
    return all(files.get(path.name) == path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/api/repos/create", status=500),
        Fault("POST", "/preupload/", status=503),
        Fault("POST", "/objects/batch", status=500),
        Fault("PUT", LFS_UPLOAD, status=500),
        Fault("PUT", LFS_UPLOAD, drop="request"),
        Fault("POST", COMMIT, status=500),
        Fault("POST", COMMIT, drop="request"),
        Fault("POST", COMMIT, drop="answer"),  # the commit was made, and who asked for it does not know
        Fault("GET", "/tree/", status=500),
        Fault("GET", "/tree/", drop="response"),
        Fault("GET", DOWNLOAD, status=500),
        Fault("GET", DOWNLOAD, drop="response"),
        Fault("GET", DOWNLOAD, corrupt=True),
        Fault("GET", "/api/whoami-v2", status=429, headers={"Retry-After": "17"}),
        Fault("POST", "/api/repos/create", status=429, headers={"Retry-After": "17"}),
        Fault("POST", "/objects/batch", status=429, headers={"Retry-After": "17"}),
        Fault("POST", COMMIT, status=429, headers={"Retry-After": "17"}),
    ],
    ids=lambda fault: f"{fault.method} {fault.path} {fault.status or fault.drop or 'corrupt'}",
)
def test_passing_faults_end_in_success(hub, uploader, folder, fault):
    hub.faults.append(fault)
    outcome = uploader(folder, "someone/t6")
    assert fault.count == 1, hub.log
    assert outcome.code == 0 and "every file is the same" in outcome.output, outcome.output
    assert is_whole(hub, folder)
    titles = [commit.title for commit in hub.repositories["someone/t6"].commits.values()]
    assert len(titles) == 2, titles  # the repository's first commit, and one of ours
    waits = [float(seconds) for seconds in re.findall(r"waits ([\d.]+) s", outcome.output)]
    assert fault.corrupt or fault.drop == "response" or waits
    assert fault.status != 429 or any(seconds >= 17 for seconds in waits), waits


@pytest.mark.parametrize(
    "fault, message",
    [
        (Fault("GET", "/api/whoami-v2", status=401), "signing in: 401: .* does not accept the token"),
        (Fault("POST", "/api/repos/create", status=403), "creating someone/t6: 403: the token may not do this"),
        (Fault("POST", "/api/repos/create", status=404), "creating someone/t6: 404: "),
        (Fault("GET", "/api/models/", status=404), "looking at someone/t6: 404: "),
        (Fault("POST", "/preupload/", status=403), "uploading: 403: the token may not do this with someone/t6"),
        (Fault("POST", COMMIT, status=401), "uploading: 401: "),
        (Fault("POST", COMMIT, status=403), "uploading: 403: "),
        (Fault("POST", COMMIT, status=409), "uploading: 409: someone/t6 was changed by another"),
        (
            Fault("POST", COMMIT, status=429, headers={"Retry-After": "3600"}),
            "uploading: 429: .* wants fewer requests",
        ),
    ],
    ids=lambda value: f"{value.method} {value.path} {value.status}" if isinstance(value, Fault) else "",
)
def test_lasting_faults_end_in_one_clear_error(hub, uploader, folder, fault, message):
    fault.times = 1000
    hub.faults.append(fault)
    assert re.search(message, one_line_error(uploader(folder, "someone/t6")))
    assert is_empty(hub)
    hub.faults.clear()
    hub.log.clear()
    uploaded = len(hub.repositories["someone/t6"].lfs) if "someone/t6" in hub.repositories else 0
    assert uploader(folder, "someone/t6").code == 0 and is_whole(hub, folder)
    assert len(hub.requests("PUT", LFS_UPLOAD)) == 4 - uploaded  # the second run goes on where the first stopped


def test_a_card_that_the_hub_refuses(hub, uploader, folder):
    error = one_line_error(uploader(folder, "someone/t6", "--license", "none-at-all"))
    assert 'Invalid metadata in README.md. - "license" must be one of' in error
    assert is_empty(hub)


def test_a_server_that_stays_away(hub, uploader, folder):
    """For longer than the client tries, in the middle of one shard: the others are not sent again."""
    third = hashlib.sha256(sorted(folder.glob("*.safetensors"))[2].read_bytes()).hexdigest()
    hub.faults.append(Fault("PUT", third, times=1000, drop="request"))
    assert "uploading: no connection to" in one_line_error(uploader(folder, "someone/t6"))
    assert is_empty(hub) and len(hub.repositories["someone/t6"].lfs) == 3
    hub.faults.clear()
    hub.log.clear()
    assert uploader(folder, "someone/t6").code == 0
    assert len(hub.requests("PUT", LFS_UPLOAD)) == 1 and is_whole(hub, folder)


@pytest.mark.parametrize("how", [{"corrupt": True}, {"drop": "response"}], ids=str)
def test_downloads_that_stay_damaged(hub, uploader, folder, how):
    hub.faults.append(Fault("GET", DOWNLOAD, times=10_000, **how))
    error = one_line_error(uploader(folder, "someone/t6"))
    assert re.search("arrives damaged at each download" if "corrupt" in how else "no connection to", error)
    assert re.search("commit [0-9a-f]{40} is on the Hub, and could not be verified", error)
    assert is_whole(hub, folder)  # what the Hub holds is complete


def test_a_card_that_cannot_be_read_is_not_replaced(hub, uploader, folder):
    """One that was edited on the Hub: it is asked for again, and if it cannot be had, nothing is pushed."""
    assert uploader(folder, "someone/t6").code == 0
    repository = hub.repositories["someone/t6"]
    repository.change(**{"README.md": repository.files()["README.md"].replace(b"# t6\n", b"# t6\n\nEdited.\n")})
    before = repository.files()
    hub.faults.append(Fault("HEAD", "README.md", times=1000, drop="request"))
    assert "looking at someone/t6: no connection to" in one_line_error(uploader(folder, "someone/t6"))
    assert repository.files() == before
    hub.faults[0].times = 1
    assert uploader(folder, "someone/t6", "--license", "mit").code == 0 and hub.faults[0].times == 0
    card = repository.files()["README.md"]
    assert b"Edited." in card and b"license: mit" in card


def test_an_existing_model_stays_until_the_new_one_is_complete(hub, uploader, folder, tmp_path):
    make_model(tmp_path, seed=1)
    assert uploader(tmp_path, "someone/t6").code == 0
    before = hub.repositories["someone/t6"].files()
    hub.faults.append(Fault("POST", COMMIT, times=1000, status=403))
    one_line_error(uploader(folder, "someone/t6"))
    assert hub.repositories["someone/t6"].files() == before


def test_two_at_once(hub, uploader, folder):
    """Another pushes between our look at the repository and our commit: theirs is not lost, and nothing is mixed."""

    def push_theirs():
        hub.repositories["someone/t6"].change(**{"theirs.txt": b"theirs"})

    hub.faults.append(Fault("POST", "/objects/batch", action=push_theirs))
    error = one_line_error(uploader(folder, "someone/t6"))
    assert "uploading: 412: someone/t6 was changed by another at the same time: run again" in error
    assert set(hub.repositories["someone/t6"].files()) == {".gitattributes", "theirs.txt"}
    assert uploader(folder, "someone/t6").code == 0
    assert is_whole(hub, folder) and "theirs.txt" in hub.repositories["someone/t6"].files()


def test_a_pull_that_breaks_leaves_nothing_that_loads(hub, uploader, folder, tmp_path):
    """Plain Transformers, and its cache: broken connections are mended, and a broken shard never enters the cache."""
    assert uploader(folder, "someone/t6").code == 0
    code = """if True:
        import time
        time.sleep = lambda seconds: None
        from transformers import AutoModelForCausalLM
        for local in (False, True):
            try:
                AutoModelForCausalLM.from_pretrained("someone/t6", trust_remote_code=True, local_files_only=local)
                print("the model is there")
            except Exception as error:
                print(f"{type(error).__name__}: {error}")"""
    env = environment(hub, tmp_path / "home")
    hub.faults.append(Fault("GET", DOWNLOAD, times=10_000, drop="response"))
    outcome = run(code, env=env, cwd=tmp_path)  # what is there after the first try does not load as half a model
    assert outcome.code == 0 and "the model is there" not in outcome.output, outcome.output
    shards = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    cached = {path.name for path in (tmp_path / "home").rglob("blobs/*")}
    assert cached and not [name for name in cached if name in shards or "incomplete" in name]

    hub.faults[0].times = 2
    outcome = run(code, env=env, cwd=tmp_path)
    assert outcome.output.count("the model is there") == 2 and hub.faults[0].times == 0, outcome.output


def test_a_damaged_pull_is_found_by_the_command_in_the_card(hub, uploader, folder, tmp_path):
    """The client compares sizes, not hashes: a card says how to compare those."""
    assert uploader(folder, "someone/t6").code == 0
    card = hub.repositories["someone/t6"].files()["README.md"].decode()
    assert "hf cache verify someone/t6 --revision REVISION" in card
    commit = hub.repositories["someone/t6"].refs["refs/heads/main"]
    code = """if True:
        import subprocess, sys
        from huggingface_hub import snapshot_download
        snapshot_download("someone/t6", revision=sys.argv[1])
        hf = sys.executable.rpartition("/")[0] + "/hf"
        sys.exit(subprocess.run([hf, "cache", "verify", "someone/t6", "--revision", sys.argv[1]]).returncode)"""
    assert run(code, commit, env=environment(hub, tmp_path / "whole"), cwd=tmp_path).code == 0
    hub.faults.append(Fault("GET", DOWNLOAD, corrupt=True))
    outcome = run(code, commit, env=environment(hub, tmp_path / "damaged"), cwd=tmp_path)
    assert outcome.code != 0 and ".safetensors" in outcome.output, outcome.output
