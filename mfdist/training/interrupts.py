"""Turning Ctrl-C and SIGTERM into a request to stop after the step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether someone asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.reason: str | None = None


@contextmanager
def stop_on_signals(on_request: Callable[[str], None]) -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the body runs; the first asks to stop, a second SIGINT interrupts at once.

    Args:
        on_request: called once, with what to tell the user.

    Called on: the main thread; elsewhere Python allows no handlers, and nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if request.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if request.reason is None:
            request.reason = name
            on_request(f"{name}: stopping after this step and saving; press Ctrl-C again to stop without saving")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
