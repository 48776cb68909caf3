"""
A server that speaks the Hub's HTTP API, for tests: the unmodified clients talk to it through `HF_ENDPOINT`.

Written from what `huggingface_hub` sends and reads. Repositories live in memory. As on the Hub, small text files are
answered through a redirect on the same host, large ones through a signed link to another host that must not be shown
the token; a commit is atomic; a pull request is a branch `refs/pr/N`; `.gitattributes` decides what is a large file.
"""

import base64
import fnmatch
import hashlib
import hmac
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


NAME = r"[\w.-]+/[\w.-]+"
DEFAULT_GITATTRIBUTES = (
    b"*.bin filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
)
PIPELINE_TAGS = {
    "text-generation", "text-classification", "token-classification", "question-answering", "feature-extraction",
}  # fmt: skip
LICENSES = {"apache-2.0", "mit", "llama2", "llama3", "llama3.1", "llama3.2", "gemma", "cc-by-4.0", "openrail", "other"}


@dataclass(frozen=True)
class Blob:
    data: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """What git calls the file: a large file is there as its pointer."""
        data = self.data
        if self.is_lfs:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Commit:
    files: dict[str, Blob]
    parent: str | None
    title: str
    description: str = ""
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    @property
    def sha(self) -> str:
        content = [self.parent, self.title, self.description, self.date]
        content += sorted((path, blob.oid) for path, blob in self.files.items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class Repository:
    def __init__(self, name: str, private: bool):
        self.name, self.private, self.gated = name, private, False
        self.allowed: set[str] = set()  # who was let through the gate
        self.lfs: dict[str, bytes] = {}
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.pull_requests: list[dict] = []
        first = Commit({".gitattributes": Blob(DEFAULT_GITATTRIBUTES, False)}, None, "initial commit")
        self.add("refs/heads/main", first)

    def add(self, ref: str, commit: Commit) -> None:
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha

    def change(self, **files: bytes | None) -> None:
        """Commits these files to main as another user would; `None` removes one."""
        head = self.resolve("main")
        blobs = head.files | {path: Blob(data, False) for path, data in files.items() if data is not None}
        self.add(
            "refs/heads/main",
            Commit({p: b for p, b in blobs.items() if files.get(p, b"") is not None}, head.sha, "a change"),
        )

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        return next(
            (ref for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}") if ref in self.refs), None
        )

    def resolve(self, revision: str) -> Commit | None:
        ref = self.ref(revision)
        if ref is not None:
            return self.commits[self.refs[ref]]
        found = [commit for sha, commit in self.commits.items() if len(revision) >= 7 and sha.startswith(revision)]
        return found[0] if len(found) == 1 else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.resolve(revision).files.items()}


