"""Draws cats and dogs from the front, in local units around the head."""

from __future__ import annotations

from mini_world.next.canvas import Colour, Pen, mix, shade, tinted
from mini_world.next.identities import CAT_EYES, FUR, NOSES, PAINTED, Identity

INK: Colour = (16, 14, 18)
WHITE: Colour = (255, 255, 255)
PINK: Colour = (244, 150, 158)


def head_pen(pen: Pen, who: Identity) -> Pen:
    """The pen of the head, which is wider or narrower than the body's."""
    wide = who.degrees["width"]
    return pen.stretched(1 + 0.16 * wide, 1 - 0.05 * wide)


def _colours(who: Identity) -> tuple[Colour, Colour, Colour]:
    """The colours of the coat, of its markings, and of its outline, which is seen before any background."""
    coat = tinted(FUR[who["fur"]], who.degrees["tint"])
    light = _is_light(who)
    marking = shade(coat, 0.42) if light else (238, 228, 208)
    outline = shade(coat, 0.66) if light else mix(coat, WHITE, 0.22)
    return coat, marking, outline


def _is_light(who: Identity) -> bool:
    """Whether the coat is light; that does not change with its tint."""
    return who["fur"] not in ("black", "brown")


def _has_dark_muzzle(who: Identity) -> bool:
    return (who["pattern"] == "masked") == _is_light(who)


def draw_cat(pen: Pen, who: Identity) -> None:
    """A cat with tail, whiskers and the pattern of its coat."""
    coat, marking, outline = _colours(who)
    head = head_pen(pen, who)
    tail = [(0.9, 2.75), (1.6, 2.6), (1.92, 2.1), (1.78, 1.4)]
    pen.line(tail, 0.52, outline, "animal")
    pen.line(tail, 0.38, coat, "animal")
    for grow, colour in ((0.07, outline), (0.0, coat)):
        pen.rectangle(-0.7 - grow, 0.7, 0.7 + grow, 2.0, colour, "animal")
        pen.ellipse(0, 2.65, 1.2 + grow, 1.55 + grow, colour, "animal")
        pen.rectangle(-1.2 - grow, 2.7, 1.2 + grow, 8.0, colour, "animal")
    pattern = who["pattern"]
    if pattern == "striped":
        for y in (1.95, 2.5, 3.05, 3.6):
            for side in (-1, 1):
                pen.line([(side * 1.1, y), (side * 0.55, y + 0.14)], 0.2, marking, "animal")
    elif pattern == "patched":
        pen.ellipse(0.62, 2.7, 0.52, 0.75, marking, "animal")
    elif pattern == "masked":
        pen.ellipse(0, 2.2, 0.5, 0.7, marking, "animal")
    for side in (-1, 1):
        _draw_cat_ear(head, side, who["ears"], coat, outline)
    for grow, colour in ((0.07, outline), (0.0, coat)):
        head.ellipse(0, 0, 1.14 + grow, 1.0 + grow, colour, "animal")
    for side in (-1, 1):
        if who["ears"] != "folded":
            break
        head.polygon([(side * 0.3, -0.98), (side * 1.22, -1.08), (side * 1.02, -0.36)], outline, "animal")
        head.polygon([(side * 0.42, -0.93), (side * 1.12, -0.99), (side * 0.97, -0.5)], shade(coat, 0.8), "animal")
    if pattern == "striped":
        for x, end in ((-0.34, -0.42), (0, -0.34), (0.34, -0.42)):
            head.line([(x, -0.86), (x * 0.9, end)], 0.17, marking, "animal")
        for side in (-1, 1):
            for y in (-0.02, 0.3):
                head.line([(side * 1.02, y), (side * 0.84, y + 0.04)], 0.15, marking, "animal")
    elif pattern == "patched":
        head.ellipse(0.5, -0.14, 0.5, 0.54, marking, "animal")
    elif pattern == "masked":
        head.ellipse(0, 0.22, 0.82, 0.66, marking, "animal")
    else:
        head.ellipse(0, 0.46, 0.42, 0.32, mix(coat, WHITE, 0.2), "animal")
    for side in (-1, 1):
        head.ellipse(side * 0.46, -0.08, 0.32, 0.3, INK, "animal")
        head.ellipse(side * 0.46, -0.08, 0.27, 0.25, CAT_EYES[who["eyes"]], "animal")
        head.ellipse(side * 0.46, -0.08, 0.09, 0.22, INK, "animal")
        head.ellipse(side * 0.46 - 0.1, -0.17, 0.06, 0.06, WHITE, "animal")
    muzzle = marking if pattern == "masked" else coat
    whisker = (96, 88, 92) if who["fur"] in ("white", "cream") else (250, 250, 250)
    for side in (-1, 1):
        for y, end in ((0.36, 0.2), (0.5, 0.58)):
            head.line([(side * 0.62, y), (side * 1.52, end)], 0.078, whisker, "animal")
    dark = (206, 190, 186) if _has_dark_muzzle(who) else (54, 30, 34)
    head.line([(0, 0.4), (0, 0.58)], 0.085, dark, "animal")
    for side in (-1, 1):
        head.curve(side * 0.16, 0.54, 0.17, 0.15, 2.4, 0.085, dark, "animal")
    if _has_dark_muzzle(who) and who["nose"] == "dark":
        head.polygon([(-0.33, 0.12), (0.33, 0.12), (0, 0.54)], mix(muzzle, WHITE, 0.45), "animal")
    head.polygon([(-0.26, 0.16), (0.26, 0.16), (0, 0.47)], NOSES[who["nose"]], "animal")
    draw_collar(pen, who["collar"], 1.1)


