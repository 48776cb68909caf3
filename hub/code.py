"""The code that a repository of a T6 model carries: which files, what they may not name, and the number they are known by."""

import ast
import functools
import hashlib
import importlib.metadata
import subprocess
from pathlib import Path

import modeling_t6


ROOT = Path(modeling_t6.__file__).resolve().parents[1]

# What the code of a model may import, and what it may not name: all that opens files, connections or processes.
IMPORTS = {
    "__future__", "abc", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "itertools", "math",
    "numbers", "operator", "os", "torch", "transformers", "triton", "typing", "warnings",
}  # fmt: skip
CHECKS_OF_FIELDS = ("huggingface_hub.dataclasses", "huggingface_hub.errors")  # of a configuration
FORBIDDEN_MODULES = (
    "torch.hub",
    "torch.utils.cpp_extension",
    "torch.distributed",
    "torch.multiprocessing",
    "torch.package",
)
# Of torch.distributed, the tensors that an engine has spread over its processes: they open no connection themselves.
SPREAD_TENSORS = {f"torch.distributed.tensor.{name}" for name in ("DTensor", "Partial", "Replicate", "Shard")}
FORBIDDEN_NAMES = {
    "open", "exec", "eval", "__import__", "input", "breakpoint", "globals", "vars", "__builtins__", "__globals__",
    "__subclasses__", "__loader__", "os", "sys", "io", "builtins", "importlib", "pathlib", "shutil", "socket", "subprocess",
    "ctypes", "pickle", "save", "load", "load_library", "load_inline", "cpp_extension", "hub", "distributed",
    "multiprocessing", "tofile", "from_file", "memmap", "dump", "write", "write_text", "write_bytes", "system", "popen",
    "Popen", "unlink", "mkdir", "cached_file", "snapshot_download", "hf_hub_download", "push_to_hub", "save_pretrained",
    "from_pretrained", "use_kernel_forward_from_hub", "use_kernel_func_from_hub",
}  # fmt: skip


def code_files() -> dict[str, Path]:
    """The files that a repository of a T6 model carries: `modeling_t6.py`, and what it and they import."""
    package, waiting, files = ROOT / "modeling_t6", ["configuration_t6.py", "modeling_t6.py"], {}
    while waiting:
        name = waiting.pop()
        if name not in files:
            files[name] = package / name
            waiting += imported_files(files[name].read_text(encoding="utf-8"))
    return dict(sorted(files.items()))


# Of a text, which is read again at each step of a push, both say what they said before.
@functools.cache
def imported_files(source: str) -> tuple[str, ...]:
    nodes = ast.walk(ast.parse(source))
    return tuple(f"{node.module}.py" for node in nodes if isinstance(node, ast.ImportFrom) and node.level)


@functools.cache
def unsafe_code(source: str) -> tuple[str, ...]:
    """
    What a reader of code files fears, found in their syntax tree: imports that a model does not need, and names that open
    files, connections or processes. It keeps this package's code honest; it is no sandbox for the code of others.
    """
    tree = ast.parse(source)
    harmless = set()  # a name that is forbidden elsewhere
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):  # `save_pretrained` may call the one that it overrides
            own = [
                node for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr == function.name
            ]
            harmless |= {id(node) for node in own if ast.unparse(node.value) == "super()"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "tl.load",
            "os.environ",
        ):  # Triton's; reads settings
            harmless |= {id(node), id(node.value)}

    found = set()
    for node in ast.walk(tree):
        modules, names = [], []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            names = [alias.name for alias in node.names if alias.name == "os" and alias.asname]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level == 0:
                modules = [f"{node.module}.{name}" for name in names]
                modules += [node.module] if not SPREAD_TENSORS.issuperset(modules) else []
                names += [node.module] if node.module == "os" else []
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        for module in modules:
            allowed = module.split(".")[0] in IMPORTS or module.startswith(CHECKS_OF_FIELDS)
            if not allowed or module.startswith(FORBIDDEN_MODULES) and module not in SPREAD_TENSORS:
                found.add((node.lineno, f"imports {module}"))
        if id(node) not in harmless:
            found |= {(node.lineno, f"uses {name}") for name in names if name in FORBIDDEN_NAMES}
    return tuple(f"line {line} {what}" for line, what in sorted(found))


def code_digest(files: dict[str, Path]) -> str:
    """
    SHA-256 of the code files, by name and content; the same as that which this prints in a folder that holds them:

        LC_ALL=C sha256sum *.py | sha256sum
    """
    names = sorted((name for name in files if name.endswith(".py")), key=str.encode)
    lines = "".join(f"{sha256(files[name])}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_commit() -> str | None:
    """The commit of this repository, marked where its code was changed since; `None` outside of a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        answer = subprocess.run(
            [*git, "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True, check=True
        )
        top, commit = answer.stdout.splitlines()
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "modeling_t6"], capture_output=True
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    if Path(top) != ROOT:
        return None
    return f"{commit} with changes" if changed else commit


def project_url() -> str | None:
    """Where the project is at home, as its metadata says; `None` where it is not installed, or has no home."""
    try:
        urls = importlib.metadata.metadata("t6-transformers").get_all("Project-URL")
    except importlib.metadata.PackageNotFoundError:
        return None
    return urls[0].partition(", ")[2] if urls else None