@dataclass
class Fault:
    """
    What goes wrong with the next `times` requests whose method and path match.

    Attributes:
        status: answered instead; the request has no effect.
        drop: "request": the connection closes when half of the request's body has been read; "response": when half of
            the answer's body has been sent; "answer": the request takes effect, and its answer never comes.
        corrupt: one bit in the middle of the answer's body is another.
        action: called before the request takes effect.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: str | None = None
    corrupt: bool = False
    action: Callable[[], None] | None = None
    count: int = 0


class Answer(Exception):
    def __init__(self, status: int, body: object = None, **headers: str):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""


class Disconnect(Exception): ...


def error(status: int, code: str, message: str) -> Answer:
    return Answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)


class HubServer:
    """
    The server and all that it holds: `with HubServer() as hub:` runs it at `hub.endpoint`.

    Attributes:
        tokens: the user and role ("write" or "read") of each token.
        faults: see `Fault`.
        log: method, path, status and whether a token was shown, of every request.
        multipart_size: size in bytes from which a large file is sent in parts of that size.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens = {
            "hf_someone": ("someone", "write"),
            "hf_reader": ("reader", "read"),
            "hf_other": ("other", "write"),
        }
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int, bool]] = []
        self.multipart_size = 10**9
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.RLock()
        self.secret = b"signs the links"
        server = self

        class BoundHandler(Handler):
            hub = server

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        self.storage = f"http://localhost:{self.http.server_port}"  # another host to the client

    def __enter__(self) -> "HubServer":
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.http.shutdown()
        self.http.server_close()

    def requests(self, method: str, pattern: str) -> list[tuple[str, str, int, bool]]:
        return [entry for entry in self.log if entry[0] == method and re.search(pattern, entry[1])]

    def sign(self, path: str) -> str:
        return hmac.new(self.secret, path.encode(), "sha256").hexdigest()[:24]

    def signed(self, path: str) -> str:
        return f"{self.storage}{path}?signature={self.sign(path)}"


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None: ...

    # The request

    def read_body(self, fault: Fault | None) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
                if fault is not None and fault.drop == "request":
                    raise Disconnect
            self.rfile.readline()
            return b"".join(pieces)
        length = int(self.headers.get("Content-Length", 0))
        if fault is not None and fault.drop == "request":
            self.rfile.read(length // 2)
            raise Disconnect
        body = self.rfile.read(length)
        if len(body) < length:
            raise Disconnect
        return body

    def handle_request(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        # The slash of a branch's name comes quoted, those of the path do not.
        self.url_path, self.query = url.path, dict(urllib.parse.parse_qsl(url.query))
        with self.hub.lock:
            fault = next(
                (
                    f
                    for f in self.hub.faults
                    if f.times > 0 and f.method == self.command and re.search(f.path, self.path)
                ),
                None,
            )
            if fault is not None:
                fault.times -= 1
                fault.count += 1
        try:
            self.body = self.read_body(fault)
            try:
                if fault is not None and fault.status is not None:
                    raise error(fault.status, "", "an error that the test asked for")
                if fault is not None and fault.action is not None:
                    fault.action()
                self.route()
            except Answer as answer:
                if fault is not None:
                    answer.headers |= fault.headers
                self.send(answer, fault)
        except (Disconnect, ConnectionError):
            self.hub.log.append((self.command, self.path, 0, "Authorization" in self.headers))
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def send(self, answer: Answer, fault: Fault | None) -> None:
        if fault is not None and fault.drop == "answer":
            raise Disconnect
        body = answer.body
        if fault is not None and fault.corrupt and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.send_response(answer.status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **answer.headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            body = b""
        elif fault is not None and fault.drop == "response":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            raise Disconnect
        # Logged before the answer is whole: a test whose client has it may look, and the next one clears the log.
        entry = (self.command, self.path, answer.status, "Authorization" in self.headers)
        self.hub.log.append(entry)
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except ConnectionError:
            self.hub.log.remove(entry)
            raise

    def json(self) -> dict:
        return json.loads(self.body)

    # Who asks

    def user(self) -> tuple[str, str] | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise error(401, "", "Invalid credentials in Authorization header")
        return user

    def writer(self) -> tuple[str, str]:
        user = self.user()
        if user is None:
            raise error(401, "", "Invalid username or password.")
        return user

    def repository(self, name: str, content: bool = False, write: bool = False) -> Repository:
        """The repository, if the one who asks may see it, its content, or write to it."""
        user, repository = self.user(), self.hub.repositories.get(name)
        owner = user is not None and user[0] == name.split("/")[0]
        if repository is None or (repository.private and not owner):
            raise error(404 if user else 401, "RepoNotFound", "Repository not found")
        if content and repository.gated and not owner and (user is None or user[0] not in repository.allowed):
            message = f"Access to model {name} is restricted and you are not in the authorized list."
            raise error(403 if user else 401, "GatedRepo", message)
        if write and not (owner and user[1] == "write"):
            raise error(403 if user else 401, "", f"You don't have the rights to write to {name}")
        return repository

    @staticmethod
    def commit(repository: Repository, revision: str) -> Commit:
        commit = repository.resolve(urllib.parse.unquote(revision))
        if commit is None:
            raise error(404, "RevisionNotFound", f"Invalid rev id: {urllib.parse.unquote(revision)}")
        return commit

    # What is asked

    def route(self) -> None:
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, self.url_path)
            if match and (method == self.command or (method, self.command) == ("GET", "HEAD")):
                groups = [
                    value and (value if "rev" in name else urllib.parse.unquote(value))
                    for name, value in match.groupdict().items()
                ]
                with nullcontext() if method == "GET" else self.hub.lock:
                    function(self, *groups)
        raise error(404, "", f"no such route: {self.command} {self.url_path}")

    def whoami(self) -> None:
        name, role = self.writer()
        raise Answer(
            200,
            {
                "type": "user",
                "name": name,
                "fullname": name,
                "isPro": False,
                "orgs": [],
                "auth": {"accessToken": {"role": role}},
            },
        )

    def create(self) -> None:
        body, user = self.json(), self.writer()
        name = f"{body.get('organization') or user[0]}/{body['name']}"
        if user != (name.split("/")[0], "write"):
            raise error(
                403, "", f"You don't have the rights to create a model under the namespace {name.split('/')[0]}"
            )
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repositories:
            raise Answer(409, {"error": "You already created this model repo", "url": url})
        private = body.get("private") is True or body.get("visibility") == "private"
        self.hub.repositories[name] = Repository(name, private)
        raise Answer(200, {"url": url, "id": name})

    def delete(self) -> None:
        body, user = self.json(), self.writer()
        name = f"{body.get('organization') or user[0]}/{body['name']}"
        self.repository(name, write=True)
        del self.hub.repositories[name]
        raise Answer(200, {})

    def settings(self, name: str) -> None:
        repository, body = self.repository(name, write=True), self.json()
        repository.gated = body.get("gated", repository.gated)
        if "visibility" in body or "private" in body:
            repository.private = body.get("private", body.get("visibility") == "private")
        raise Answer(200, {})

    def validate_yaml(self) -> None:
        content = self.json()["content"]
        errors = card_errors(content)
        if errors and self.headers["Accept"] == "text/plain":
            raise Answer(400, "\n".join(errors).encode(), Content_Type="text/plain")
        raise Answer(400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    def info(self, name: str, revision: str | None = None) -> None:
        repository = self.repository(name)
        commit = self.commit(repository, revision or "main")
        raise Answer(
            200,
            {
                "id": name, "modelId": name, "author": name.split("/")[0], "sha": commit.sha, "lastModified": commit.date,
                "private": repository.private, "gated": repository.gated, "disabled": False, "downloads": 0, "likes": 0,
                "tags": [], "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            },
        )  # fmt: skip

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        repository = self.repository(name, content=True)
        commit = self.commit(repository, revision)
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        entries = {}
        for path, blob in sorted(commit.files.items()):
            if path.startswith(prefix):
                first, *rest = path.removeprefix(prefix).split("/")
                if rest:
                    oid = hashlib.sha1(first.encode()).hexdigest()
                    entries[prefix + first] = {"type": "directory", "path": prefix + first, "oid": oid, "size": 0}
                if not rest or self.query.get("recursive", "").lower() in ("1", "true"):
                    entries[path] = self.entry(path, blob)
        if prefix and not entries:
            raise error(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        # In pages, as the Hub sends a long listing.
        start, size = int(self.query.get("cursor", 0)), 5
        page, headers = list(entries.values())[start : start + size], {}
        if start + size < len(entries):
            query = urllib.parse.urlencode(self.query | {"cursor": start + size})
            headers["Link"] = f'<{self.hub.endpoint}{self.url_path}?{query}>; rel="next"'
        raise Answer(200, page, **headers)

    @staticmethod
    def entry(path: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
        if blob.is_lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}
        return entry

    def paths_info(self, name: str, revision: str) -> None:
        repository = self.repository(name, content=True)
        files = self.commit(repository, revision).files
        if self.headers["Content-Type"].startswith("application/json"):
            paths = self.json()["paths"]
        else:
            paths = urllib.parse.parse_qs(self.body.decode())["paths"]
        raise Answer(200, [self.entry(path, files[path]) for path in paths if path in files])

    def references(self, name: str) -> None:
        refs = self.repository(name).refs
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        answer = {
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                for ref, sha in refs.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }
        raise Answer(200, answer | {"converts": []})

    def branch(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        ref = f"refs/heads/{urllib.parse.unquote(revision)}"
        if ref in repository.refs:
            raise error(409, "", f"Reference already exists: {ref}")
        body = self.json() if self.body else {}
        repository.refs[ref] = self.commit(repository, body.get("startingPoint") or "main").sha
        raise Answer(200, {})

    def tag(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        ref = f"refs/tags/{self.json()['tag']}"
        if ref in repository.refs:
            raise error(409, "", f"Tag already exists: {ref}")
        repository.refs[ref] = self.commit(repository, revision).sha
        raise Answer(200, {})

    def history(self, name: str, revision: str) -> None:
        repository = self.repository(name)
        commit, entries = self.commit(repository, revision), []
        while commit is not None:
            entries.append(
                {
                    "id": commit.sha,
                    "title": commit.title,
                    "message": commit.description,
                    "authors": [],
                    "date": commit.date,
                }
            )
            commit = repository.commits.get(commit.parent)
        raise Answer(200, entries)

    def discussions(self, name: str) -> None:
        entries = self.repository(name).pull_requests
        raise Answer(200, {"discussions": entries, "count": len(entries), "start": 0})

    # Uploads

    def preupload(self, name: str, revision: str) -> None:
        pull_request = self.query.get("create_pr") == "1"
        repository = self.repository(name, content=True, write=not pull_request)
        self.writer()
        commit, files = self.commit(repository, revision), self.json()["files"]
        attributes = commit.files.get(".gitattributes", Blob(b"", False)).data.decode()
        for file in files:
            if file["path"] == ".gitattributes":
                attributes += "\n" + base64.b64decode(file["sample"]).decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        answers = []
        for file in files:
            path, current = file["path"], commit.files.get(file["path"])
            large = any(fnmatch.fnmatch(path, pattern) for pattern in patterns) or file["size"] > 10 * 2**20
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if current is not None:
                answer["oid"] = current.sha256 if current.is_lfs else current.oid
            answers.append(answer)
        raise Answer(200, {"files": answers, "commitOid": commit.sha})

    def lfs_batch(self, name: str) -> None:
        repository = self.repository(name, content=True)
        self.writer()
        objects = []
        for item in self.json()["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repository.lfs:
                path = f"/upload/{name}/{item['oid']}"
                if item["size"] >= self.hub.multipart_size:
                    count = -(-item["size"] // self.hub.multipart_size)
                    upload = {
                        "href": f"{self.hub.endpoint}/complete/{name}/{item['oid']}?signature={self.hub.sign(path)}",
                        "header": {"chunk_size": str(self.hub.multipart_size)}
                        | {str(part): self.hub.signed(f"{path}/{part}") for part in range(1, count + 1)},
                    }
                else:
                    upload = {"href": self.hub.signed(path)}
                verify = {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/verify"}
                entry |= {"actions": {"upload": upload, "verify": verify}}
            objects.append(entry)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def check_signature(self, path: str) -> None:
        if "Authorization" in self.headers:
            raise error(400, "", "Only one auth mechanism allowed: the token was shown to the storage")
        if not hmac.compare_digest(self.query.get("signature", ""), self.hub.sign(path)):
            raise error(403, "", "the link is not signed")

    def upload(self, name: str, oid: str, part: str | None = None) -> None:
        self.check_signature(self.url_path)
        if part is not None:
            self.hub.parts[oid, int(part)] = self.body
            raise Answer(200, None, ETag=f'"{hashlib.md5(self.body).hexdigest()}"')
        self.store(name, oid, self.body)
        raise Answer(200)

    def complete(self, name: str, oid: str) -> None:
        body = self.json()
        parts = [
            self.hub.parts[oid, part["partNumber"]]
            for part in sorted(body["parts"], key=lambda part: part["partNumber"])
        ]
        assert all(f'"{hashlib.md5(data).hexdigest()}"' == part["etag"] for data, part in zip(parts, body["parts"]))
        self.store(name, oid, b"".join(parts))
        raise Answer(200, {})

    def store(self, name: str, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise error(400, "", "the content does not have the hash that was announced")
        self.hub.repositories[name].lfs[oid] = data

    def lfs_verify(self, name: str) -> None:
        repository, body = self.repository(name, content=True), self.json()
        self.writer()
        if len(repository.lfs.get(body["oid"], b"")) != body["size"]:
            raise error(404, "", "no such object")
        raise Answer(200, {})

    def create_commit(self, name: str, revision: str) -> None:
        pull_request = self.query.get("create_pr") == "1"
        repository = self.repository(name, content=True, write=not pull_request)
        user, lines = self.writer(), [json.loads(line) for line in self.body.splitlines()]
        head, base = lines[0]["value"], self.commit(repository, revision)
        ref = repository.ref(urllib.parse.unquote(revision))
        if ref is None or ref.startswith("refs/tags/"):
            raise error(404, "RevisionNotFound", "commits go to a branch or a pull request")
        if head.get("parentCommit") and not base.sha.startswith(head["parentCommit"]):
            raise error(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = Blob(base64.b64decode(line["value"]["content"]), False)
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in repository.lfs:
                    raise error(400, "", f"the content of {path} was not uploaded")
                files[path] = Blob(repository.lfs[line["value"]["oid"]], True)
            elif line["key"] == "deletedFile":
                if files.pop(path, None) is None:
                    raise error(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            else:
                raise error(400, "", f"unknown operation {line['key']}")
        commit = Commit(files, base.sha, head["summary"], head.get("description", ""))
        url = None
        if pull_request:
            number = len(repository.pull_requests) + 1
            ref, url = f"refs/pr/{number}", f"{self.hub.endpoint}/{name}/discussions/{number}"
            repository.pull_requests.append(
                {
                    "num": number, "title": head["summary"], "author": {"name": user[0]}, "status": "open", "isPullRequest": True,
                    "createdAt": commit.date, "repo": {"name": name, "type": "model"},
                }
            )  # fmt: skip
        repository.add(ref, commit)
        raise Answer(
            200,
            {
                "success": True,
                "commitOid": commit.sha,
                "commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit.sha}",
                "pullRequestUrl": url,
            },
        )

    # Downloads

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.commit(self.repository(name, content=True), revision)
        blob = commit.files.get(path)
        headers = {"X_Repo_Commit": commit.sha}
        if blob is None:
            answer = error(404, "EntryNotFound", f"{path} does not exist")
            answer.headers["X-Repo-Commit"] = commit.sha
            raise answer
        if blob.is_lfs:
            headers |= {"X_Linked_Etag": f'"{blob.sha256}"', "X_Linked_Size": str(len(blob.data))}
            raise Answer(302, None, Location=self.hub.signed(f"/cdn/{name}/{blob.sha256}"), **headers)
        if "resolve-cache" not in self.url_path:
            location = f"/api/resolve-cache/models/{name}/{commit.sha}/{urllib.parse.quote(path)}"
            raise Answer(307, None, Location=location, **headers)
        self.content(blob.data, ETag=f'"{blob.oid}"', **headers)

    def cdn(self, name: str, oid: str) -> None:
        self.check_signature(self.url_path)
        self.content(self.hub.repositories[name].lfs[oid], ETag=f'"{oid}"')

    def content(self, data: bytes, **headers: str) -> None:
        headers |= {"Content_Type": "application/octet-stream", "Accept_Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            raise Answer(200, data, **headers)
        start, end = int(match[1]), int(match[2] or len(data) - 1) + 1
        if start >= len(data):
            raise Answer(416, None, Content_Range=f"bytes */{len(data)}")
        piece = data[start:end]
        raise Answer(206, piece, Content_Range=f"bytes {start}-{start + len(piece) - 1}/{len(data)}", **headers)


REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("DELETE", "/api/repos/delete", Handler.delete),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("PUT", f"/api/models/(?P<name>{NAME})/settings", Handler.settings),
    ("GET", f"/api/models/(?P<name>{NAME})", Handler.info),
    ("GET", f"/api/models/(?P<name>{NAME})/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/(?P<name>{NAME})/tree/{REVISION}(?P<folder>/.*)?", Handler.tree),
    ("POST", f"/api/models/(?P<name>{NAME})/paths-info/{REVISION}", Handler.paths_info),
    ("GET", f"/api/models/(?P<name>{NAME})/refs", Handler.references),
    ("POST", f"/api/models/(?P<name>{NAME})/branch/{REVISION}", Handler.branch),
    ("POST", f"/api/models/(?P<name>{NAME})/tag/{REVISION}", Handler.tag),
    ("GET", f"/api/models/(?P<name>{NAME})/commits/{REVISION}", Handler.history),
    ("GET", f"/api/models/(?P<name>{NAME})/discussions", Handler.discussions),
    ("POST", f"/api/models/(?P<name>{NAME})/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/models/(?P<name>{NAME})/commit/{REVISION}", Handler.create_commit),
    ("POST", rf"/(?P<name>{NAME})\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/(?P<name>{NAME})\.git/info/lfs/verify", Handler.lfs_verify),
    ("PUT", f"/upload/(?P<name>{NAME})/(?P<oid>[0-9a-f]+)(?:/(?P<part>[0-9]+))?", Handler.upload),
    ("POST", f"/complete/(?P<name>{NAME})/(?P<oid>[0-9a-f]+)", Handler.complete),
    ("GET", f"/(?P<name>{NAME})/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    ("GET", f"/api/resolve-cache/models/(?P<name>{NAME})/{REVISION}/(?P<path>.+)", Handler.resolve),
    ("GET", f"/cdn/(?P<name>{NAME})/(?P<oid>[0-9a-f]+)", Handler.cdn),
]  # fmt: skip


def card_errors(content: str) -> list[str]:
    """What the Hub finds wrong with the metadata of a model card, by its published specification."""
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return ["there is no metadata"] if content.startswith("---") else []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as problem:
        return [f"the metadata is no YAML: {problem}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    errors = []
    if "license" in data and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("license") == "other" and not re.fullmatch(r"[\w.-]+", str(data.get("license_name", ""))):
        errors.append('"license_name" must be given, in lower case and dashes, with the license "other"')
    if "pipeline_tag" in data and data["pipeline_tag"] not in PIPELINE_TAGS:
        errors.append('"pipeline_tag" is not a known task')
    for name in ("tags", "datasets", "language", "base_model"):
        values = data.get(name, [])
        if not all(isinstance(value, str) and value for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{name}" must be a string or a list of strings')
    for name in ("datasets", "base_model"):
        values = data.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value)):
                errors.append(f'"{name}": {value!r} is not the name of a repository')
    for number, model in enumerate(data.get("model-index", [])):
        for result in model.get("results", []):
            if not isinstance(result.get("task", {}).get("type"), str):
                errors.append(f'"model-index[{number}].results" needs task.type')
            if not all(isinstance(result.get("dataset", {}).get(key), str) for key in ("type", "name")):
                errors.append(f'"model-index[{number}].results" needs dataset.type and dataset.name')
            for metric in result.get("metrics", [{}]):
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float)):
                    errors.append(f'"model-index[{number}].results" needs metrics with type and value')
        if not isinstance(model.get("name"), str):
            errors.append(f'"model-index[{number}]" needs a name')
    return errors
