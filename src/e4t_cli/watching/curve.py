"""The loss curve as a picture: every report as a dot, and the line that the eye looks for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE, LEFT, RIGHT, TOP, BOTTOM = (960, 540), 90, 30, 40, 60
PAPER, INK, GRID, DOT, LINE = (255,) * 3, (40,) * 3, (228,) * 3, (176, 196, 222), (31, 87, 160)
DOTS = 4000
"""More reports than these are thinned out for the dots; the line sees all of them."""
WINDOW = 0.02
"""Share of the run over which the line is smoothed."""


def draw_losses(steps: Sequence[int], losses: Sequence[float], title: str = "loss") -> Image.Image:
    """Return the curve of some reports.

    Args:
        steps: where they were made, rising.
        losses: one each, finite.
        title: above the curve.
    """
    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    draw.text((LEFT, 12), title, fill=INK, font=font)
    if not losses:
        return image
    line = smoothed(losses)
    # A few wild first steps would flatten everything after them.
    ordered = sorted(losses)
    low = min(ordered[0], min(line))
    high = max(ordered[int(0.99 * (len(ordered) - 1))], max(line[len(line) // 50 :]))
    marks = ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])
    first, last = min(steps[0], 0), max(steps[-1], 1)
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def across(step: float) -> float:
        return LEFT + (step - first) / (last - first) * width

    def down(loss: float) -> float:
        return TOP + (high - min(max(loss, low), high)) / ((high - low) or 1) * height

    for mark in marks:
        y = down(mark)
        draw.line((LEFT, y, LEFT + width, y), fill=GRID)
        draw.text((LEFT - 8, y), f"{mark:.4g}", fill=INK, font=font, anchor="rm")
    for mark in ticks(first, last):
        if first <= mark <= last:
            x = across(mark)
            draw.line((x, TOP + height, x, TOP + height + 5), fill=INK)
            draw.text((x, TOP + height + 10), f"{mark:,.0f}", fill=INK, font=font, anchor="mt")
    draw.line((LEFT, TOP + height, LEFT + width, TOP + height), fill=INK)
    draw.text((LEFT + width, SIZE[1] - 8), "step", fill=INK, font=font, anchor="rb")
    for index in range(0, len(losses), math.ceil(len(losses) / DOTS)):
        x, y = across(steps[index]), down(losses[index])
        draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=DOT)
    points = [(across(step), down(loss)) for step, loss in zip(steps, line, strict=True)]
    if len(points) > 1:
        draw.line(points, fill=LINE, width=2, joint="curve")
    return image


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the exponential mean over about `WINDOW` of the run, without the pull of its start."""
    keep = 1 - 1 / max(1.0, WINDOW * len(losses))
    mean = weight = 0.0
    line = []
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        line.append(mean / weight)
    return line


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers that span a range; around a single number, some on both sides."""
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    span = high - low
    unit = 10 ** math.floor(math.log10(span / about))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k * about >= span)
    return [step * k for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
