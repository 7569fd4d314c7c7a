"""Invariants of training data: cached and live data are equal; a bad image changes only its own sample.

Rows R5, R6 and R12 of the faults, and the cache: half-way, damaged, shared, changed.
"""

import io
import multiprocessing
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from e4t_cli.api.pretraining_setup import choose_cache, training_data
from e4t_cli.datasets.reader import SIGNATURE, ImageReader
from e4t_cli.datasets.sources import IterableSource, find_source
from e4t_cli.errors import InputError, ResourceError, UsageError, WeightsUnavailable
from e4t_cli.pretraining import cache as cached_images
from e4t_cli.pretraining import cache as caching
from e4t_cli.pretraining.batches import DistributedContext
from e4t_cli.pretraining.cache import EncodingCache, write_chunk
from e4t_cli.pretraining.encoded_images import (
    EncodedImages,
    EncodedRows,
    OnTheFlyDataset,
    StreamingDataset,
    bytes_per_image,
    encode_images,
    epoch_indices,
)
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage
from tests.conftest import RESOLUTION, drawn_face

FACES = Domain(
    name="faces",
    descriptor="face",
    tuning=TuningConfig(steps=1, base_learning_rate=1e-6, reg_weight=0),
)
CHUNK = 4


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(caching, "CHUNK", CHUNK)
    monkeypatch.setenv("E4T_CACHE_DIR", str(tmp_path / "cache"))


def png(index=0, size=64):
    buffer = io.BytesIO()
    drawn_face(index, size)[0].save(buffer, "PNG")
    return buffer.getvalue()


def reader(mask=None, **options):
    target = PreparationTarget(size=RESOLUTION, base="tiny", mask=mask)
    return ImageReader(options.pop("domain", FACES), target, **options)


def encode(model, images, **options):
    cache = EncodingCache(model, reader(**options))
    data = cache.encode(find_source(images))
    return data, cache


def rows(data, *, seed=3, step=0, positions=range(4), batch_size=4):
    return data.rows(seed=seed, step=step, positions=positions, batch_size=batch_size)


def same(one, other, **tolerance):
    for name in ("means", "logvars", "image_features"):
        a, b = getattr(one, name).float(), getattr(other, name).float()
        if tolerance:
            torch.testing.assert_close(a, b, **tolerance)
        elif not torch.equal(a, b):
            return False
    return True


NEARLY = {"rtol": 2e-3, "atol": 2e-3}
"""Tolerance for half precision and images encoded in other batches."""


@pytest.fixture
def folder(tmp_path):
    """Ten images in a folder."""
    data = tmp_path / "data"
    data.mkdir()
    for index in range(10):
        (data / f"{index}.png").write_bytes(png(index))
    return data


# ── what prepares an image decides on the cache ──


def by_detector(image, target):
    """Stand in for a domain that detects with a network where it is here."""
    try:
        target.fetch("owner/detector")
    except WeightsUnavailable:
        image = image.rotate(90)
    return PreparedImage(image=image.resize((target.size, target.size)))


class Hub:
    """What `PreparationTarget.fetch` finds."""

    commit: str | None = None

    def fetch(self, repository):
        if self.commit is None:
            raise WeightsUnavailable("it is not here")
        return Path("snapshots") / self.commit


def test_the_cache_is_made_again_when_a_network_of_the_preparation_comes_or_changes(model, folder):
    domain = replace(FACES, prepare=by_detector, networks=("owner/detector",))
    hub, notes, made = Hub(), [], []

    def encoded(commit, base="tiny"):
        hub.commit = commit
        target = PreparationTarget(size=RESOLUTION, base=base, mask=None, fetch=hub.fetch)
        cache, found = EncodingCache(model, ImageReader(domain, target)), []
        data = cache.encode(find_source(folder), on_progress=lambda event: found.append(event.note))
        notes[:] = [note for note in found if "prepared again" in note]
        made[:] = [cache.encoded]
        return cache.folder, rows(data).means

    before, without = encoded(None)
    assert (made, notes) == ([10], [])
    assert encoded(None)[0] == before and (made, notes) == ([0], [])
    first, with_it = encoded("a" * 40)
    assert first != before and made == [10] and not torch.equal(without, with_it)
    assert notes == ["images that were encoded before were prepared again: owner/detector was not here then"]
    second, _ = encoded("b" * 40)
    assert second not in (first, before)
    assert "images that were encoded before were prepared again: owner/detector is another version now" in notes
    # What was made is found again, whichever way it was prepared.
    for commit, place in ((None, before), ("a" * 40, first)):
        assert encoded(commit)[0] == place and (made, notes) == ([0], [])
    # The bases of this package have parts of their own: their networks are neither asked for nor keyed.
    hub.fetch = None
    target = PreparationTarget(size=RESOLUTION, base="mini", mask=None, fetch=hub.fetch)
    assert ImageReader(domain, target).networks == {}
    plain = PreparationTarget(size=RESOLUTION, base="tiny", mask=None)
    assert ImageReader(replace(FACES, networks=("owner/detector",)), plain).networks == {}  # nobody uses it


