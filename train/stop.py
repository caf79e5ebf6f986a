"""SIGTERM and Ctrl-C, which ask a training to stop between two steps and to save."""

import os
import signal
import threading

from train import distributed
from train.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """While entered, in the main thread, the first SIGINT or SIGTERM sets `asked`, and further ones
    do nothing: no write is torn. On several processes one that any of them gets stops them all."""

    def __init__(self):
        self.asked: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.asked is None:
            self.asked = number
            if distributed.is_first():
                # print is not allowed where it may have been interrupted itself
                os.write(2, b"\nstopping after this step and saving\n")

    def agreed(self) -> int | None:
        """The signal that asks all processes to stop; all must call this together."""
        return distributed.largest(self.asked or 0) or None

    def check(self) -> None:
        """Raise Stopped where a signal has asked for it; all processes must call this together."""
        agreed = self.agreed()
        if agreed is not None:
            raise Stopped(agreed == signal.SIGINT)
