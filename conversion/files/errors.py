"""What the command line reports in one line instead of a traceback."""

from huggingface_hub.errors import StrictDataclassError


class ConversionError(Exception):
    """The input, or the place for the output, is not what a conversion needs; the message says what and where."""


def reason(error: Exception) -> str:
    """One line of an error's message: the first, or of a configuration's validation the last, which says what is wrong."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, StrictDataclassError) else 0].strip()


def one_line(error: BaseException) -> str:
    """The whole message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def is_error(error: BaseException) -> bool:
    """Whether what a library raised is an error, and not the end of the process: a panic in Rust is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def unwritten(error: BaseException) -> str | None:
    """
    Why a file could not be written, if that is what an error says. Libraries in Rust and C++ have errors of their own for what is an
    `OSError` in Python, and PyTorch's says no reason.
    """
    text = one_line(error)
    if "while serializing: I/O error: " in text:
        return text.partition("I/O error: ")[2]
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        return "a file could not be written whole, as on a full disk"
    return None
