"""Finding pictures that a data set has twice, exactly or nearly, in bounded memory.

A picture's signature is its difference hash (64 bits: where brightness rises from left to right
by more than noise) and its colours on a 4 × 4 grid. Two pictures look alike if at most three bits
differ and no colour by much: the first finds copies that were scaled or compressed again, the
second keeps apart what merely has the same outline.
"""

from __future__ import annotations

from collections import defaultdict

import numpy
from PIL import Image

SIGNATURE = 8 + 4 * 4 * 3
"""Bytes of a signature."""
COMPARED = 50_000
"""Pictures among which near-duplicates are looked for."""
REMEMBERED = 2_000_000
"""Pictures among which exact duplicates are looked for."""
_BITS, _COLOUR, _NOISE = 3, 12, 4
_SIDE_BY_SIDE = 32  # of pictures that agree in a band, the first ones stand for all


def signature(image: Image.Image) -> bytes:
    """Return what `Lookalikes` compares, SIGNATURE bytes."""
    box = Image.Resampling.BOX
    grey = numpy.asarray(image.convert("L").resize((9, 8), box), dtype=numpy.int16)
    rises = grey[:, 1:] > grey[:, :-1] + _NOISE  # flat parts stay 0 whatever compression did
    colours = numpy.asarray(image.convert("RGB").resize((4, 4), box), dtype=numpy.uint8)
    return numpy.packbits(rises).tobytes() + colours.tobytes()


class Lookalikes:
    """Counts duplicates while pictures go by."""

    def __init__(self) -> None:
        self.same = self.near = 0
        self.first_same: tuple[str, str] | None = None
        self.first_near: tuple[str, str] | None = None
        self._digests: dict[int, str | None] = {}
        self._seen: list[tuple[str, bytes]] = []
        # Of four bands of 16 bits, one is equal when at most three bits differ.
        self._bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)

    def add(self, name: str, digest: bytes, looks: bytes) -> None:
        """Take one more picture into account."""
        key = int.from_bytes(digest[:8], "big")
        if key in self._digests:
            self.same += 1
            self.first_same = self.first_same or (name, self._digests[key] or "another")
            return
        if len(self._digests) < REMEMBERED:
            # Names are for the first example only.
            self._digests[key] = name if len(self._digests) < COMPARED else None
        if len(self._seen) >= COMPARED:
            return
        other = self._alike(looks)
        if other is not None:
            self.near += 1
            self.first_near = self.first_near or (name, other)
        index = len(self._seen)
        self._seen.append((name, looks))
        for band in range(4):
            bucket = self._bands[band, looks[2 * band : 2 * band + 2]]
            if len(bucket) < _SIDE_BY_SIDE:
                bucket.append(index)

    def notes(self) -> list[str]:
        """Return sentences for the user; none if every picture is its own."""
        found = []
        if self.first_same:
            count = "1 picture is" if self.same == 1 else f"{self.same:,} pictures are"
            found.append(f"{count} there twice, as {_pair(self.first_same)}")
        if self.first_near:
            count = "1 picture looks" if self.near == 1 else f"{self.near:,} pictures look"
            found.append(f"{count} almost like another one, as {_pair(self.first_near)}")
        return found

    def _alike(self, looks: bytes) -> str | None:
        bits = int.from_bytes(looks[:8], "big")
        colours = numpy.frombuffer(looks, numpy.uint8, offset=8).astype(numpy.int16)
        for band in range(4):
            for index in self._bands.get((band, looks[2 * band : 2 * band + 2]), ()):
                name, other = self._seen[index]
                if (bits ^ int.from_bytes(other[:8], "big")).bit_count() > _BITS:
                    continue
                theirs = numpy.frombuffer(other, numpy.uint8, offset=8)
                if numpy.abs(colours - theirs).max() <= _COLOUR:
                    return name
        return None


def _pair(names: tuple[str, str]) -> str:
    return f"{names[0]} and {names[1]}"
