"""The sets of drawings that the networks of `mini` are trained and measured on; each is drawn when it is first asked for."""

from __future__ import annotations

from dataclasses import fields

import numpy

from mini_world.next.data import FACTS, Drawings, load_drawings
from mini_world.next.scenes import FRAMINGS, MEDIA
from mini_world.next.workspace import Workspace

PHOTO, SKETCH, AFAR = MEDIA.index("photo"), MEDIA.index("sketch"), FRAMINGS.index("afar")
_COLUMN = {name: column for column, name in enumerate(FACTS)}


def concatenate(*sets: Drawings) -> Drawings:
    """Copy several sets of drawings into one in memory."""
    return Drawings(**{f.name: numpy.concatenate([getattr(one, f.name) for one in sets]) for f in fields(Drawings)})


def base_drawings(work: Workspace) -> Drawings:
    """Those of every kind that VAE, U-Net and others are trained on, in pairs of one identity."""
    return load_drawings(work.folder, "base", work.plan.drawings)


def portraits(work: Workspace, kind: str) -> Drawings:
    """Portraits of a domain, in pairs of one identity."""
    return load_drawings(work.folder, f"portraits-{kind}", work.plan.portraits[kind], seed=1, kind=kind, portrait=True)


def held_out_portraits(work: Workspace, kind: str) -> Drawings:
    """Portraits of held-out identities, in pairs of one."""
    count = work.plan.held_out[kind]
    return load_drawings(work.folder, f"heldout-{kind}", count, seed=2, kind=kind, held_out=True, portrait=True)


def held_out_scenes(work: Workspace) -> Drawings:
    """Drawings of every kind with held-out identities."""
    return load_drawings(work.folder, "heldout-scenes", work.plan.scenes, seed=3, held_out=True)


def tower_drawings(work: Workspace) -> Drawings:
    """The image tower's, in pairs of one identity: a quarter of the base's that show it clearly, and all portraits."""
    scenes = base_drawings(work)
    scenes = scenes.select(slice(len(scenes) // 4 // 2 * 2))
    clear = (scenes.facts[:, _COLUMN["medium"]] != SKETCH) & (scenes.facts[:, _COLUMN["framing"]] != AFAR)
    pairs = numpy.flatnonzero(clear[0::2] & clear[1::2])
    rows = numpy.stack([pairs * 2, pairs * 2 + 1], 1).ravel()
    return concatenate(scenes.select(rows), *(portraits(work, kind) for kind in work.plan.portraits))


def parser_drawings(work: Workspace) -> Drawings:
    """The face parser's: portraits of faces, and drawings of every kind in the medium "photo", because users bring photos."""
    scenes = base_drawings(work)
    scenes = scenes.select(slice(len(scenes) // 6))
    rows = numpy.flatnonzero(scenes.facts[:, _COLUMN["medium"]] == PHOTO)
    return concatenate(portraits(work, "face"), scenes.select(rows))


def judge_drawings(work: Workspace) -> Drawings:
    """The judge's, none of which any other network has seen."""
    count = work.plan.judged
    more = (load_drawings(work.folder, f"judge-{kind}", count // 6 // 2 * 2, seed=9, kind=kind) for kind in ("cat", "art"))
    return concatenate(load_drawings(work.folder, "judge", count, seed=9), *more)


def draw_base(work: Workspace) -> dict[str, int]:
    """Draw the base's images and the held-out scenes; return their numbers."""
    return {"base": len(base_drawings(work)), "scenes": len(held_out_scenes(work))}


def draw_portraits(work: Workspace) -> dict[str, int]:
    """Draw all portraits; return their numbers."""
    sets = {kind: portraits(work, kind) for kind in work.plan.portraits}
    sets |= {f"held out {kind}": held_out_portraits(work, kind) for kind in work.plan.held_out}
    return {name: len(found) for name, found in sets.items()}