def _draw_cat_ear(head: Pen, side: int, kind: str, coat: Colour, outline: Colour) -> None:
    if kind == "pointed":
        head.polygon([(side * 1.14, -0.05), (side * 1.2, -1.64), (side * 0.2, -0.88)], outline, "animal")
        head.polygon([(side * 1.07, -0.1), (side * 1.13, -1.5), (side * 0.28, -0.85)], coat, "animal")
        head.polygon([(side * 0.97, -0.5), (side * 1.02, -1.24), (side * 0.52, -0.84)], PINK, "animal")
    elif kind == "round":
        head.ellipse(side * 0.84, -0.84, 0.53, 0.53, outline, "animal")
        head.ellipse(side * 0.84, -0.84, 0.46, 0.46, coat, "animal")
        head.ellipse(side * 0.86, -0.88, 0.27, 0.27, PINK, "animal")


def draw_dog(pen: Pen, who: Identity) -> None:
    """A dog with a muzzle and a big nose."""
    coat, marking, outline = _colours(who)
    head = head_pen(pen, who)
    pattern = who["pattern"]
    for grow, colour in ((0.07, outline), (0.0, coat)):
        pen.rectangle(-0.78 - grow, 0.7, 0.78 + grow, 2.0, colour, "animal")
        pen.ellipse(0, 2.75, 1.3 + grow, 1.5 + grow, colour, "animal")
        pen.rectangle(-1.3 - grow, 2.8, 1.3 + grow, 8.0, colour, "animal")
    if pattern == "spotted":
        for x, y in ((-0.75, 2.1), (0.6, 2.3), (-0.3, 2.8), (0.75, 3.1), (-0.85, 3.2)):
            pen.ellipse(x, y, 0.24, 0.22, marking, "animal")
    elif pattern == "patched":
        pen.ellipse(-0.62, 2.7, 0.52, 0.75, marking, "animal")
    elif pattern == "masked":
        pen.ellipse(0, 2.3, 0.55, 0.7, marking, "animal")
    if who["ears"] == "pointed":
        for side in (-1, 1):
            head.polygon([(side * 1.04, -0.05), (side * 1.06, -1.56), (side * 0.2, -0.84)], outline, "animal")
            head.polygon([(side * 0.97, -0.1), (side * 1.0, -1.42), (side * 0.28, -0.82)], shade(coat, 0.84), "animal")
            head.polygon([(side * 0.86, -0.55), (side * 0.9, -1.12), (side * 0.5, -0.84)], PINK, "animal")
    for grow, colour in ((0.07, outline), (0.0, coat)):
        head.ellipse(0, 0, 1.02 + grow, 1.04 + grow, colour, "animal")
    if pattern == "patched":
        head.ellipse(-0.44, -0.16, 0.44, 0.5, marking, "animal")
    elif pattern == "spotted":
        for x, y in ((-0.42, -0.66), (0.24, -0.74), (0.72, -0.3), (-0.8, 0.08), (0.8, 0.3)):
            head.ellipse(x, y, 0.16, 0.15, marking, "animal")
    long = who["muzzle"] == "long"
    bottom = 1.3 if long else 0.86
    muzzle = marking if pattern == "masked" else mix(coat, WHITE, 0.34)
    wide = 0.5 if long else 0.66
    centre, half = (bottom + 0.14) / 2, (bottom - 0.14) / 2
    head.ellipse(0, centre, wide + 0.06, half + 0.07, shade(muzzle, 0.78), "animal")
    head.ellipse(0, centre, wide, half, muzzle, "animal")
    nose = bottom - 0.62 if long else 0.36
    mouth = nose + 0.36 if long else nose + 0.26
    dark = (206, 190, 186) if _has_dark_muzzle(who) else (54, 30, 34)
    if who["tongue"] == "panting":
        head.rectangle(-0.21, mouth, 0.21, mouth + 0.36, (240, 96, 120), "animal")
        head.ellipse(0, mouth + 0.36, 0.21, 0.22, (240, 96, 120), "animal")
        head.line([(0, mouth + 0.1), (0, mouth + 0.34)], 0.08, (196, 56, 84), "animal")
    head.line([(0, nose), (0, mouth)], 0.085, dark, "animal")
    for side in (-1, 1):
        head.curve(side * 0.17, mouth - 0.06, 0.18, 0.13, 2.6, 0.085, dark, "animal")
    if _has_dark_muzzle(who):
        head.ellipse(0, nose, 0.34, 0.25, mix(muzzle, WHITE, 0.4), "animal")
    head.ellipse(0, nose, 0.27, 0.19, INK, "animal")
    head.ellipse(-0.08, nose - 0.08, 0.075, 0.05, (150, 150, 160), "animal")
    for side in (-1, 1):
        if who["ears"] == "floppy":
            head.ellipse(side * 1.04, 0.06, 0.4, 0.88, outline, "animal")
            head.ellipse(side * 1.05, 0.06, 0.33, 0.81, shade(coat, 0.7), "animal")
        head.ellipse(side * 0.42, -0.18, 0.23, 0.25, INK, "animal")
        head.ellipse(side * 0.42, -0.17, 0.2, 0.22, WHITE, "animal")
        head.ellipse(side * 0.41, -0.15, 0.145, 0.17, (52, 30, 18), "animal")
        head.ellipse(side * 0.41 - 0.06, -0.22, 0.05, 0.05, WHITE, "animal")
    draw_collar(pen, who["collar"], 1.38)


def draw_collar(pen: Pen, kind: str, y: float) -> None:
    """A collar with a golden tag below the head."""
    if kind == "none":
        return
    colour = PAINTED[kind]
    pen.curve(0, y - 0.2, 0.84, 0.42, 2.5, 0.36, shade(colour, 0.62), "animal")
    pen.curve(0, y - 0.2, 0.84, 0.42, 2.5, 0.25, colour, "animal")
    pen.ellipse(0, y + 0.38, 0.2, 0.2, (176, 130, 20), "animal")
    pen.ellipse(0, y + 0.38, 0.15, 0.15, (255, 216, 60), "animal")
