"""Shards through webdataset, and datasets through `datasets`: the two sources with packages."""

import io
import sys
import tarfile

import pytest

from e4t_cli.datasets.sources import find_source
from e4t_cli.errors import InputError, UsageError
from tests.conftest import drawn_face


def png(index=0):
    buffer = io.BytesIO()
    drawn_face(index, 64)[0].save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, indices, *, captions=True):
    with tarfile.open(path, "w") as shard:
        for index in indices:
            files = {f"{index:03}.png": png(index)}
            if captions:
                files[f"{index:03}.txt"] = b"a dog"
            for name, data in files.items():
                about = tarfile.TarInfo(name)
                about.size = len(data)
                shard.addfile(about, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Three shards of four images with captions."""
    pytest.importorskip("webdataset")
    for number in range(3):
        write_shard(tmp_path / f"dogs-{number}.tar", range(4 * number, 4 * number + 4))
    return tmp_path


def names(items):
    return [item.name for item in items]


ALL = [f"dogs-{index // 4}.tar/{index:03}.png" for index in range(12)]


def test_a_pattern_a_star_a_list_and_one_shard(shards, monkeypatch):
    monkeypatch.chdir(shards)
    (shards / "all.txt").write_text("# dogs\ndogs-{0..1}.tar\n\ndogs-2.tar\n")
    for pattern in (f"{shards}/dogs-{{0..2}}.tar", f"{shards}/dogs-*.tar", "all.txt"):
        source = find_source(pattern)
        assert names(source) == ALL
        assert names(source) == ALL  # from the beginning again
        assert source.approximate_len == 12
    one = find_source(shards / "dogs-1.tar")
    assert names(one) == ALL[4:8]
    assert next(iter(one)).image == png(4)


def test_an_epoch_has_every_sample_once_in_its_own_order(shards):
    source = find_source(f"{shards}/dogs-{{0..2}}.tar")
    orders = [names(source.shuffled(7, epoch, 0, 1)) for epoch in range(3)]
    assert all(sorted(order) == ALL for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert names(source.shuffled(7, 1, 0, 1)) == orders[1]
    assert names(source.shuffled(8, 1, 0, 1)) != orders[1]
    for ranks in (2, 3, 5):  # more processes than shards take every fifth image
        shares = [names(source.shuffled(7, 0, rank, ranks)) for rank in range(ranks)]
        if ranks > 3:
            assert max(map(len, shares)) <= 3
        assert sorted(sum(shares, [])) == ALL


def test_samples_without_an_image_and_truncated_shards(shards):
    write_shard(shards / "bad.tar", range(90, 96))
    data = (shards / "bad.tar").read_bytes()
    (shards / "bad.tar").write_bytes(data[:2700])
    with tarfile.open(shards / "words.tar", "w") as shard:
        shard.addfile(tarfile.TarInfo("1.txt"))
    (shards / "list.txt").write_text("\n".join(str(shards / name) for name in ("bad.tar", "words.tar", "dogs-2.tar")))
    source = find_source(shards / "list.txt")
    *found, broken = source
    assert names(found)[-4:] == ALL[8:]
    assert 1 <= len(found) - 4 < 6
    assert source.other_files == 6  # captions and words; in a folder they are counted, too
    assert broken.name == str(shards / "bad.tar")
    with pytest.raises(InputError, match="breaks off: unexpected end"):
        broken.digest()


@pytest.mark.parametrize("place", ["pipe:rm -rf x.tar", "https://example.org/$(id).tar", "ftp://example.org/x.tar"])
def test_addresses_that_could_run_a_command_are_refused(shards, tmp_path, place):
    (tmp_path / "list.txt").write_text(place)
    with pytest.raises(UsageError, match="read from files, https and gs"):
        find_source(tmp_path / "list.txt")


def test_shards_that_are_not_there(shards):
    with pytest.raises(InputError, match="there is no shard"):
        find_source(f"{shards}/dogs-{{0..7}}.tar")
    with pytest.raises(UsageError, match="no file matches"):
        find_source(f"{shards}/cats-*.tar")


@pytest.fixture
def rows():
    datasets = pytest.importorskip("datasets")
    table = {
        "caption": ["a dog", "nothing", "a dog"],
        "image": [
            {"bytes": png(0), "path": None}, None, {"bytes": b"no picture", "path": "2.png"}
        ],
    }  # fmt: skip
    features = datasets.Features({"caption": datasets.Value("string"), "image": datasets.Image()})
    return datasets.Dataset.from_dict(table, features=features)


def test_a_dataset_in_a_folder_or_a_file(rows, tmp_path, monkeypatch):
    import datasets

    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(str(tmp_path / "both"))
    rows.to_parquet(str(tmp_path / "dogs.parquet"))
    for data in ("saved", "both", "dogs.parquet"):
        source = find_source(tmp_path / data)
        assert len(source) == 3
        assert names(source) == ["row 0", "row 1", "row 2"]
        # Undecoded: our own code opens them, and a bad one counts as a bad image.
        assert [item.image for item in source] == [png(0), b"", b"no picture"]
        assert source.fingerprint


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize("content", [[{"bytes": png(0), "path": "0.png"}, None], [None, png(0)]])
def test_a_parquet_file_without_the_hubs_metadata(tmp_path, content):
    pytest.importorskip("datasets")
    write_parquet(tmp_path / "UPPER.PARQUET", caption=["a dog"] * 2, key=[b"1", b"2"], picture=content)
    source = find_source(tmp_path / "UPPER.PARQUET")
    assert sorted(item.image for item in source) == [b"", png(0)]
    assert not source.notes


def test_several_parquet_files_by_a_pattern(tmp_path):
    pytest.importorskip("datasets")
    for index in range(3):
        write_parquet(tmp_path / f"dogs [{index}].parquet", image=[{"bytes": png(index), "path": None}])
    source = find_source(tmp_path / "dogs*.parquet")
    assert [item.image for item in source] == [png(0), png(1), png(2)]
    assert [item.image for item in find_source(tmp_path / "dogs [1].parquet")] == [png(1)]
    with pytest.raises(UsageError, match="no file matches"):
        find_source(tmp_path / "cats*.parquet")


@pytest.mark.parametrize(
    ("column", "hint"),
    [
        ([[png(0), png(1)]], "'x' has a list in each row"),
        (["https://example.org/1.jpg"], "'x' has addresses, which are not fetched"),
        ([b"words"], None),
        ([1.5], None),
    ],
)
def test_columns_that_hold_no_images(tmp_path, column, hint):
    pytest.importorskip("datasets")
    write_parquet(tmp_path / "t.parquet", x=column)
    with pytest.raises(InputError, match="no column of images, only 'x'") as caught:
        find_source(tmp_path / "t.parquet")
    assert caught.value.hint is None if hint is None else caught.value.hint.startswith(hint)


def test_a_dataset_without_images(rows, tmp_path):
    rows.remove_columns("image").save_to_disk(str(tmp_path / "words"))
    with pytest.raises(InputError, match="no column of images, only 'caption'"):
        find_source(tmp_path / "words")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    with pytest.raises(InputError, match="cannot be opened as a dataset"):
        find_source(tmp_path / "broken")
    with pytest.raises(UsageError, match="is no dataset"):
        find_source("hf://me/dogs@main:train:again/x")


@pytest.mark.parametrize(
    ("package", "data", "extra"),
    [("webdataset", "x.tar", "shards"), ("datasets", "hf://me/dogs", "datasets")],
)
def test_a_missing_package_is_one_command_away(monkeypatch, package, data, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match="need one more package") as caught:
        find_source(data)
    assert caught.value.hint == f"pip install 'e4t[{extra}]'"
