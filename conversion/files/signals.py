"""SIGTERM and Ctrl-C as exceptions, so that a run that is stopped cleans up after itself."""

import contextlib
import signal
import threading
from collections.abc import Iterator


WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminated, as its terminal closed"}


class Stopped(BaseException):
    """A signal ends the run. No `Exception`, as `KeyboardInterrupt` is none: nothing that goes on after errors catches it."""

    def __init__(self, number: int):
        super().__init__(WORDS[signal.Signals(number).name])
        self.code = 128 + number  # as a shell reports it


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within the block, what would end the process or raise `KeyboardInterrupt` leaves the block as `Stopped`."""

    def stop(number, frame) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not end the cleaning up
        raise Stopped(number)

    old = {}
    if threading.current_thread() is threading.main_thread():  # no other can set handlers
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                old[number] = signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
