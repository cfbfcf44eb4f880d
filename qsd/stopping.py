"""SIGTERM and Ctrl-C as a request that a training answers between two steps, when its state is complete."""

import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers SIGTERM and Ctrl-C from `listen` to `forget`. A second Ctrl-C interrupts at once.

    Attributes:
        received: The number of the first signal that was received, or ``None``.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Remember signals instead of being interrupted by them. Other threads than the main one receive none."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self.received = None
        self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}

    def forget(self) -> None:
        """Handle signals as before `listen`."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def name(self) -> str:
        """The name of the signal, as users know it."""
        return "Ctrl-C" if self.received == signal.SIGINT else "SIGTERM"

    def error(self) -> BaseException:
        """The exception that ends a program after this signal; `qsd.program.run` turns it into the exit code."""
        return KeyboardInterrupt() if self.received == signal.SIGINT else SystemExit(128 + signal.SIGTERM)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
        if number == signal.SIGINT:
            print("\nThe training stops after this batch and saves a checkpoint; Ctrl-C again stops it at once.")


def outlast_stop_signals(_worker: int = 0) -> None:
    """Let a data-loading process outlast SIGTERM and Ctrl-C, until the training process has finished its batch.

    A terminal and a scheduler send them to all processes; without its loading processes the training could not finish.
    It is the ``worker_init_fn`` of a loader.

    Args:
        _worker: The number of the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows, where the training may lose this batch
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    """End the process when its parent asks for it, as PyTorch does when a loader is given up."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
