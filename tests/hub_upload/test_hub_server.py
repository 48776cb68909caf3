"""The server itself, as the client sees it: what the other tests rely on."""

import hashlib
import json

import pytest

from .common import environment, run


@pytest.mark.once
def test_as_the_client_sees_it(hub, tmp_path):
    """One process goes through the API of huggingface_hub; what it found is judged here."""
    hub.multipart_size = 1000
    large = bytes(range(256)) * 20
    (tmp_path / "large.safetensors").write_bytes(large)
    code = """if True:
        import json, sys
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.errors import *
        from huggingface_hub.utils import get_session

        api, found = HfApi(token="hf_someone"), {}

        def raises(function, *args, **kwargs):
            try:
                function(*args, **kwargs)
            except Exception as error:
                return type(error).__name__
            return "nothing"

        found["user"] = api.whoami()["name"]
        url = api.create_repo("someone/a", private=True)
        found["exists"] = raises(api.create_repo, "someone/a")
        found["foreign"] = raises(api.create_repo, "other/a")
        api.upload_file(repo_id="someone/a", path_or_fileobj=b"one", path_in_repo="folder/small.txt")
        first = api.upload_file(repo_id="someone/a", path_or_fileobj="large.safetensors", path_in_repo="large.safetensors")
        api.create_tag("someone/a", tag="v1")
        api.create_branch("someone/a", branch="x/y")
        second = api.upload_file(repo_id="someone/a", path_or_fileobj=b"two", path_in_repo="folder/small.txt")
        refs = api.list_repo_refs("someone/a", include_pull_requests=True)
        found["tag"] = [(ref.name, ref.target_commit == first.oid) for ref in refs.tags]
        found["branches"] = sorted((ref.name, ref.target_commit == first.oid) for ref in refs.branches)
        found["files"] = sorted(api.list_repo_files("someone/a"))
        entry = api.get_paths_info("someone/a", ["large.safetensors"])[0]
        found["sha256"], found["size"] = entry.lfs.sha256, entry.size
        found["commits"] = len(api.list_repo_commits("someone/a"))
        read = lambda revision: open(hf_hub_download("someone/a", "folder/small.txt", revision=revision, token="hf_someone")).read()
        found["read"] = [read(revision) for revision in ("main", "v1", "x/y", first.oid, second.oid)]
        large = hf_hub_download("someone/a", "large.safetensors", token="hf_someone")
        found["large"] = open(large, "rb").read() == open("large.safetensors", "rb").read()
        link = f"{url.endpoint}/someone/a/resolve/main/large.safetensors"
        answer = get_session().get(link, headers={"Authorization": "Bearer hf_someone", "Range": "bytes=100-199"}, follow_redirects=True)
        found["range"] = [answer.status_code, answer.content.hex(), answer.headers["Content-Range"]]
        pull = api.upload_file(repo_id="someone/a", path_or_fileobj=b"three", path_in_repo="folder/small.txt", create_pr=True)
        found["pull request"] = [pull.pr_revision, read(pull.pr_revision), read("main")]
        found["discussions"] = [discussion.num for discussion in api.get_repo_discussions("someone/a")]
        found["no token"] = raises(HfApi(token=False).model_info, "someone/a")
        found["other token"] = raises(HfApi(token="hf_other").model_info, "someone/a")
        found["bad token"] = raises(HfApi(token="hf_nobody").whoami)
        api.update_repo_settings("someone/a", private=False)
        found["no write"] = raises(HfApi(token="hf_reader").upload_file, repo_id="someone/a", path_or_fileobj=b"", path_in_repo="b")
        api.update_repo_settings("someone/a", gated="manual")
        found["gated, listed"] = HfApi(token="hf_other").model_info("someone/a").gated
        for name, token in (("gated", "hf_other"), ("gated, no token", False), ("gated, owner", "hf_someone")):
            found[name] = raises(hf_hub_download, "someone/a", "large.safetensors", token=token, cache_dir=name)
        found["no revision"] = raises(api.model_info, "someone/a", revision="none")
        found["no file"] = raises(hf_hub_download, "someone/a", "none", token="hf_someone")
        json.dump(found, open("found.json", "w"))"""
    outcome = run(code, env=environment(hub, tmp_path / "home"), cwd=tmp_path)
    assert outcome.code == 0, outcome.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {
        "user": "someone",
        "exists": "HfHubHTTPError",
        "foreign": "HfHubHTTPError",
        "tag": [["v1", True]],
        "branches": [["main", False], ["x/y", True]],
        "files": [".gitattributes", "folder/small.txt", "large.safetensors"],
        "sha256": hashlib.sha256(large).hexdigest(),
        "size": len(large),
        "commits": 4,
        "read": ["two", "one", "one", "one", "two"],
        "large": True,
        "range": [206, large[100:200].hex(), f"bytes 100-199/{len(large)}"],
        "pull request": ["refs/pr/1", "three", "two"],
        "discussions": [1],
        "no token": "RepositoryNotFoundError",
        "other token": "RepositoryNotFoundError",
        "bad token": "HfHubHTTPError",
        "gated, listed": "manual",
        "gated": "GatedRepoError",
        "gated, no token": "GatedRepoError",
        "gated, owner": "nothing",
        "no write": "HfHubHTTPError",
        "no revision": "RevisionNotFoundError",
        "no file": "RemoteEntryNotFoundError",
    }
    assert len(hub.requests("PUT", "^/upload/.*/[1-6]\\?")) == 6  # in parts
    assert not any(authorized for _, path, _, authorized in hub.log if path.startswith(("/cdn/", "/upload/")))
