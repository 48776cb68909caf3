"""The Hub: one commit, put there patiently, and its files downloaded again."""

import argparse
import hashlib
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    RepoFile,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .code import sha256
from .folder import CODE, FOREIGN, OWN, REPLACED, WEIGHTS, UploadError
from .shared import listed, matches


Result = TypeVar("Result")


def connection_errors() -> tuple[type[Exception], ...]:
    """Of the HTTP library that this version of huggingface_hub uses."""
    modules = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return tuple(module.TransportError for module in modules if module is not None)


def cause(error: BaseException) -> BaseException:
    """The first HTTP or connection error in a chain of exceptions, else the exception itself."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, (HfHubHTTPError, OfflineModeIsEnabled, *connection_errors())):
            return link
        link = link.__cause__ or link.__context__
    return error


def explain(error: BaseException, repo_id: str) -> str:
    """One line on why the Hub did not do what it was asked."""
    outer, error = error, cause(error)
    endpoint = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: nothing can be uploaded"
    if isinstance(error, connection_errors()):
        return f"no connection to {endpoint}, or it broke off: {error or type(error).__name__}"
    if not isinstance(error, HfHubHTTPError):
        return " ".join(str(error).split()) or type(error).__name__
    status = error.response.status_code
    if status == 400 and isinstance(outer, ValueError):  # huggingface_hub has put it into words
        return " ".join(str(outer).split())
    server = f" ({error.server_message})" if getattr(error, "server_message", None) else ""
    if isinstance(error, RevisionNotFoundError):
        return f"404: {repo_id} has no such revision{server}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"404: {repo_id} has no such file{server}"
    if isinstance(error, RepositoryNotFoundError) and status == 404:
        return f"404: there is no {repo_id} at {endpoint}, or the token may not see it"
    reasons = {
        401: f"401: {endpoint} does not accept the token",
        403: f"403: the token may not do this with {repo_id}",
        404: f"404: {endpoint} has no such thing",
        409: f"409: {repo_id} was changed by another at the same time: run again",
        412: f"412: {repo_id} was changed by another at the same time: run again",
        429: f"429: {endpoint} wants fewer requests",
    }
    return reasons.get(status, f"{status}: {endpoint} fails") + server


def retry_after(error: BaseException) -> float | None:
    """Seconds to wait before the same request may succeed; `None` if it never will."""
    error = cause(error)
    if isinstance(error, connection_errors()):
        return 0
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in (429, 500, 502, 503, 504):
        return None
    try:
        return float(error.response.headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 60


def patiently(
    what: str, repo_id: str, function: Callable[[], Result], attempts: int = 5, longest: float = 300
) -> Result:
    """
    The result of `function`, tried again where the Hub is busy or the connection breaks.

    Raises:
        UploadError: one line, after the last attempt or for an error that stays.
    """
    for attempt in range(attempts):
        try:
            return function()
        except Exception as error:  # the HTTP library's, Xet's, or huggingface_hub's own
            wait = retry_after(error)
            if wait is None or wait > longest or attempt == attempts - 1:
                raise UploadError(f"{what}: {explain(error, repo_id)}") from error
            wait = max(wait, 2**attempt)
            print(f"{what}: {explain(error, repo_id)}; again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError


def remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def same_file(path: Path, entry: RepoFile | None) -> bool:
    """Whether the Hub's file is this one, by its hash."""
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == sha256(path)
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == entry.blob_id


def sign_in(args: argparse.Namespace) -> HfApi:
    """The client, with a token that the Hub knows."""
    token = args.token or get_token()
    if not token:
        raise UploadError("there is no token: pass --token, set HF_TOKEN, or run `hf auth login`")
    if not re.fullmatch(r"[!-~]+", token):  # the HTTP library would repeat it in its error
        raise UploadError("the token has blanks or other characters that no token has")
    api = HfApi(token=token, library_name="t6-transformers")
    user = patiently("signing in", args.repo_id, api.whoami)
    print(f"signed in as {user['name']} at {constants.ENDPOINT}")
    return api


