"""Sources of training images, without any model (rows R5 to R7 and I9 of the reliability table)."""

import io
import os

import pytest
from PIL import Image, ImageFilter

from e4t_cli.datasets.held_out import hold_out
from e4t_cli.datasets.reader import SIGNATURE, ImageReader, NearDuplicateFilter, signature
from e4t_cli.datasets.sources import FolderSource, ImageItem, find_source
from e4t_cli.errors import InputError, UsageError
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage
from tests.conftest import drawn_face

RECIPE = TuningConfig(steps=1, base_learning_rate=1e-6, reg_weight=0)
DOGS = Domain(name="dogs", descriptor="dog", tuning=RECIPE)
TARGET = PreparationTarget(size=32, base="tiny", mask=None)


def png(index=0, size=64):
    buffer = io.BytesIO()
    drawn_face(index, size)[0].save(buffer, "PNG")
    return buffer.getvalue()


def names(source):
    return [item.name for item in source]


# ── a folder (R6) ──


def test_R6_a_folder_is_read_in_order_without_what_is_hidden(tmp_path):
    for name in ("b.png", "a/2.png", "a/1.png", ".hidden.png", ".cache/x.png", "a/1.txt", "a/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    source = find_source(tmp_path)
    assert names(source) == ["a/1.png", "a/2.png", "a/x", "b.png"]
    assert source[1].image == tmp_path / "a" / "2.png"
    assert source.other_files == 3  # the caption, the FIFO and the dangling link


def test_R6_links_to_folders_are_followed_and_loops_are_none(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").touch()
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    (data / "a" / "loop").symlink_to(data)
    (data / "b").symlink_to(tmp_path / "elsewhere")
    (data / "c").symlink_to(data / "b")
    (data / "2.png").touch()
    assert names(find_source(data)) == ["2.png", "b/1.png"]


def test_R6_empty_and_unreadable_folders(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no image"):
        find_source(tmp_path)
    (tmp_path / "shut").mkdir()
    (tmp_path / "1.png").touch()
    scan = os.scandir

    def refuse(path):
        if refused in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused = "shut"
    source = find_source(tmp_path)
    assert names(source) == ["1.png"]
    assert source.notes == ["1 folder could not be read, as shut/"]
    refused = str(tmp_path)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        find_source(tmp_path)


class Entry:
    """What os.scandir yields, of a file that nobody made."""

    def __init__(self, name):
        self.name, self.path = name, name

    def is_dir(self):
        return False

    def is_file(self):
        return True


def test_R6_a_million_files_are_listed_once_and_not_opened(tmp_path, monkeypatch):
    calls = []

    class Million:
        def __enter__(self):
            calls.append(1)
            return (Entry(f"{number}.png") for number in range(1_000_000))

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Million())
    source = FolderSource(tmp_path)
    items = iter(source)
    assert next(items).name == "0.png" and next(items).name == "1.png"
    assert len(source) == 1_000_000
    assert source.fingerprint == source.fingerprint
    assert source[999_999].name == "999999.png"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("nowhere", "there is no folder nowhere"),
        ("me.png", "me.png is one file"),
        ("nul\0byte", "cannot be the name of a folder"),
        ("https://example.org/dogs", "neither shards nor a dataset"),
        ("\x1b[31m", "there is no folder \\\\x1b"),
    ],
)
def test_invalid_sources(tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me.png").write_bytes(png())
    with pytest.raises(UsageError, match=words):
        find_source(data)


# ── single images ──


def test_content_has_the_same_digest_wherever_it_is(tmp_path):
    data = png()
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "b.png").write_bytes(data)
    found = {
        ImageItem(name="x", image=content).digest()
        for content in (tmp_path / "a.png", str(tmp_path / "b.png"), data, io.BytesIO(data))
    }
    assert len(found) == 1
    content = Image.open(io.BytesIO(data))
    assert ImageItem(name="x", image=content).digest() == ImageItem(name="y", image=content).digest()
    turned = content.copy()
    turned.getexif()[0x0112] = 6
    assert ImageItem(name="x", image=turned).digest() != ImageItem(name="x", image=content).digest()
    masked = PreparedImage(image=drawn_face()[0], mask=drawn_face()[1])
    plain = PreparedImage(image=drawn_face()[0])
    assert ImageItem(name="x", image=masked).digest() != ImageItem(name="x", image=plain).digest()


def test_a_stamp_changes_with_the_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(0))
    before = ImageItem(name="a", image=path).stamp()
    assert before == ImageItem(name="b", image=str(path)).stamp()
    changed = bytearray(png(0))
    changed[-1] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(0, int(before.split("\0")[2])))  # with the old modification time
    assert ImageItem(name="a", image=path).stamp() != before
    assert ImageItem(name="a", image=tmp_path / "gone").stamp() is None
    assert ImageItem(name="a", image=png()).stamp() is None


