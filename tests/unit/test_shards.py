"""Tar shards member by member: every picture is an image or is named, and no archive ends short in silence."""

import bz2
import gzip
import io
import lzma
import tarfile

import pytest

from e4t_cli.datasets.sources import find_source
from e4t_cli.errors import InputError, UsageError
from tests.conftest import drawn_face

pytest.importorskip("webdataset")


def png(index=0):
    buffer = io.BytesIO()
    drawn_face(index, 64)[0].save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def member(name, data=PNG, **more):
    about = tarfile.TarInfo(name)
    about.size = len(data)
    for key, value in more.items():
        setattr(about, key, value)
    return about, io.BytesIO(data)


def tar(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as shard:
        for one in members:
            shard.addfile(*(member(one) if isinstance(one, str) else one))
    return buffer.getvalue()


@pytest.fixture
def read(tmp_path):
    """Write a shard and return the names of its images and what is said about the others, without the shard's name."""

    def write_and_read(data, name="s.tar"):
        path = tmp_path / name
        path.write_bytes(data)
        source = find_source(path)
        good, bad = [], {}
        for item in source:
            shown = item.name.removeprefix(f"{name}/").replace(str(path), "shard")
            if item.fault:
                bad[shown] = item.fault
            else:
                good.append(shown)
        return good, bad, source

    return write_and_read


# ── names ──

DOTS = [
    "IMG_2024.05.01_03.png",
    "IMG_2024.05.01_04.png",
    "v1.2/a.b.c.PNG",
    "dots.v1.0/x.jpg",
    "no_folder.jpeg",
    "a..png",
]


@pytest.mark.parametrize("names", [DOTS, DOTS[:1], ["a.0.jpg", "a.1.jpg", "a.jpg"], ["x.jpg", "x.png"]])
def test_names_with_dots_lose_no_picture(read, names):
    good, bad, source = read(tar(*names))
    assert good == names and not bad
    assert source.approximate_len == len(names)
    assert sorted(item.name for item in source.shuffled(1, 0, 0, 1)) == sorted(f"s.tar/{name}" for name in names)


@pytest.mark.parametrize(
    "passed_over",
    ["._a.png", "__MACOSX/a.png", "x/__MACOSX/._a.png", ".hidden/a.png", "PaxHeaders.17/a.png", "@eaDir/a.jpg/M.jpg",
     "#recycle/a.png", ".thumbnails/a.png", "@Recycle/a.png", "Thumbs.db", "$RECYCLE.BIN/a.png", ".AppleDouble/a.png"],
)  # fmt: skip
def test_what_systems_add_is_passed_over_in_shards_and_folders(read, tmp_path, passed_over):
    good, bad, source = read(tar("./a.png", passed_over))
    assert (good, bad, source.other_files, source.approximate_len) == (["./a.png"], {}, 0, 1)
    for name in ("a.png", passed_over):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    folder = find_source(tmp_path / "folder")
    assert [item.name for item in folder] == ["a.png"] and folder.other_files == 0


def test_what_belongs_to_a_picture_is_counted(read, tmp_path):
    names = ["1.jpg", "1.json", "1.txt", "1.seg.png", "1.depth.png", "1.cls"]
    good, bad, source = read(tar(*map(member, names[:-1]), member("1.cls", b"7"), "__meta__/x.png"))
    assert (good, bad, source.other_files, source.approximate_len) == (["1.jpg"], {}, 5, 1)
    (tmp_path / "folder").mkdir()
    for name in names[:-1]:
        (tmp_path / "folder" / name).write_bytes(PNG)
    folder = find_source(tmp_path / "folder")
    assert [item.name for item in folder] == ["1.jpg"] and folder.other_files == 4


def test_a_name_that_tells_nothing_is_opened(read):
    good, bad, source = read(
        tar("IMG_0007", "photo.JPG_large", member("README", b"dogs"), member("x.mp4", b"\0" * 99))
    )
    assert (good, bad, source.other_files) == (["IMG_0007", "photo.JPG_large"], {}, 2)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "JPEG2000", "MPO"])
def test_other_formats_are_used_by_name_and_by_content(read, kind):
    from PIL import Image, features

    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    buffer = io.BytesIO()
    drawn_face(0, 64)[0].save(buffer, kind)
    suffix = {"JPEG2000": "jp2", "MPO": "jpg"}.get(kind, kind.lower())
    members = [member(f"a.{suffix.upper()}", buffer.getvalue())]
    if kind != "JPEG2000":
        members.append(member("no_suffix", buffer.getvalue()))
    good, bad, source = read(tar(*members))
    assert good == [about.name for about, _ in members] and not bad
    for item in source:
        assert Image.open(io.BytesIO(item.image)).size == (64, 64)


@pytest.mark.parametrize("name", ["../../a.png", "/a.png", "a/../b.png", "\x1b[31m.png", "x" * 300 + ".png"])
def test_names_that_lead_elsewhere_are_only_names(read, tmp_path, name):
    good, bad, _ = read(tar(name))
    assert good == [name] and not bad
    assert not list(tmp_path.glob("**/*.png"))