def remote_texts(api: HfApi, args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """README.md and .gitattributes of the repository, those that are there."""

    def fetch(name: str, revision: str | None) -> Path | None:
        try:
            return Path(hf_hub_download(args.repo_id, name, revision=revision, cache_dir=folder, token=api.token))
        except RevisionNotFoundError:
            return fetch(name, None) if revision else None  # a new branch starts from main
        except (RepositoryNotFoundError, RemoteEntryNotFoundError):
            return None

    what = f"looking at {args.repo_id}"
    found = {
        name: patiently(what, args.repo_id, lambda name=name: fetch(name, args.revision), attempts=2)
        for name in ("README.md", ".gitattributes")
    }
    return {name: path for name, path in found.items() if path is not None}


def look(api: HfApi, args: argparse.Namespace, may_be_missing: bool) -> None:
    """Raises an `UploadError` for what a look at the repository shows to be in the way; changes nothing."""
    repo_id = args.repo_id

    def info() -> ModelInfo | None:
        try:
            return api.model_info(repo_id)
        except RepositoryNotFoundError:
            if may_be_missing and not args.create_pr and not args.code_only:
                return None
            raise

    found = patiently(f"looking at {repo_id}", repo_id, info)
    if found is None:
        return
    if args.private and not found.private:
        raise UploadError(f"{repo_id} exists and is public: --private makes a new repository")
    if args.revision and args.revision != "main" and not args.revision.startswith("refs/"):
        tags = patiently("listing tags", repo_id, lambda: api.list_repo_refs(repo_id)).tags
        if args.revision in {ref.name for ref in tags}:
            raise UploadError(f"{args.revision} is a tag of {repo_id}: --revision must be a branch")


def find_or_create(api: HfApi, args: argparse.Namespace) -> str:
    """Makes the repository and the branch where they are missing; returns the commit at the head of the branch."""
    repo_id, branch = args.repo_id, args.revision or "main"
    if not args.create_pr and not args.code_only:
        patiently(
            f"creating {repo_id}",
            repo_id,
            lambda: api.create_repo(repo_id, private=True if args.private else None, exist_ok=True),
        )
    look(api, args, may_be_missing=False)  # once more: another may have made it
    if branch == "main" or branch.startswith("refs/"):
        return patiently(f"looking at {branch}", repo_id, lambda: api.model_info(repo_id, revision=branch)).sha
    patiently(
        f"creating the branch {branch}", repo_id, lambda: api.create_branch(repo_id, branch=branch, exist_ok=True)
    )
    branches = patiently("listing branches", repo_id, lambda: api.list_repo_refs(repo_id)).branches
    return next(ref.target_commit for ref in branches if ref.name == branch)


def push(api: HfApi, args: argparse.Namespace, files: dict[str, Path], head: str) -> tuple[str, str | None]:
    """
    Uploads in one commit on top of `head`; until that commit is made, the repository is what it was.

    Returns:
        The commit, and the address of the pull request if there is one.
    """
    repo_id = args.repo_id
    remote = patiently(f"listing {repo_id}", repo_id, lambda: remote_files(api, repo_id, head))
    if args.code_only:
        weights = {name: path for name, path in files.items() if matches(name, WEIGHTS)}
        others = {name for name, path in weights.items() if not same_file(path, remote.get(name))}
        others |= {name for name in remote if matches(name, WEIGHTS) and name not in weights}
        if others:
            raise UploadError(
                f"--code-only: {repo_id} does not hold the weights of {args.folder}: {', '.join(sorted(others))} differ"
            )
        if foreign := [name for name in remote if matches(name, FOREIGN) and not matches(name, OWN)]:
            raise UploadError(
                f"--code-only: {repo_id} holds {listed(foreign)}, which readers get with this model: a push without "
                "--code-only removes it"
            )
        files = {name: path for name, path in files.items() if name not in weights}
    stale = [name for name in remote if name not in files and matches(name, CODE if args.code_only else REPLACED)]
    if stale:
        print(f"removing from {repo_id}: {', '.join(stale)}")
    if not args.code_only and (kept := set(remote) - set(files) - set(stale)):
        print(f"staying in {repo_id}, as it is no part of a model: {listed(kept)}")
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
    revision = args.revision or "main"
    options = {"revision": revision, "create_pr": args.create_pr}
    message = args.commit_message or f"{'Code of a' if args.code_only else 'A'} T6 model, by hub_upload.py"

    def commit() -> tuple[str, str | None]:
        try:
            # Has the Hub check the card, uploads what it does not have yet, and makes the commit.
            info = api.create_commit(repo_id, operations, commit_message=message, parent_commit=head, **options)
        except HfHubHTTPError as error:
            # The commit may be ours, made by a request whose answer was lost.
            if error.response.status_code in (409, 412) and not args.create_pr:
                sha = api.model_info(repo_id, revision=revision).sha
                now = remote_files(api, repo_id, sha)
                if all(same_file(path, now.get(name)) for name, path in files.items()) and not set(stale) & set(now):
                    return sha, None
            raise
        return info.oid, info.pr_url

    # Asked twice, a pull request would be opened twice.
    return patiently("uploading", repo_id, commit, attempts=1 if args.create_pr else 5)


def download(api: HfApi, repo_id: str, commit: str, files: dict[str, Path], cache: Path) -> None:
    """Downloads `files` at a commit into an empty cache, and compares them byte by byte, by their hashes."""
    options = {"revision": commit, "cache_dir": cache, "token": api.token}
    folder = Path(
        patiently(
            "downloading",
            repo_id,
            lambda: snapshot_download(repo_id, allow_patterns=list(files), **options),
            attempts=2,
        )
    )
    for name, path in files.items():
        if sha256(folder / name) != (expected := sha256(path)):
            print(f"{name} arrived damaged: downloading it again", file=sys.stderr)
            patiently(
                "downloading", repo_id, lambda n=name: hf_hub_download(repo_id, n, force_download=True, **options), 2
            )
            if (found := sha256(folder / name)) != expected:
                raise UploadError(f"{name} arrives damaged at each download: SHA-256 {found}, uploaded was {expected}")
