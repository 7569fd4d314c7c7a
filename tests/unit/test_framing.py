"""Frames: the same crop for the photo, its mask and its transparency."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from e4t_cli.images.framing import Frame
from e4t_cli.images.loading import center_square

SIZES = [(64, 64), (90, 70), (71, 200), (301, 300), (64, 1000)]


def noise(size, mode="RGB"):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_the_centred_frame_is_pillows_own_fit_bit_for_bit(size):
    image = noise(size)
    expected = ImageOps.fit(image, (48, 48), Image.Resampling.LANCZOS)
    assert Frame.centered(size).apply(image, 48).tobytes() == expected.tobytes()
    assert center_square(image, 48).tobytes() == expected.tobytes()


@pytest.mark.parametrize("turn", [0.0, 4.0, -15.0, 90.0, 179.0])
def test_what_it_was_made_of(turn):
    frame = Frame.around((400, 300), (170.0, 110.0), 80.0, turn)
    assert frame.turn == pytest.approx(turn)
    assert frame.side == pytest.approx(80)
    assert frame.center == pytest.approx((170, 110))
    for place in ((0.2, 0.9), (1.3, -0.4)):
        assert frame.from_photo(frame.to_photo(*place)) == pytest.approx(place)
    upper_left, lower_left, lower_right, upper_right = frame.quad
    assert math.dist(upper_left, lower_right) == pytest.approx(math.dist(lower_left, upper_right))
    assert math.dist(upper_left, lower_left) == pytest.approx(80)


def marked(size, points, r=7):
    """A dark image with a bright disc at each point."""
    image = Image.new("RGB", size, (20, 20, 20))
    for (x, y), colour in zip(points, ("red", "lime", "blue"), strict=True):
        # Pillow draws both ends of the box: one pixel less, and the centre is the point.
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=colour)
    return image


def found(image):
    """Centre of each bright disc."""
    values = np.asarray(image, dtype=float)
    for channel in range(3):
        weight = np.clip(values[..., channel] - 60, 0, None)
        rows, columns = np.indices(weight.shape) + 0.5
        yield (columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()


@pytest.mark.parametrize("size", [32, 128, 300, 700])
@pytest.mark.parametrize("turn", [0.0, 12.0, -40.0, 90.0, 180.0])
def test_points_land_where_the_frame_maps_them(size, turn):
    points = [(260.0, 180.0), (340.0, 200.0), (300.0, 290.0)]
    frame = Frame.around((640, 480), (300.0, 220.0), 280.0, turn)
    cut = frame.apply(marked((640, 480), points), size)
    assert cut.size == (size, size)
    for place, point in zip(found(cut), points, strict=True):
        expected = [fraction * size for fraction in frame.from_photo(point)]
        assert math.dist(place, expected) < 0.1 + size / 2000


def test_a_frame_over_the_border_mirrors_images_and_blackens_masks():
    image = noise((100, 100))
    frame = Frame.around((100, 100), (20.0, 50.0), 100.0)
    cut = np.asarray(frame.apply(image, 100), dtype=int)
    whole = np.asarray(image, dtype=int)
    assert np.abs(cut[:, 30:] - whole[:, :70]).max() <= 1
    assert np.abs(cut[:, :30][:, ::-1] - whole[:, :30]).max() <= 1
    mask = np.asarray(frame.apply_to_mask(Image.new("L", (100, 100), 255), 100))
    assert mask[:, :29].max() == 0 and mask[:, 31:].min() == 255
    grey = np.asarray(frame.apply(image, 100, outside=(9, 9, 9)))
    assert (grey[:, :29] == 9).all()


def test_masks_of_another_size_are_cut_alike():
    frame = Frame.around((200, 100), (120.0, 50.0), 60.0, 10.0)
    mask = Image.new("L", (200, 100))
    ImageDraw.Draw(mask).ellipse((90, 20, 150, 80), fill=255)
    large = mask.resize((800, 400), Image.Resampling.BICUBIC)
    one, other = (np.asarray(frame.apply_to_mask(m, 64), dtype=float) for m in (mask, large))
    assert np.abs(one - other).mean() < 4
    assert 0.2 < one.mean() / 255 < 0.95


def test_a_view_within_a_view():
    outer = Frame.around((500, 400), (250.0, 180.0), 200.0, 30.0)
    inner = Frame.around((64, 64), (40.0, 20.0), 32.0, -10.0)
    both = outer.within(inner)
    assert both.turn == pytest.approx(20)
    assert both.side == pytest.approx(100)
    assert both.center == pytest.approx(outer.to_photo(40 / 64, 20 / 64))


def test_large_photos_are_reduced_without_moving():
    size = (3000, 2000)
    points = [(1400.0, 900.0), (1700.0, 950.0), (1500.0, 1300.0)]
    image = marked(size, points, r=60)
    frame = Frame.around(size, (1500.0, 1100.0), 1500.0, 7.0)
    for place, point in zip(found(frame.apply(image, 64)), points, strict=True):
        expected = [fraction * 64 for fraction in frame.from_photo(point)]
        assert math.dist(place, expected) < 0.2


@pytest.mark.parametrize("numbers", [((0, 5), (0, 0), (1, 0)), ((5, 5), (0, 0), (0, 0))])
def test_no_square_no_frame(numbers):
    size, corner, edge = numbers
    with pytest.raises(ValueError, match="a frame must be"):
        Frame(size=size, corner=corner, edge=edge)
    beside = Frame.around((100, 100), (900.0, 50.0), 50.0, 5.0)
    with pytest.raises(ValueError, match="does not overlap the photo"):
        beside.apply(noise((100, 100)), 32)