def test_shards_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(tar("1.png"))
    found = [item.name for item in find_source(f"{tmp_path}/*/0.tar")]
    assert found == [f"{tmp_path}/{folder}/0.tar/1.png" for folder in "ab"]


# ── members that hold no picture ──


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (member("b.png", b"", type=tarfile.LNKTYPE, linkname="a.png"), "a link to a.png"),
        (member("b.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link to /etc/passwd"),
        (member("b.png", b"", type=tarfile.FIFOTYPE), "not a plain file"),
        (member("b.png", type=b"M"), "another volume"),
        (member("a.png", png(1)), "two members of this name; the first"),
    ],
)
def test_members_without_a_picture_of_their_own_are_named(read, odd, says):
    good, bad, source = read(tar("a.png", odd, "c.png"))
    assert good == ["a.png", "c.png"]
    [(name, fault)] = bad.items()
    assert name == odd[0].name and says in fault


def test_a_member_that_is_too_large_is_not_read(read, monkeypatch):
    monkeypatch.setattr("e4t_cli.datasets.shards.MAX_BYTES", 4 << 20)
    good, bad, _ = read(tar("a.png", member("b.png", b"\0" * (5 << 20)), "c.png"))
    assert (good, bad) == (["a.png", "c.png"], {"b.png": "it is larger than 4 MiB"})


def test_an_empty_member_is_a_bad_image(read):
    *_, source = read(tar(member("a.png", b"")))
    with pytest.raises(InputError):
        next(iter(source)).prepare(None, None)


# ── archives that end where they should not ──


def test_a_cut_at_any_block_is_reported(read):
    whole = tar("a.png", "b.png", "c.png")
    each = 512 + -(-len(PNG) // 512) * 512
    for cut in range(0, len(whole) + 1, 512):
        good, bad, _ = read(whole[:cut])
        assert good == ["a.png", "b.png", "c.png"][: max(cut // each, 0)]
        if cut > 3 * each:  # a block of the end mark is there
            assert not bad
        else:
            assert list(bad) == ["shard"] and bad["shard"].startswith("this shard breaks off: ")


PACK = {".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_shards_whole_and_cut(read, suffix):
    packed = PACK[suffix](tar("a.png", *(f"{index}.png" for index in range(9))))
    good, bad, source = read(packed, f"s{suffix}")
    assert len(good) == source.approximate_len == 10 and not bad
    for cut in {1, 3, 9, 20, len(packed) // 2, len(packed) - 40}:
        good, bad, source = read(packed[:cut], f"s{suffix}")
        assert len(good) < 10 or cut > len(packed) // 2
        assert bad == {} or "breaks off" in bad["shard"]
        assert bad or len(good) == 10
    for place in range(20, len(packed), len(packed) // 7):
        read(packed[:place] + bytes([packed[place] ^ 0xFF]) + packed[place + 1 :], f"s{suffix}")  # raises nothing


@pytest.mark.parametrize("place", [0, 100, 148, 156, 257, 511])
def test_a_damaged_header_is_reported(read, place):
    data = bytearray(tar("a.png", "b.png"))
    start = 512 + -(-len(PNG) // 512) * 512
    data[start + place] ^= 0xFF
    good, bad, _ = read(bytes(data))
    assert good == ["a.png"] and "cut or damaged" in bad["shard"]


def test_shards_joined_by_cat_and_other_files(read):
    good, bad, _ = read(tar("a.png") + tar("b.png"))
    assert good == ["a.png"] and "joined by cat" in bad["shard"]
    for data in (b"", b"no tar", b"PK\3\4" + b"x" * 2000, b"\x28\xb5\x2f\xfd" + b"x" * 600):
        good, bad, _ = read(data)
        assert not good and "breaks off" in bad["shard"]
    assert "zstd -d" in bad["shard"]


def test_a_header_that_claims_gigabytes_is_not_read(read):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    good, bad, _ = read(tar("a.png")[:-10240] + header.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    assert "breaks off" in bad["shard"]


# ── names of sources ──


@pytest.mark.parametrize("name", ["MAC.TAR", "A.Tar.GZ", "B.TGZ"])
def test_suffixes_in_capitals(read, name):
    data = tar("a.png")
    assert read(data if name == "MAC.TAR" else gzip.compress(data), name)[:2] == (["a.png"], {})


def test_a_list_in_capitals_and_patterns_without_end(read, tmp_path):
    read(tar("a.png"))
    (tmp_path / "ALL.TXT").write_text(f"{tmp_path}/s.tar\n")
    assert len(list(find_source(tmp_path / "ALL.TXT"))) == 1
    with pytest.raises(UsageError, match="more than 1,000,000"):
        find_source("x-{0..9999999}.tar")
    with pytest.raises((UsageError, InputError)):
        find_source("x-{0..1.tar")


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_a_folder_of_shards_says_how_they_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(tar("a.png"))
    with pytest.raises(InputError, match="no image") as caught:
        find_source(tmp_path)
    assert caught.value.hint == f"--data '{tmp_path}/*.{name[2:]}' reads them"
    (tmp_path / "a.png").write_bytes(PNG)
    [note] = find_source(tmp_path).notes
    assert f"*.{name[2:]}" in note
