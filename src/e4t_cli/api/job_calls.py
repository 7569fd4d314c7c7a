"""The callbacks of one job of `personalize_many`: they pass results and notes on, and can end the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from e4t_cli.api.jobs import Job, KeyedJob
from e4t_cli.errors import E4TError, ResourceError
from e4t_cli.images.results import GeneratedImage
from e4t_cli.progress import Progress, ProgressCallback, StopRequest

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept


class BatchCallbacks(Protocol):
    """What is called with results as soon as there are some; what it raises ends the job or the batch."""

    def on_concept(self, job: Job, key: str, concept: Concept) -> None: ...
    def on_image(self, job: Job, key: str, image: GeneratedImage) -> None: ...


class JobCalls:
    """The callbacks of one job: they find the key of each image, name the job in notes, and end the batch on request.

    Args:
        callbacks: get the results.
        report: gets the progress.
        stop: its request ends the batch.
        notes: of earlier jobs about the base, which are reported once.

    Attributes:
        waiting: the images that have not come, by their keys; at the end those that were withheld.
        fatal: the error of a callback that ends the batch.
    """

    def __init__(
        self, keyed: KeyedJob, callbacks: BatchCallbacks | None, report: ProgressCallback | None,
        stop: StopRequest | None, notes: set[str],
    ) -> None:  # fmt: skip
        self.keyed, self.job, self.callbacks = keyed, keyed.checked.job, callbacks
        self.report, self.stop, self.notes = report, stop, notes
        self.waiting = dict(zip(keyed.keys, keyed.wanted, strict=True))
        self.fatal: Exception | None = None
        self._listening = contextlib.ExitStack()
        self._came = self._listens = False  # an image since the request to stop; whether that is waited for

    def __enter__(self) -> None:
        self._listening.__enter__()

    def __exit__(self, *error: object) -> None:
        self._listening.close()

    def on_progress(self, event: Progress) -> None:
        """Pass an event on; after a request to stop end the batch, once the images in work have come."""
        stop = self.stop
        if stop is not None and event.stage == "generate":
            if not self._listens:
                self._listening.enter_context(stop.listening())
                self._listens = True
            if stop.asked and self._came and self.waiting:
                raise KeyboardInterrupt
        if event.stage == "load" and not (event.note or event.remark):
            return  # it was loaded before
        if event.note and event.stage in ("load", "fetch"):
            if event.note in self.notes:
                return
            self.notes.add(event.note)
        elif self.job.source and (event.note or event.remark):
            before = f"{self.job.source}: "
            note, remark = (before + text if text else "" for text in (event.note, event.remark))
            event = replace(event, note=note, remark=remark)
        if self.report is not None:
            self.report(event)

    def on_concept(self, concept: Concept) -> None:
        """Pass the concept on."""
        if self.callbacks is not None and (key := self.keyed.concept_key) is not None:
            with self._fatal():
                self.callbacks.on_concept(self.job, key, concept)

    def on_image(self, image: GeneratedImage) -> None:
        """Pass an image on, with its key."""
        same = (key for key, one in self.waiting.items() if (one.prompt.text, one.seed) == (image.prompt, image.seed))
        key = next(same)
        del self.waiting[key]
        if self.callbacks is not None:
            with self._fatal():
                self.callbacks.on_image(self.job, key, image)
        stop = self.stop
        self._came = stop is not None and stop.asked

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """Remember an error that ends the batch: not that of one job, as a file that exists is."""
        try:
            yield
        except Exception as error:
            if isinstance(error, ResourceError) or not isinstance(error, E4TError):
                self.fatal = error
            raise
