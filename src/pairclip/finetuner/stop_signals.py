"""Stop signals, noted instead of obeyed at once, so that a step can end first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Within the block, Ctrl-C and SIGTERM are noted in `caught`; then Ctrl-C interrupts at once.

    Another SIGTERM does not: one to a whole job comes once more from torchrun, which forwards it.
    Signal handlers belong to the main thread; in another one the block does nothing.
    """

    def __init__(self, *, active: bool) -> None:
        self.caught: int | None = None
        # Shared with the workers: whether the block has been left.
        self.left: Any = multiprocessing.RawValue("b", 0)
        self._active = active and threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if self._active:
            # What is ignored stays so: by nohup, or in a script's background job.
            heard = [n for n in _SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
            self._previous = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.left.value = 1
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is None:
            self.caught = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def obey(self) -> NoReturn:
        """End the program as the signal, or that of another process, would have done."""
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.caught or signal.SIGTERM))


def leave_stopping_to_main(worker: int, *, left: Any) -> None:
    """For the workers of a `DataLoader`: signals to the whole process group are not for them.

    A SIGTERM after the fit is: so the main process ends workers that hang, and it would wait
    forever for one that ignores it.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        if left.value:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)
