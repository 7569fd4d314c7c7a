"""Sets of drawings, drawn in chunks and kept as memory-mapped arrays: images as bytes, what they show as small numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import numpy

from mini_world.next.canvas import SIZE
from mini_world.next.identities import ATTRIBUTES, DEGREES, Identity
from mini_world.next.scenes import COLOURS, FRAMINGS, MEDIA, PLACES, ROLES
from mini_world.next.things import THINGS
from mini_world.next.world import VERSION, Drawing, Scene, sample

SUBJECTS = ("face", "cat", "dog", *THINGS)
WHO_KINDS = tuple(ATTRIBUTES)
# The columns of `Drawings.facts`, and the values that their numbers are positions in.
FACTS: dict[str, tuple[str, ...]] = {
    "subject": SUBJECTS,
    "place": PLACES,
    "role": ROLES,
    "colour": COLOURS,
    "medium": MEDIA,
    "framing": FRAMINGS,
    "kind": WHO_KINDS,
}
MAXIMUM_ATTRIBUTES = max(len(table) for table in ATTRIBUTES.values())
MAXIMUM_DEGREES = max(len(table) for table in DEGREES.values())
_CHUNK = 1000

# Of each array: the shape of a row, and the type.
_LAYOUT: dict[str, tuple[tuple[int, ...], type]] = {
    "images": ((SIZE, SIZE, 3), numpy.uint8),
    "labels": ((SIZE, SIZE), numpy.uint8),
    "facts": ((len(FACTS),), numpy.int8),
    "values": ((MAXIMUM_ATTRIBUTES,), numpy.int8),
    "degrees": ((MAXIMUM_DEGREES,), numpy.float16),
    "garment": ((3,), numpy.int16),
    "backdrop": ((3,), numpy.int16),
}


@dataclass
class Drawings:
    """A set of drawings; row i of every array is drawing i.

    images (N, 128, 128, 3) uint8; labels (N, 128, 128) uint8; facts (N, 7) int8: positions in the values of FACTS, the last
    one -1 where there is no identity; values (N, 9) int8: attribute values as positions in ATTRIBUTES, -1 where there is none;
    degrees (N, 3) float16, 0 where there is none; garment and backdrop (N, 3) int16: RGB, -1 where there is none.
    """

    images: numpy.ndarray
    labels: numpy.ndarray
    facts: numpy.ndarray
    values: numpy.ndarray
    degrees: numpy.ndarray
    garment: numpy.ndarray
    backdrop: numpy.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: slice | numpy.ndarray) -> Drawings:
        """A subset: a slice (a view), or an array of row numbers (a copy)."""
        return Drawings(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def subject(self, row: int) -> str:
        """The word for the subject of drawing `row`."""
        return SUBJECTS[int(self.facts[row, 0])]

    def scene(self, row: int) -> Scene:
        """The context of drawing `row`."""
        names = list(FACTS)[1:6]
        return Scene(**{name: FACTS[name][int(self.facts[row, 1 + k])] for k, name in enumerate(names)})

    def identity(self, row: int) -> Identity | None:
        """The identity in drawing `row`; its degrees are rounded to float16."""
        kind = int(self.facts[row, 6])
        if kind < 0:
            return None
        name = WHO_KINDS[kind]
        values = {a: choices[int(v)] for (a, choices), v in zip(ATTRIBUTES[name].items(), self.values[row], strict=False)}
        degrees = {d: float(v) for d, v in zip(DEGREES[name], self.degrees[row], strict=False)}
        return Identity(name, values, degrees)


def _write_row(arrays: Mapping[str, numpy.ndarray], row: int, drawing: Drawing) -> None:
    scene, who = drawing.scene, drawing.who
    arrays["images"][row] = numpy.asarray(drawing.image)
    arrays["labels"][row] = drawing.labels
    said = (drawing.subject, scene.place, scene.role, scene.colour, scene.medium, scene.framing)
    found = [values.index(value) for values, value in zip(FACTS.values(), said, strict=False)]
    arrays["facts"][row] = (*found, WHO_KINDS.index(who.kind) if who else -1)
    arrays["values"][row], arrays["degrees"][row] = -1, 0
    if who is not None:
        for column, (name, choices) in enumerate(ATTRIBUTES[who.kind].items()):
            arrays["values"][row, column] = choices.index(who[name])
        for column, name in enumerate(DEGREES[who.kind]):
            arrays["degrees"][row, column] = who.degrees[name]
    arrays["garment"][row] = drawing.garment or -1
    arrays["backdrop"][row] = drawing.backdrop or -1


def _draw_chunk(arguments: tuple[Path, int, int, dict[str, object]]) -> None:
    """Draw a chunk into the arrays on disk, and mark it as done."""
    folder, start, stop, options = arguments
    done = folder / f"chunk-{start}.done"
    if done.exists():
        return
    arrays = {name: numpy.load(folder / f"{name}.npy", mmap_mode="r+") for name in _LAYOUT}
    for index in range(start, stop):
        _write_row(arrays, index, sample(index, **options))  # type: ignore[arg-type]
    for array in arrays.values():
        array.flush()
    done.touch()


def _create(folder: Path, count: int) -> None:
    """Make the folder with arrays of the right size, in one step."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        for name, (shape, kind) in _LAYOUT.items():
            numpy.lib.format.open_memmap(partial / f"{name}.npy", mode="w+", dtype=kind, shape=(count, *shape)).flush()
        partial.rename(folder)
    except OSError:
        # Another process was faster: both draw the same.
        if not folder.exists():
            raise
    finally:
        rmtree(partial, ignore_errors=True)


def _niced() -> None:
    os.nice(10)


def load_drawings(folder: Path, name: str, count: int, *, processes: int | None = None, **options: object) -> Drawings:
    """Draw `count` images, or map them into memory if they were drawn before; `options` go to `world.sample`.

    They lie in `<folder>/drawings/<name>-<count>-<hash>/`, where the hash is that of the version of the drawings and of the
    options. Chunks of 1,000 that were completed before an interruption are kept. `processes` draw at a low priority (None:
    one per CPU core).
    """
    text = json.dumps([VERSION, options], sort_keys=True)
    path = folder / "drawings" / f"{name}-{count}-{sha256(text.encode()).hexdigest()[:8]}"
    if not (path / "complete").exists():
        _create(path, count)
        chunks = [(path, start, min(start + _CHUNK, count), options) for start in range(0, count, _CHUNK)]
        processes = min(processes or os.cpu_count() or 1, len(chunks))
        if processes <= 1:
            for chunk in chunks:
                _draw_chunk(chunk)
        else:
            with ProcessPoolExecutor(processes, initializer=_niced) as pool:
                list(pool.map(_draw_chunk, chunks))
        (path / "complete").touch()
    return Drawings(**{key: numpy.load(path / f"{key}.npy", mmap_mode="r") for key in _LAYOUT})
