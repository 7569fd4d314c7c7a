"""The base of 64 pixels in the tables of the next one: its drawings, enlarged, with the attributes that both worlds have.

The judge of the next world has to read images of the old one too, whose drawings look different. It is therefore trained on
old drawings as well, one in eight, enlarged to 128 pixels. Scores of the two bases are not comparable as they are, since an old
identity has fewer attributes and other drawings; the share of the way from the plain word to drawings is, and so are shares of
words that are shown.
"""

from __future__ import annotations

import random
import zlib

import numpy
from PIL import Image

import mini_world.identities as old_identities
import mini_world.world as old_world
from mini_world.next.canvas import SIZE
from mini_world.next.data import FACTS, WHO_KINDS, Drawings
from mini_world.next.evaluate import World
from mini_world.next.identities import ATTRIBUTES, Identity
from mini_world.next.tasks import Task, prompts_of
from mini_world.next.world import Drawing, Scene

# Values with another name there.
_RENAMED = {("pattern", "plain"): "solid", ("surface", "plain"): "even"}
# Glasses had one colour for each shape, so that the frame is no attribute; no degree, mouth, nose, tongue or border existed.
NAMES = {kind: frozenset(old_identities.ATTRIBUTES[kind]) for kind in WHO_KINDS}
# Of the old world's words: hats were red, and a scarf had any of three colours.
_ABSENT_COLOUR = "scarf"


def enlarged(image: Image.Image) -> Image.Image:
    """A 64-pixel image at the size that the judge takes."""
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def identity_of(old: old_identities.Identity) -> Identity:
    """An old identity in the words of the next world; it lacks the attributes that did not exist."""
    return Identity(old.kind, {name: _RENAMED.get((name, value), value) for name, value in old.values.items()}, {})


def _scene_of(old: old_world.Scene) -> Scene:
    return Scene(old.place, old.role, "red" if old.role == "hat" else "none", old.medium, old.framing)


def _drawing_of(old: old_world.Drawing) -> Drawing:
    who = identity_of(old.who) if old.who else None
    return Drawing(old.image, old.labels, old.subject, who, _scene_of(old.scene), None, None)


def _draw(who: Identity, scene: Scene, rng: random.Random, thing: str | None) -> Drawing:
    names = {(name, new): old for (name, old), new in _RENAMED.items()}
    values = {name: names.get((name, value), value) for name, value in who.values.items()}
    # The small shift of an old identity's colours: the same in all of its drawings.
    old = old_identities.Identity(who.kind, values, zlib.crc32(repr(values).encode()))
    return _drawing_of(old_world.draw(old, old_world.Scene(scene.place, scene.role, scene.medium, scene.framing), rng, thing))


def _prompts(kind: str) -> list[Task]:
    """The same prompts; a scarf's colour was no word."""
    tasks = []
    for task in prompts_of(kind):
        if task.scene.role == _ABSENT_COLOUR:
            task = Task(task.prompt.replace("blue ", ""), Scene(task.scene.place, "scarf"), task.thing)
        tasks.append(task)
    return tasks


WORLD = World(
    identity=lambda kind, rng: identity_of(old_identities.draw_identity(kind, rng, held_out=True)),
    draw=_draw,
    prompts=_prompts,
    resize=enlarged,
    names=NAMES,
)


def old_drawings(count: int, seed: int = 9) -> Drawings:
    """Old drawings in the next world's form, enlarged; -1 and nan where the old world had no such fact."""
    arrays = Drawings(
        images=numpy.empty((count, SIZE, SIZE, 3), numpy.uint8),
        labels=numpy.zeros((count, SIZE, SIZE), numpy.uint8),
        facts=numpy.full((count, len(FACTS)), -1, numpy.int8),
        values=numpy.full((count, max(map(len, ATTRIBUTES.values()))), -1, numpy.int8),
        degrees=numpy.full((count, 3), numpy.nan, numpy.float16),
        garment=numpy.full((count, 3), -1, numpy.int16),
        backdrop=numpy.full((count, 3), -1, numpy.int16),
    )
    for row in range(count):
        old = old_world.sample(row, seed=seed)
        drawing = _drawing_of(old)
        arrays.images[row] = numpy.asarray(enlarged(drawing.image))
        scene = drawing.scene
        said = (drawing.subject, scene.place, scene.role, scene.colour, scene.medium, scene.framing)
        arrays.facts[row, :6] = [values.index(value) for values, value in zip(FACTS.values(), said, strict=False)]
        if scene.role == _ABSENT_COLOUR:
            arrays.facts[row, 3] = -1
        if drawing.who is not None:
            arrays.facts[row, 6] = WHO_KINDS.index(drawing.who.kind)
            for column, (name, choices) in enumerate(ATTRIBUTES[drawing.who.kind].items()):
                if name in drawing.who.values:
                    arrays.values[row, column] = choices.index(drawing.who[name])
    return arrays