def test_what_cannot_be_read_is_one_error(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for content, words in (
        (tmp_path / "gone.png", "No such file"),
        (tmp_path / "fifo", "not a plain file"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            ImageItem(name="x", image=content).digest()


# ── preparing them (R5) ──


def test_R5_bad_images_are_counted_and_named(tmp_path):
    bad = [b"", b"no picture", png()[:200]]
    reader = ImageReader(DOGS, TARGET, log=tmp_path / "work" / "left-out.tsv")
    items = [ImageItem(name=f"{i}.png", image=one) for i, one in enumerate([png(), *bad, png(1)])]
    found = list(reader.prepare_all(items))
    assert [isinstance(one, PreparedImage) for one in found] == [True, False, False, False, True]
    assert list(reader.left_out) == ["1.png", "2.png", "3.png"]
    reader.write_log()
    lines = (tmp_path / "work" / "left-out.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["1.png", "2.png", "3.png"]
    assert "empty" in lines[0] and "not an image" in lines[1] and "damaged" in lines[2]
    (note,) = reader.notes(100)
    assert "3 images were left out; the first: 1.png" in note and "left-out.tsv" in note


def test_R5_strict_stops_at_the_first():
    reader = ImageReader(DOGS, TARGET, strict=True)
    with pytest.raises(InputError, match=r"2\.png: .* not an image") as caught:
        list(reader.prepare_all([ImageItem(name="2.png", image=b"no picture")]))
    assert caught.value.exit_code == 3
    assert "without --strict" in caught.value.hint


def test_few_images_are_warned_about():
    reader = ImageReader(DOGS, TARGET)
    assert "99 images are few" in reader.notes(99)[0]
    assert reader.notes(100) == reader.notes(None) == []


def test_masks_are_there_if_wanted_and_only_then():
    image, mask = drawn_face()
    items = [
        ImageItem(name="a", image=PreparedImage(image=image, mask=mask)),
        ImageItem(name="b", image=PreparedImage(image=image)),
    ]
    wanted = PreparationTarget(size=32, base="tiny")
    own, white = ImageReader(DOGS, wanted).prepare_all(items)
    assert own.mask == mask
    assert white.mask.getextrema() == (255, 255)
    assert [one.mask for one in ImageReader(DOGS, TARGET).prepare_all(items)] == [None, None]


def prepared_otherwise(image, target):
    return PreparedImage(image=image.resize((target.size, target.size)))


def test_the_key_tells_preparations_apart(monkeypatch):
    import importlib.util
    from dataclasses import replace

    from e4t_cli.datasets import reader

    own = replace(DOGS, prepare=prepared_otherwise)
    keys = [
        ImageReader(DOGS, TARGET).key,
        ImageReader(DOGS, replace(TARGET, size=64)).key,
        ImageReader(DOGS, replace(TARGET, mask="auto")).key,
        ImageReader(own, TARGET).key,
    ]
    assert len(set(keys)) == 4
    assert ImageReader(own, TARGET).key == ImageReader(own, TARGET).key
    assert ImageReader(replace(DOGS, name="cats"), TARGET).key == keys[0]
    installed = importlib.util.find_spec("pi_heif") is not None
    monkeypatch.setattr(reader, "find_spec", lambda name: None if installed else name)
    assert ImageReader(DOGS, TARGET).key != keys[0]  # HEIC files are good or bad from now on


# ── duplicates (R7) ──


def compressed(image, quality, size):
    buffer = io.BytesIO()
    image.resize((size, size)).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).resize((32, 32))


def test_R7_duplicates_and_near_duplicates_are_found():
    import hashlib

    seen = NearDuplicateFilter()
    faces = [drawn_face(index, 128)[0] for index in range(6)]
    for index, face in enumerate(faces):
        seen.add(f"{index}", hashlib.sha256(face.tobytes()).digest(), signature(face))
    assert seen.notes() == []
    seen.add("again", hashlib.sha256(faces[2].tobytes()).digest(), signature(faces[2]))
    assert seen.notes() == ["1 image is there twice, as again and 2"]
    for index in (1, 4):
        other = compressed(faces[index], 60, 96)
        seen.add(f"{index}.jpg", hashlib.sha256(other.tobytes()).digest(), signature(other))
    assert seen.notes()[1] == "2 images are near duplicates, as 1.jpg and 1"
    assert (seen.same, seen.near) == (1, 2)


def test_R7_one_outline_in_other_colours_is_another_image():
    face = drawn_face(0, 128)[0]
    seen = NearDuplicateFilter()
    seen.add("a", b"a" * 32, signature(face))
    seen.add("b", b"b" * 32, signature(Image.merge("RGB", face.split()[::-1])))
    seen.add("c", b"c" * 32, signature(face.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    seen.add("d", b"d" * 32, signature(Image.effect_noise((128, 128), 60).convert("RGB")))
    assert seen.notes() == []
    seen.add("e", b"e" * 32, signature(face.filter(ImageFilter.GaussianBlur(0.7))))
    assert seen.near == 1
    assert len(signature(face)) == SIGNATURE


# ── holding some out ──


def test_held_out_images_are_the_same_ones_and_not_trained_on():
    images = [png(index) for index in range(45)]
    rest, held_out = hold_out(find_source(images), ImageReader(DOGS, TARGET))
    again, _ = hold_out(find_source(images), ImageReader(DOGS, TARGET))
    assert len(held_out) == 4
    assert len(rest) == 41
    kept = [f"image {i}" for i in range(45) if i not in (0, 11, 22, 33)]
    assert names(rest) == names(again) == kept
    assert rest.fingerprint == again.fingerprint != find_source(images).fingerprint
    few, none = hold_out(find_source(images[:9]), ImageReader(DOGS, TARGET))
    assert len(few) == 9 and none == []