def test_opencv_is_part_of_the_key(monkeypatch):
    from e4t_cli.datasets import reader as reading

    domain = replace(FACES, prepare=by_detector, networks=("owner/detector",))
    target = PreparationTarget(size=RESOLUTION, base="tiny", mask=None)
    keys = set()
    for version in ("missing", "5.0.0", "5.0.1"):
        monkeypatch.setattr(reading, "_opencv_version", lambda version=version: version)
        keys.add(ImageReader(domain, target).key)
    assert len(keys) == 3
    monkeypatch.undo()
    assert ImageReader(domain, target).networks["OpenCV"][:1].isdigit()


# ── the same data, however it is kept ──


def test_kept_live_and_in_memory_are_the_same_data(model, folder):
    kept, _ = encode(model, folder)
    live = OnTheFlyDataset(model, find_source(folder), reader())
    squares = [reader().prepare(item) for item in find_source(folder)]
    memory = encode_images(model, squares)
    assert len(kept) == len(live) == len(memory) == 10
    for step in range(6):  # more than two epochs
        for positions in (range(4), range(2, 3)):
            place = {"step": step, "positions": positions}
            same(rows(kept, **place), rows(memory, **place), **NEARLY)
            same(rows(live, **place), rows(memory, **place), **NEARLY)
    live.close()


def test_rows_are_a_function_of_their_place(model, folder):
    kept, _ = encode(model, folder)
    live = OnTheFlyDataset(model, find_source(folder), reader())
    for data in (kept, live):
        first = [rows(data, step=step) for step in (0, 1, 2)]
        for step in (2, 0, 1):
            assert same(rows(data, step=step), first[step])
        halves = [rows(data, step=1, positions=half) for half in (range(2), range(2, 4))]
        whole = torch.cat([half.means for half in halves])
        torch.testing.assert_close(whole.float(), first[1].means.float(), **NEARLY)
        assert not same(rows(data, seed=4), first[0])
    live.close()


def test_masks_are_kept_where_training_wants_them(model):
    image, mask = drawn_face()
    images = [PreparedImage(image=image, mask=mask), PreparedImage(image=image)]
    data, _ = encode(model, images, mask="auto")
    found = rows(data, positions=range(2), batch_size=2).masks
    covered = sorted(one.float().mean().item() for one in found)
    assert 0.2 < covered[0] < 0.8 and covered[1] == 1
    assert rows(encode(model, images)[0]).masks is None


# ── R5: a bad image ──


@pytest.mark.parametrize("bad", [0, 5, 9])
def test_R5_a_bad_image_changes_only_its_own_samples(model, folder, bad):
    before, _ = encode(model, folder)
    (folder / f"{bad}.png").write_bytes(b"no picture")
    after, cache = encode(model, folder)
    live = OnTheFlyDataset(model, find_source(folder), reader())
    assert (len(before), len(after)) == (10, 9)
    assert list(cache.reader.left_out) == [f"{bad}.png"]
    touched = 0
    for step in range(8):
        index = epoch_indices(3, step, range(4), 4, 10)
        one, other, anew = (rows(data, step=step) for data in (before, after, live))
        for place, number in enumerate(index.tolist()):
            unchanged = torch.equal(one.means[place], other.means[place])
            torch.testing.assert_close(anew.means[place], other.means[place], **NEARLY)
            if number == bad:
                touched += 1
                assert not unchanged
            else:
                assert unchanged
    assert touched >= 2
    live.close()


