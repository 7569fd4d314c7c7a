"""How far a fetch is: huggingface_hub's progress bars and warnings as events of ours."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from e4t_cli.progress import Progress, ProgressCallback

_LEAST_SECONDS = 0.1  # between two events: a terminal shows no more
_LEAST_BYTES = 200_000  # of a fetch that is worth telling


class Meter:
    """Counts the bytes of all files of one fetch, from whatever thread they come.

    Args:
        total: bytes expected.
        on_progress: the caller's, or None.
        stage: "fetch", or "verify" for files that are only read.
    """

    def __init__(
        self, total: int, on_progress: ProgressCallback | None, stage: str = "fetch"
    ) -> None:
        self.total, self.stage = total, stage
        self._listener = on_progress
        self._done = 0
        self._begun = self._told = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = self._heard = False
        self._of_this_thread = threading.local()

    def begin(self) -> None:
        """Begin a file in this thread."""
        self._of_this_thread.count = 0

    def take_back(self) -> None:
        """Take back what was counted of this thread's file: it will come once more."""
        self.add(-getattr(self._of_this_thread, "count", 0))

    def stop(self) -> None:
        """Make every thread that still counts here give up at its next block."""
        self._stopped = True

    def add(self, count: float) -> None:
        """Count bytes that arrived; negative for those that have to come again.

        Raises:
            InterruptedError: the fetch was stopped.
        """
        if self._stopped:
            raise InterruptedError
        self._of_this_thread.count = getattr(self._of_this_thread, "count", 0) + int(count)
        with self._lock:
            self._done = max(0, self._done + int(count))
            now = time.monotonic()
            if now - self._told >= _LEAST_SECONDS:
                self._told = now
                self._tell(now)

    def finish(self) -> None:
        """Say that everything is there."""
        with self._lock:
            self._done = self.total
            self._tell(time.monotonic())

    def settle(self) -> None:
        """Finish, if there was so much that anybody heard of it."""
        if self._heard:
            self.finish()

    def _tell(self, now: float) -> None:
        self._heard = True
        if self._listener is None or self.total < _LEAST_BYTES:
            return
        rate = self._done / 1e6 / max(now - self._begun, 1e-3)
        done = min(self._done, self.total)
        self._listener(
            Progress(
                stage=self.stage,
                done=done,
                total=self.total,
                unit="bytes",
                values={"MB/s": rate} if self._done else {},
            )
        )

    def bar_class(self) -> type[Any]:
        """Return what huggingface_hub takes as `tqdm_class`: it draws nothing and counts here."""
        from tqdm.auto import tqdm

        meter = self

        class Bar(tqdm):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                options.pop("name", None)
                options["disable"] = True
                super().__init__(*arguments, **options)

            def update(self, n: float | None = 1) -> None:
                meter.add(n or 0)

            # The hub's newer way of sending (Xet) reports what came over the line and what is on
            # the disk; who has these two methods gets both in one bar, and the disk is what counts.
            def update_transfer(self, n: float | None = 1) -> None:
                pass

            def set_transfer_postfix_str(self, *arguments: Any, **options: Any) -> None:
                pass

        return Bar


@contextlib.contextmanager
def retries_told(on_progress: ProgressCallback | None) -> Iterator[None]:
    """Turn huggingface_hub's warnings into one calm remark while a fetch runs.

    They name addresses, and there are many of them; what matters is that silence has a reason.
    """
    logger = logging.getLogger("huggingface_hub")
    handler = _Teller(on_progress)
    before = logger.handlers[:]
    logger.handlers[:] = [handler]
    try:
        yield
    finally:
        logger.handlers[:] = before


class _Teller(logging.Handler):
    def __init__(self, on_progress: ProgressCallback | None) -> None:
        super().__init__(logging.WARNING)
        self._listener = on_progress
        self._told = False

    def emit(self, record: logging.LogRecord) -> None:
        trying = "etrying" in record.msg or "resume" in record.msg or "Waiting" in record.msg
        if trying and not self._told and self._listener is not None:
            self._told = True
            remark = "the hub is slow to answer, or the line is bad: trying again"
            self._listener(Progress(stage="fetch", remark=remark))
