"""Contact sheets: many pictures in one, each above its caption."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from e4t_cli.errors import printable

CELL = 256
"""Side in pixels that a picture of a contact sheet should have at least, about."""

CAPTION_SIZE, CAPTION_LINES, MARGIN = 17, 3, 12
INK, PAPER = (40, 40, 40), (255, 255, 255)


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int | None = None
) -> Image.Image:
    """Return one picture of many, each above its caption.

    Small pictures are scaled up by a whole factor to about 256 pixels, so that the 64-pixel
    world of `mini` can be looked at without guessing.

    Args:
        pictures: all scaled alike to the size of the last one.
        captions: one each.
        columns: pictures a row; by default as square as possible.
    """
    width, height = pictures[-1].size
    factor = max(1, round(CELL / width))
    cell = (width * factor, height * factor)
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    font = ImageFont.load_default(CAPTION_SIZE)
    texts = [_wrapped(caption, font, cell[0]) for caption in captions]
    line = CAPTION_SIZE + 4
    below = line * max(text.count("\n") + 1 for text in texts) + 4
    rows = math.ceil(len(pictures) / columns)
    step = (cell[0] + MARGIN, cell[1] + below + MARGIN)
    sheet = Image.new("RGB", (columns * step[0] + MARGIN, rows * step[1] + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left = MARGIN + index % columns * step[0]
        top = MARGIN + index // columns * step[1]
        sheet.paste(picture.convert("RGB").resize(cell, Image.Resampling.LANCZOS), (left, top))
        draw.multiline_text((left, top + cell[1] + 4), text, fill=INK, font=font, spacing=4)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Break a caption into lines of at most `width` pixels, the last one cut short if need be."""
    lines = [""]
    for word in printable(text, limit=1000).split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:  # a word wider than the cell is broken anywhere
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > CAPTION_LINES:
        last = lines[CAPTION_LINES - 1]
        while font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: CAPTION_LINES - 1], last.rstrip() + "…"]
    return "\n".join(lines)
