"""Files that ``e4t batch`` writes: images, concepts, and the manifest of what is finished."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from e4t_cli.api.batch import JobResult
from e4t_cli.api.jobs import Job
from e4t_cli.cli.console import Console
from e4t_cli.cli.job_files import FileJob
from e4t_cli.cli.outputs import UserFile, is_concept, is_own_picture
from e4t_cli.errors import UsageError, printable
from e4t_cli.files import write_atomically
from e4t_cli.formats.batch_manifest import Manifest
from e4t_cli.formats.recognition import todays_names
from e4t_cli.images.png_metadata import png_bytes
from e4t_cli.images.results import check_folder, write_free

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept
    from e4t_cli.images.results import GeneratedImage


class BatchSaver:
    """Saves each image and concept as soon as it is there, prints its path, and knows what is finished.

    Args:
        jobs: all of the batch.
        rank: of this process among several.
        force: do everything again, and replace the files of before.
        metadata: False leaves everything out of the images, and prompts out of the manifest.
        checks: whether the safety checker is on; what it withheld before is finished then.
        create: make the folders now.

    Raises:
        UsageError: a folder cannot be written to, two jobs have the same file for their concepts, or there is a file
            that this command did not write.
    """

    def __init__(
        self, console: Console, jobs: Sequence[FileJob], *, rank: int, force: bool, metadata: bool, checks: bool,
        create: bool,
    ) -> None:  # fmt: skip
        self.console, self.force, self.metadata, self.checks = console, force, metadata, checks
        self.manifests: dict[Path, Manifest] = {}
        self.written: set[str] = set()  # keys
        concepts: dict[str, FileJob] = {}
        for job in jobs:
            if job.save is not None:
                place = os.path.abspath(job.save)
                if (other := concepts.setdefault(place, job)) is not job:
                    message = f"{printable(job.source)}: save: {printable(other.source)} has the same file"
                    raise UsageError(message, hint="give each concept a file of its own")
                check_folder(job.save.parent, create=create)
            if job.out not in self.manifests:
                self.manifests[job.out] = Manifest(check_folder(job.out, create=create), rank)
            if job.save is not None and not self.manifests[job.out].lists(job.save):
                try:
                    UserFile(job.save, force, is_concept).check(create=False)
                except UsageError as error:
                    raise job.located(error) from error

    def is_finished(self, job: Job, key: str) -> bool:
        """Whether an image or a concept is there."""
        job = cast(FileJob, job)
        if self.force and key not in self.written:
            return False
        manifest = self.manifests[job.out]
        return manifest.path_of(key) is not None or (self.checks and manifest.is_withheld(key))

    def on_concept(self, job: Job, key: str, concept: Concept) -> None:
        """Save the concept, before the first image."""
        job = cast(FileJob, job)
        assert job.save is not None
        file, manifest = UserFile(job.save, self.force, is_concept), self.manifests[job.out]

        def save(path: Path, overwrite: bool) -> None:
            if overwrite or not os.path.lexists(path):
                manifest.add(key, path, **self._about(job))
            concept.save(path, overwrite=overwrite)

        path = file.write(save)
        self.written.add(key)
        self.console.product(str(path), {"type": "concept", "job": job.number, "path": str(path)})

    def on_image(self, job: Job, key: str, image: GeneratedImage) -> None:
        """Save one image."""
        job = cast(FileJob, job)
        manifest, data = self.manifests[job.out], png_bytes(image.image, image.record, metadata=self.metadata)
        about = {**self._about(job), "seed": image.seed, **({"prompt": image.prompt} if self.metadata else {})}
        before = manifest.path_of(key) if self.force else None
        if before is not None and is_own_picture(before):
            manifest.add(key, before, size=len(data), **about)
            write_atomically(before, data)
            path = before
        else:

            def write(path: Path) -> None:
                if os.path.lexists(path):
                    raise FileExistsError
                manifest.add(key, path, size=len(data), **about)
                write_atomically(path, data, overwrite=False)

            path = write_free(job.out / f"{image.file_name(job.name)}.png", write)
        self.written.add(key)
        record = todays_names(image.record.as_dict())
        self.console.product(str(path), {"type": "image", "job": job.number, "path": str(path), **record})

    def withheld(self, result: JobResult) -> None:
        """Remember the images that the safety checker withheld."""
        job = cast(FileJob, result.job)
        for key in result.withheld:
            self.manifests[job.out].add(key, None, **self._about(job))
        for record in result.result.withheld if result.result is not None and self.console.json else ():
            self.console.product("", {"type": "withheld", "job": job.number, **todays_names(record.as_dict())})

    def _about(self, job: FileJob) -> dict[str, Any]:
        return {"job": job.source} if self.metadata else {}
