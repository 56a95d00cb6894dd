"""Ctrl-C in a program: answered at once, at any moment, and without a traceback; and the end of
what reads its output.

To Ctrl-C Python answers between two of its own steps, which it does not take while a network is
compiled, and by an exception, which it prints where it comes amid an import. Nothing here imports
JAX.
"""

import contextlib
import os
import pathlib
import select
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType

_SILENT = "ignore:resource_tracker"


def answer_at_once() -> None:
    """From here on Ctrl-C ends this process with status 130, or does what a handler says.

    To be called before there are other threads: they all leave Ctrl-C to the one that is started
    here, and so do the processes that prepare data.
    """
    signal.signal(signal.SIGINT, _end)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=_answer, name="Ctrl-C", daemon=True).start()


def leave_to_this_process() -> None:
    """To be called before the first process that prepares data is started.

    Python's own helper process, which comes with it, would give Ctrl-C back to every thread; and
    it would tell of the shared memory that it tidies up when this process has ended at once.
    """
    filters = os.environ.get("PYTHONWARNINGS", "")
    if _SILENT not in filters:
        os.environ["PYTHONWARNINGS"] = f"{filters},{_SILENT}".lstrip(",")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextlib.contextmanager
def ended_with_its_reader() -> Iterator[None]:
    """Ends the process without a word where nobody reads its output any more: `... | head -1`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):  # another pipe
            raise
        os._exit(128 + signal.SIGPIPE)


def _answer() -> None:
    while True:
        signal.sigwait({signal.SIGINT})
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, None)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted; the same command goes on\n")
    with contextlib.suppress(OSError):  # some thread or process has just ended by itself
        for children in pathlib.Path("/proc/self/task").glob("*/children"):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGTERM)  # one being started would print a traceback
    os._exit(128 + number)
