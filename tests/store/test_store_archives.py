"""F9: untrusted zip archives. One bad member refuses the archive, and nothing is unpacked."""

import os
import stat
import struct
import zipfile

import pytest

from e4t_cli.errors import InputError, IntegrityError
from e4t_cli.registry.discovery import user_domains_folder
from e4t_cli.registry.store import add_domain
from tests.store.conftest import FILES, write_domain_folder, write_zip


@pytest.fixture
def archive(folder, tmp_path):
    """A sound zip."""
    return write_zip(tmp_path / "dogs.zip", folder)


def refused(path, says, kind=IntegrityError):
    with pytest.raises(kind, match=says) as caught:
        add_domain(path)
    assert "\x1b" not in str(caught.value)
    assert os.listdir(user_domains_folder()) == []


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/passwd", "a/../../evil", "C:evil", "C:\\evil", "\\\\host\\x", "..\\evil",
     "~/evil", "./x", "a//b", "x\0.safetensors", "..", "\x1b[31m/../x"],
)  # fmt: skip
def test_F9_members_outside_the_folder(archive, name):
    info = zipfile.ZipInfo("placeholder")
    info.filename = info.orig_filename = name
    with zipfile.ZipFile(archive, "a") as added:
        added.writestr(info, b"evil")
    refused(archive, "holds a file for another place")


def test_F9_a_name_that_reads_differently(archive):
    """The directory has one name, Python would cut it at the NUL: the stored name is checked."""
    data = archive.read_bytes().replace(b"encoder.safetensors", b"encoder.safe\0ensors")
    archive.write_bytes(data)
    refused(archive, "another place")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_F9_links_and_devices(archive, kind):
    info = zipfile.ZipInfo("link")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as added:
        added.writestr(info, "/etc/passwd")
    refused(archive, "a link or a device")


def test_F9_two_of_one_name(archive, recwarn):
    with zipfile.ZipFile(archive, "a") as added:
        added.writestr("encoder.safetensors", b"the other")
    refused(archive, "two files of the name")


def test_F9_a_bomb(folder, tmp_path):
    with (folder / "zeros.json").open("wb") as file:
        file.truncate(150_000_000)
    path = write_zip(tmp_path / "bomb.zip", folder)
    assert path.stat().st_size < 1_000_000
    refused(path, "unpacks to 150,0")


def test_F9_many_members(archive):
    with zipfile.ZipFile(archive, "a") as added:
        for index in range(1001):
            added.writestr(f"{index}.txt", b"")
    refused(archive, "members: that is no domain folder")


def test_F9_sizes_that_lie(archive):
    """The directory states 60 bytes for a manifest that is longer: reading stops there."""
    with zipfile.ZipFile(archive) as found:
        length = found.getinfo("domain.toml").file_size
    data = archive.read_bytes()
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"domain.toml"))
    lying = data[: at + 24] + struct.pack("<I", 60) + data[at + 28 :]
    assert struct.unpack_from("<I", data, at + 24) == (length,)
    archive.write_bytes(lying)
    refused(archive, "damaged|not TOML|cannot be used")


def test_an_encrypted_member(archive):
    data = bytearray(archive.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"encoder.safetensors"))
    data[at + 8] |= 1
    archive.write_bytes(data)
    refused(archive, "is encrypted")


def test_a_damaged_member(archive):
    data = bytearray(archive.read_bytes())
    at = data.index(b"encoder.safetensors") + 19
    data[at + 4] ^= 0xFF
    archive.write_bytes(data)
    refused(archive, r"encoder\.safetensors in .* is damaged")


def test_a_cut_archive(archive):
    archive.write_bytes(archive.read_bytes()[:-30])
    refused(archive, "is not a zip", InputError)


def test_archives_with_no_domain_or_two(tmp_path, folder):
    empty = tmp_path / "empty.zip"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("readme.txt", "hello")
        archive.writestr("a/b/domain.toml", "too deep")
    refused(empty, r"no domain: it has no domain\.toml at its top")
    two = tmp_path / "two.zip"
    other = write_domain_folder(tmp_path / "other", name="cats")
    with zipfile.ZipFile(two, "w") as archive:
        for number, source in enumerate((folder, other)):
            for file in source.iterdir():
                archive.write(file, f"{number}/{file.name}")
    refused(two, "more than one")


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_F3_damaged_members_of_every_compression(folder, tmp_path, kind):
    """Each decompressor has exceptions of its own; whichever byte is wrong, the archive is damaged."""
    path = tmp_path / "dogs.zip"
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.write(folder / "domain.toml", "domain.toml")
        archive.writestr("encoder.safetensors", os.urandom(600))
        start = archive.getinfo("encoder.safetensors").header_offset
    sound = path.read_bytes()
    for place in (30, 34, 38, 60, start + 60, start + 64, start + 68, start + 90, start + 200):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 0xFF]) + sound[place + 1 :])
        with pytest.raises((IntegrityError, InputError)):
            add_domain(path)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"image_layers": 10**9}, "sizes in my_dogs are wrong"),
        ({"image_layers": "4"}, "sizes in my_dogs are wrong"),
        ({"hidden_width": 0}, "sizes in my_dogs are wrong"),
        ({"hidden_width": 9}, "has shape"),
        ({"image_layers": 3}, "unexpected tensor"),
        ({"image_layers": 5}, "lacks tensor"),
        ({"architecture": "unknown"}, "architecture 'unknown' is unknown"),
    ],
)
def test_an_encoder_of_impossible_sizes_is_not_added(tmp_path, sizes, says):
    """A domain that `add` calls ready can be loaded: the sizes of the manifest are those of the file."""
    from safetensors.torch import save

    from e4t_cli.models.domain_folder import empty_encoder

    stated = {"image_layers": 4, "image_width": 8, "unet_widths": [4, 8], "hidden_width": 8, "embedding_width": 16}
    encoder = empty_encoder(stated).to_empty(device="cpu")
    files = {**FILES, "encoder.safetensors": save(encoder.state_dict())}
    with pytest.raises(IntegrityError, match=says):
        add_domain(write_domain_folder(tmp_path / "bad", files, encoder={**stated, **sizes}))
    assert os.listdir(user_domains_folder()) == []
    added = add_domain(write_domain_folder(tmp_path / "good", files, encoder=stated))
    assert added.manifest.encoder == stated