@pytest.mark.parametrize("data", [[b"no", b""], []])
def test_R5_nothing_usable_is_an_input_error(model, data):
    with pytest.raises(InputError) as caught:
        encode(model, data)
    assert caught.value.exit_code == 3


def test_R5_live_data_without_anything_usable(model):
    live = OnTheFlyDataset(model, find_source([b"no", b""]), reader())
    with pytest.raises(InputError, match="no image can be used; the first: "):
        rows(live)
    live.close()


def test_R5_strict_stops_also_at_what_the_cache_knows_to_be_bad(model, folder):
    (folder / "5.png").write_bytes(b"no picture")
    encode(model, folder)
    with pytest.raises(InputError, match=r"5\.png"):
        encode(model, folder, strict=True)


# ── the cache ──


def test_nothing_is_encoded_twice(model, folder, monkeypatch):
    first, cache = encode(model, folder)
    assert cache.encoded == 10
    again, cache = encode(model, folder)
    assert cache.encoded == 0
    assert again.fingerprint == first.fingerprint
    # Under other names too; one more image costs the chunk that it is in.
    folder.rename(folder.with_name("moved"))
    moved, cache = encode(model, folder.with_name("moved"))
    assert (cache.encoded, moved.fingerprint) == (0, first.fingerprint)
    (folder.with_name("moved") / "9b.png").write_bytes(png(10))
    more, cache = encode(model, folder.with_name("moved"))
    assert cache.encoded == 3  # the last chunk: two images, and the new one
    assert more.fingerprint != first.fingerprint


def test_files_that_did_not_change_are_not_read_again(model, folder, monkeypatch):
    from e4t_cli.datasets.sources import ImageItem

    encode(model, folder)
    monkeypatch.setattr(ImageItem, "digest", lambda self: pytest.fail("read again"))
    assert encode(model, folder)[1].encoded == 0


def test_changed_images_and_settings_are_encoded_again(model, folder):
    first, _ = encode(model, folder)
    about = os.stat(folder / "3.png")
    (folder / "3.png").write_bytes(png(30)[: about.st_size])
    os.utime(folder / "3.png", ns=(about.st_atime_ns, about.st_mtime_ns))
    changed, cache = encode(model, folder)
    assert cache.encoded == CHUNK
    assert changed.fingerprint != first.fingerprint
    masked, cache = encode(model, folder, mask="auto")
    assert cache.encoded == 10


def test_an_image_that_could_not_be_read_once_is_read_again(model, folder, monkeypatch):
    from e4t_cli.datasets import sources as items

    read = items._file_digest

    def fail(path):
        if path.name == "3.png":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(items, "_file_digest", fail)
    assert len(encode(model, folder)[0]) == 9
    monkeypatch.setattr(items, "_file_digest", read)
    again, cache = encode(model, folder)
    assert (len(again), cache.encoded) == (10, CHUNK)


def test_an_interrupted_encoding_goes_on_where_it_was(model, folder, monkeypatch):
    make = EncodingCache._make

    def stop(self, *arguments):
        if self.encoded == 2 * CHUNK:
            raise KeyboardInterrupt
        return make(self, *arguments)

    monkeypatch.setattr(EncodingCache, "_make", stop)
    with pytest.raises(KeyboardInterrupt):
        encode(model, folder)
    monkeypatch.setattr(EncodingCache, "_make", make)
    assert encode(model, folder)[1].encoded == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_file_is_made_again(model, folder, damage):
    first, cache = encode(model, folder)
    paths = sorted(cache.folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(paths[-1].read_bytes())
    if damage == "flip":
        data[-100] ^= 1
    broken = {"cut": data[:-100], "empty": b"", "other": paths[0].read_bytes()}
    paths[-1].write_bytes(broken.get(damage, data))
    again, cache = encode(model, folder)
    assert (cache.encoded, cache.repaired) == (CHUNK, 1)
    assert again.fingerprint == first.fingerprint
    assert same(rows(again), rows(first))


def test_two_processes_share_the_work_and_find_the_same(model, folder):
    class Rank(DistributedContext):
        """A process whose partner has finished its share at the barrier."""

        def any(self, flag):
            partner.encode(find_source(folder), processes=Alone(rank=1, count=2))
            return flag

    class Alone(DistributedContext):
        def any(self, flag):
            raise InterruptedError  # only its own share is encoded

    partner = EncodingCache(model, reader())
    cache = EncodingCache(model, reader())
    with pytest.raises(InterruptedError):
        cache.encode(find_source(folder), processes=Rank(rank=0, count=2))
    assert (cache.encoded, partner.encoded) == (6, 4)  # chunks 0 and 2, and chunk 1
    data = cache.encode(find_source(folder))
    assert cache.encoded == 6
    assert data.fingerprint == encode(model, folder)[0].fingerprint


def race(path, barrier, results):
    barrier.wait()
    try:
        one, two, three = torch.zeros(3, 1, 2).unbind()
        nothing = EncodedRows(means=one.clone(), logvars=two.clone(), image_features=three.clone())
        write_chunk(path, nothing, bad={0: "no"}, digests=[b"0" * 32], signatures=[b"0" * SIGNATURE])
        results.put("")
    except BaseException as error:
        results.put(repr(error))


def test_many_processes_write_one_chunk_at_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(8), fork.Queue()
    path = tmp_path / "new" / "chunk.safetensors"
    racers = [fork.Process(target=race, args=(path, barrier, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    assert {results.get(timeout=60) for _ in racers} == {""}
    for racer in racers:
        racer.join()
    assert [one.name for one in path.parent.iterdir()] == ["chunk.safetensors"]


def test_a_cache_that_cannot_be_written(model, folder, monkeypatch):
    from e4t_cli.pretraining import cache as chunks

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunks, "write_atomically", full)
    with pytest.raises(ResourceError, match="No space left") as caught:
        encode(model, folder)
    assert "--cache off" in caught.value.hint


def test_the_size_of_an_image_is_known_before(model, folder):
    for mask in (None, "auto"):
        _, cache = encode(model, folder, mask=mask)
        size = sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
        estimate = 10 * bytes_per_image(model, mask=mask is not None)
        assert 0 <= size - estimate < 3 * 1500  # three headers


# ── R12: more than memory holds ──


def test_R12_images_and_rows_are_not_kept_in_memory(model, monkeypatch):
    """Twenty times the images, the same memory: nothing but names and flags grows."""
    import weakref

    alive, most = [0], []

    def gone():
        alive[0] -= 1

    def images(count):
        for index in range(count):
            image, _ = drawn_face(index)
            image.putpixel((0, 0), (index % 256, index // 256, 0))
            alive[0] += 1
            weakref.finalize(image, gone)
            most.append(alive[0])
            yield PreparedImage(image=image)

    def peak(count):
        most.clear()
        tracemalloc.start()
        data = EncodingCache(model, reader()).encode(find_source(images(count)))
        for step in range(4):
            rows(data, step=step)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        tensors = [value for value in vars(data).values() if isinstance(value, torch.Tensor)]
        assert not tensors
        return max(most), held

    few, little = peak(20)
    many, much = peak(400)
    assert many == few <= 3 * CHUNK
    assert (much - little) / 380 < 2500  # bytes per image, of CHUNK = 4; at 256 it is far less


def test_R12_no_more_chunks_are_open_than_allowed(model, monkeypatch):
    monkeypatch.setattr(cached_images, "OPEN_AT_ONCE", 3)
    data, _ = encode(model, [png(index) for index in range(40)])
    for step in range(20):
        rows(data, step=step)
    assert data._open.cache_info().currsize == 3


# ── streams ──


class Stream(IterableSource):
    """A streamed source in memory, with the order of `Shards`."""

    fingerprint = "stream"

    def __init__(self, images):
        super().__init__("a stream")
        self.images, self.opened = images, 0

    @property
    def approximate_len(self):
        return len(self.images)

    def __iter__(self):
        return iter(find_source(self.images))

    def shuffled(self, seed, epoch, rank, ranks):
        order = epoch_indices(seed, epoch, range(len(self.images)), len(self.images),
                              len(self.images)) if self.images else []  # fmt: skip
        items = find_source(self.images) if self.images else []
        return (items[int(index)] for index in order[rank::ranks])


def stream(model, images, rank=0, ranks=1):
    return StreamingDataset(model, Stream(images), reader(), rank, ranks)


def test_a_stream_goes_on_where_a_stopped_run_was(model):
    images = [png(index) for index in range(7)]
    whole = stream(model, images)
    each = [rows(whole, step=step) for step in range(5)]  # three epochs
    resumed = stream(model, images)
    for step in (3, 4):
        assert same(rows(resumed, step=step), each[step])
    assert same(rows(resumed, step=1), each[1])  # back again: read from the beginning
    for data in (whole, resumed):
        data.close()


def test_processes_take_their_own_parts_of_a_stream(model):
    images = [png(index) for index in range(8)]
    seen = []
    for rank in range(2):
        data = stream(model, images, rank, 2)
        for step in range(2):
            found = rows(data, step=step, positions=range(2 * rank, 2 * rank + 2), batch_size=4)
            seen += [one.half().numpy().tobytes() for one in found.means]
        data.close()
    assert len(set(seen)) == 8  # one epoch, in disjoint parts


def test_R5_a_bad_image_in_a_stream_is_replaced_by_the_next(model):
    images = [png(index) for index in range(6)]
    before = stream(model, images)
    bad = [*images[:2], b"no picture", *images[3:]]
    after = stream(model, bad)
    changed = 0
    for step in range(3):
        one, other = rows(before, step=step), rows(after, step=step)
        changed += sum(
            not torch.allclose(a.float(), b.float(), **NEARLY) for a, b in zip(one.means, other.means, strict=True)
        )
    assert changed == 2  # once in each of the two epochs
    assert list(after.reader.left_out) == ["image 2"]
    for data in (before, after):
        data.close()


def test_an_empty_stream_ends(model):
    for images, words in (([], "there is no image in a stream"), ([b"no"], "can be used")):
        data = stream(model, images)
        with pytest.raises(InputError, match=words):
            rows(data)
        data.close()


# ── on or off ──


def test_auto_caches_what_is_needed_twice(model, monkeypatch):
    source = find_source([png(index) for index in range(10)])
    used = {samples: choose_cache("auto", source, model, samples, mask=False).used for samples in (5, 10, 11, 1000)}
    assert used == {5: False, 10: False, 11: True, 1000: True}
    assert choose_cache("on", source, model, 5, mask=False).used
    off = choose_cache("off", source, model, 1000, mask=False)
    assert not off.used and off.size == 10 * bytes_per_image(model, mask=False)
    once = find_source(iter([png()]))
    assert choose_cache("auto", once, model, 1, mask=False).used
    with pytest.raises(UsageError, match="read once"):
        choose_cache("off", once, model, 1, mask=False)
    unknown = Stream([])
    assert not choose_cache("auto", unknown, model, 1000, mask=False).used
    assert choose_cache("on", unknown, model, 1000, mask=False).used


def test_a_disk_that_is_too_small(model, monkeypatch):
    monkeypatch.setattr("e4t_cli.api.pretraining_setup.free_bytes", lambda folder: 1000)
    source = find_source([png(index) for index in range(10)])
    choice = choose_cache("auto", source, model, 1000, mask=False)
    assert not choice.used and "are not cached" in choice.why
    with pytest.raises(ResourceError, match="1000 bytes are free|1 kB are free"):
        choose_cache("on", source, model, 1000, mask=False)


@pytest.mark.parametrize("wanted", ["on", "off"])
def test_training_data_reports_what_was_left_out(model, folder, tmp_path, wanted):
    (folder / "7.png").write_bytes(b"no picture")
    estimate = []
    source = find_source(folder)
    choice = choose_cache(wanted, source, model, 100, mask=False)
    opens = reader(log=tmp_path / "left-out.tsv")
    with training_data(
        model, source, opens, choice, processes=DistributedContext(), on_progress=estimate.append
    ) as data:
        for step in range(3):
            rows(data, step=step)
    notes = [event.note for event in estimate if event.note]
    assert any("1 image was left out; the first: " in note and "7.png" in note for note in notes)
    assert any("are few" in note for note in notes)
    assert (tmp_path / "left-out.tsv").read_text().startswith("7.png\t")
    assert isinstance(data, OnTheFlyDataset) == (wanted == "off")
    assert not isinstance(data, EncodedImages)
