"""Every kind of file that e4t reads, damaged in many ways: a promised exit code, one sentence, nothing left behind.

    pytest -m slow tests/cli/test_hostile_files.py -s        prints the counts

Each run is a process of its own with a limit of time and of memory. The mutations are harmless, and always the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections import Counter

import pyarrow
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pyarrow import parquet

import e4t_cli
from e4t_cli.cli import app
from tests.children import MEGABYTES, complaint, run_in_child
from tests.conftest import drawn_face

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FAST = 3  # mutations of a kind in the default suite

# ── mutations: content -> its damaged copies ──


def of_bytes(data: bytes, chance: random.Random):
    """Cut, flip, insert and append bytes, whatever the format."""
    for share in (0, 0.02, 0.25, 0.5, 0.9):
        yield data[: int(len(data) * share)]
    yield data[:-1]
    yield data[:7]
    for count in (1, 1, 1, 2, 8, 64):
        changed = bytearray(data)
        for _ in range(count):
            place = chance.randrange(min(len(data), chance.choice((64, 1024, len(data)))))
            changed[place] ^= 1 << chance.randrange(8)
        yield bytes(changed)
    middle = len(data) // 2
    yield data[:middle] + b"\0" * 100 + data[middle:]
    yield data[:middle] + b"\0" * (len(data) - middle)
    yield data + b"\0" * 1000
    yield data + data
    yield b"\0" * len(data)
    yield b"<html>404 Not Found</html>"


VALUES = (None, "x", "", -1, 0, 1 << 62, 10**30, 1.5, True, [], {}, [[]], ["x"], {"x": 1}, "\u001b[31m\n", "x" * 5000)
TEXTS = ("NaN", "Infinity", "1e400", "[" * 3000 + "]" * 3000, '{"a":' * 500 + "1" + "}" * 500, "9" * 4000)


def of_json(data: bytes, chance: random.Random):
    """Replace, remove, repeat and nest values of a JSON object; and what is no JSON object."""
    table = json.loads(data)
    places = [(table, key) for key in table]
    for value in table.values():
        if isinstance(value, dict):
            places += [(value, key) for key in value][:4]
    for holder, key in places[:14]:
        old = holder[key]
        for value in chance.sample(VALUES, 4):
            holder[key] = value
            yield json.dumps(table).encode()
        holder[key] = "HERE"
        for text in chance.sample(TEXTS, 2):
            yield json.dumps(table).replace('"HERE"', text).encode()
        del holder[key]
        yield json.dumps(table).encode()
        holder[key] = old
    yield b"{" + b",".join([data.strip()[1:-1]] * 2) + b"}"
    yield b"[]"
    yield b"null"
    yield b"\xff\xfe" + data
    yield b"\xef\xbb\xbf" + data
    yield data.decode().encode("utf-16")
    yield from (text.encode() for text in TEXTS)


TOML = (
    *('""', "-1", "0", "nan", "inf", "[]", "{}", "true", '"\\u001b[31m"', "1e400", "9" * 400, "[" * 50 + "]" * 50),
    *("1979-05-27", '"' + "x" * 5000 + '"'),
)


def of_toml(data: bytes, chance: random.Random):
    lines = data.decode().splitlines()
    for index, line in enumerate(lines):
        name, equals, _ = line.partition(" = ")
        for value in chance.sample(TOML, 3):
            yield "\n".join([*lines[:index], f"{name} = {value}" if equals else value, *lines[index + 1 :]]).encode()
        if chance.random() < 0.3:
            yield "\n".join([*lines[:index], *lines[index + 1 :]]).encode()
            yield "\n".join([*lines[:index], line, *lines[index:]]).encode()
    yield b"\xff" + data
    yield data + b"\nx = 1\n"
    yield data + b"#" * 100_000


def of_safetensors(data: bytes, chance: random.Random):
    """Change the header's length, its JSON, the shapes, types and places of tensors, and the values."""
    size = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + size]), data[8 + size :]

    def packed(text: bytes, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(text) if length is None else length) + text + tensors

    for length in (0, 1, size - 1, size + 1, len(data), 1 << 31, (1 << 64) - 1):
        yield packed(data[8 : 8 + size], length)
    for place in ("dtype", "shape", "data_offsets"):
        for value in ("F64", "BF16", "I8", "X", [], [1 << 40], [1 << 62, 1 << 62], [-1], [0], [0, 1], [8, 0], None):
            key = chance.choice([key for key in header if key != "__metadata__"])
            changed = {**header, key: {**header[key], place: value}}
            if chance.random() < 0.6:
                yield packed(json.dumps(changed).encode())
    first, *_ = [key for key in header if key != "__metadata__"]
    yield packed(json.dumps({key: value for key, value in header.items() if key != first}).encode())
    yield packed(json.dumps({**header, "more": header[first]}).encode())
    yield packed(b"{" + b",".join([json.dumps(header).encode()[1:-1]] * 2) + b"}")
    for metadata in (None, {}, {"e4t": 1}, {"e4t": "["}, {"e4t": "[" * 3000}, {"step": "x", "run": "{}"}, [], "x"):
        yield packed(json.dumps({**header, "__metadata__": metadata}).encode())
    yield packed(b"[" * 3000)
    yield packed(b" " * 4096)
    for value in (b"\xff", b"\x7f"):  # not a number, or huge; of each type
        yield data[: 8 + size] + value * len(tensors)
    metadata = header.get("__metadata__", {})
    for key, text in metadata.items():
        if text.startswith("{"):
            for changed_text in [*of_json(text.encode(), chance)][:150:3]:
                new = {**metadata, key: changed_text.decode("latin-1")}
                yield packed(json.dumps({**header, "__metadata__": new}).encode())


def of_picture(data: bytes, chance: random.Random):
    """Change the sizes, the depth and the texts of a PNG, with right checksums."""
    for side in (0, 1, 63, 1 << 15, (1 << 31) - 1):
        header = data[12:16] + struct.pack(">II", side, side) + data[24:29]
        yield data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    for place in range(24, 29):
        for value in (1, 3, 255):
            header = data[12:place] + bytes([value]) + data[place + 1 : 29]
            yield data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def of_record(data: bytes, chance: random.Random):
    """Change what a picture says of how it was made."""
    with Image.open(io.BytesIO(data)) as image:
        texts = dict(image.text)
        key = next(name for name, text in texts.items() if text.startswith("{"))
        for text in [*of_json(texts[key].encode(), chance)][:60]:
            info, file = PngInfo(), io.BytesIO()
            for name, value in {**texts, key: text.decode("latin-1")}.items():
                info.add_text(name, value)
            image.save(file, "PNG", pnginfo=info)
            yield file.getvalue()


def of_lines(data: bytes, chance: random.Random):
    texts = ["", "\n\n", "# none\n", "\0", "S* \x1b[31m", "no placeholder", "--n", "S* --n x", "S* --n 999999999"]
    texts += ["S* --s -1", "S* --s 99999999999999999999", "S* --neg", "S* --neg S*", "S* --unknown 1", "S* " * 9000]
    for text in [*texts, "S* \ud800".encode("utf-8", "surrogatepass"), b"\xff\xfe", "S* --n 1 --n 1", "S*\r\nS*\r"]:
        yield text if isinstance(text, bytes) else text.encode()


def of_zip(data: bytes, chance: random.Random):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = next(name for name in files if name.endswith("domain.toml"))
    for extra in ("../out.txt", "/tmp/out.txt", "a\\b", "C:out.txt", "x\0y", "~", manifest.upper(), "e/" * 300 + "x"):
        yield zipped({**files, extra: b"x"})
    for name in files:
        yield zipped({key: value for key, value in files.items() if key != name})
        yield zipped({**files, name: b""})
        yield zipped({**files, name: files[name][:-1]})
    yield zipped({**files, "big.safetensors": b"\0" * 20_000_000})


def of_tar(data: bytes, chance: random.Random):
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}
    first = next(iter(files))
    for name in ("../out.png", "/tmp/out.png", ".png", "a" * 300 + ".png", "x\n.png", "\x1b[31m.png"):
        yield tarred({**files, name: files[first]})
    yield tarred(dict.fromkeys(files, b""))
    yield tarred({})
    yield tarred({**files, "x.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 100})


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return file.getvalue()


def tarred(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return file.getvalue()


# ── kinds of files: path below the folder, mutations, commands ──

TINY = ["--base", "base", "--steps", "1", "--offline"]
GENERATE = ["generate", "me.e4t", "S* on the beach", *TINY]
ADD = ["domains", "add", "./pack", "--force"]
PRETRAIN = ["pretrain", "--domain", "my_dogs", "--steps", "3", "--batch", "1", "--cache", "off"]
PRETRAIN += ["--checkpoint-every", "1", "--base", "base", "--offline", "--data"]
WORK = "home/e4t/domains/.my_dogs.checkpoints"


def personalize(photo):
    return ["personalize", "./pack", photo, "S* on the beach", "--tune-steps", "1", *TINY]


KINDS = {
    "concept": ("me.e4t", (of_bytes, of_safetensors), [["info", "me.e4t"], GENERATE]),
    "lora": ("lora.safetensors", (of_bytes, of_safetensors), [["info", "lora.safetensors"]]),
    "word": ("lora-word.safetensors", (of_bytes, of_safetensors), [["info", "lora-word.safetensors"]]),
    "single file": ("single.safetensors", (of_bytes, of_safetensors), [["info", "single.safetensors"]]),
    "domain.toml": ("pack/domain.toml", (of_bytes, of_toml), [["info", "pack"], ADD]),
    "encoder": ("pack/encoder.safetensors", (of_bytes, of_safetensors), [ADD]),
    "offsets": ("pack/offsets.safetensors", (of_safetensors,), [personalize("me.png")]),
    "base.toml": ("base/base.toml", (of_bytes, of_toml), [GENERATE]),
    "model_index.json": ("base/model_index.json", (of_bytes, of_json), [["info", "base"], GENERATE]),
    "unet config": ("base/unet/config.json", (of_json,), [GENERATE]),
    "vae config": ("base/vae/config.json", (of_json,), [GENERATE]),
    "text encoder config": ("base/text_encoder/config.json", (of_bytes, of_json), [GENERATE]),
    "scheduler config": ("base/scheduler/scheduler_config.json", (of_bytes, of_json), [GENERATE]),
    "tokenizer config": ("base/tokenizer/tokenizer_config.json", (of_bytes, of_json), [GENERATE]),
    "vocabulary": ("base/tokenizer/vocab.json", (of_bytes,), [GENERATE]),
    "merges": ("base/tokenizer/merges.txt", (of_bytes,), [GENERATE]),
    "tower config": ("base/image_tower/open_clip_config.json", (of_json,), [personalize("me.png")]),
    "base weights": ("base/unet/diffusion_pytorch_model.safetensors", (of_bytes, of_safetensors), [GENERATE]),
    "checkpoint": (f"{WORK}/step-00000001.safetensors", (of_bytes, of_safetensors), [
        ["info", WORK], [*PRETRAIN, "dogs"],
    ]),
    "latest": (f"{WORK}/latest", (of_bytes,), [[*PRETRAIN, "dogs"]]),
    "metadata": ("made.png", (of_record, of_bytes), [
        ["info", "made.png"], ["generate", "me.e4t", "--like", "made.png", *TINY],
    ]),
    "photo": ("me.png", (of_bytes, of_picture), [personalize("me.png")]),
    "photo as JPEG": ("me.jpg", (of_bytes,), [personalize("me.jpg")]),
    "prompts": ("prompts.txt", (of_lines,), [["generate", "me.e4t", "-f", "prompts.txt", *TINY]]),
    "zip": ("pack.zip", (of_bytes, of_zip), [["domains", "add", "pack.zip", "--force"]]),
    "tar": ("dogs.tar", (of_bytes, of_tar), [[*PRETRAIN, "dogs.tar", "--fresh"]]),
    "parquet": ("dogs.parquet", (of_bytes,), [[*PRETRAIN, "dogs.parquet", "--fresh"]]),
}  # fmt: skip
QUICK = {"concept", "lora", "word", "single file", "domain.toml", "metadata", "prompts", "zip", "model_index.json"}


@pytest.fixture(scope="module", autouse=True)
def templates():
    """The tiny base reads few words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("e4t_cli.api.pretraining.training_templates", lambda domain: ("{}", "a photo of {}"))
        yield


@pytest.fixture(scope="module")
def sound(world, tmp_path_factory):
    """A folder with a sound file of every kind."""
    from e4t_cli.formats.textual_inversion import write_with_embedding

    root = tmp_path_factory.mktemp("sound")
    before = os.getcwd(), dict(os.environ)
    try:
        move_into(root)
        shutil.copytree(world.pack, root / "pack")
        shutil.copytree(world.pack, root / "home/e4t/domains/my_faces")
        shutil.copytree(world.base, root / "base")
        drawn_face(1, 96)[0].save(root / "me.png")
        drawn_face(1, 96)[0].convert("RGB").save(root / "me.jpg")
        concept = e4t_cli.personalize("my_faces", root / "me.png", base=root / "base", tune_steps=1, seed=4).concept
        concept.save(root / "me.e4t")
        e4t_cli.export(root / "me.e4t", root / "lora.safetensors", base=root / "base", lora=2)
        weights = {"model.diffusion_model.out.0.weight": torch.zeros(3)}
        write_with_embedding(root / "single.safetensors", weights, torch.zeros(24), dtype=torch.float16)
        (root / "prompts.txt").write_text("S* on the beach\n")
        assert app.run([*GENERATE, "-o", "made.png"]) == 0
        pictures = {f"{index}.png": picture(index) for index in range(3)}
        (root / "dogs").mkdir()
        for name, data in pictures.items():
            (root / "dogs" / name).write_bytes(data)
        (root / "dogs.tar").write_bytes(tarred(pictures))
        table = pyarrow.table({"image": [{"bytes": data, "path": None} for data in pictures.values()]})
        parquet.write_table(table, root / "dogs.parquet")
        files = {f"pack/{path.name}": path.read_bytes() for path in (root / "pack").iterdir() if path.is_file()}
        (root / "pack.zip").write_bytes(zipped(files))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("e4t_cli.api.pretraining.discard_work", lambda folder: None)
            assert app.run([*PRETRAIN[:4], "1", *PRETRAIN[5:], "dogs"]) == 0
        shutil.rmtree(root / "home/e4t/domains/my_dogs")
        (root / "home/e4t/domains/.my_dogs.checkpoints/finished").unlink()
    finally:
        os.chdir(before[0])
        os.environ.clear()
        os.environ.update(before[1])
    return root


def move_into(root):
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        os.environ[name] = str(root / "home")
    (root / "home/e4t/domains").mkdir(parents=True, exist_ok=True)
    os.chdir(root)


def picture(index):
    file = io.BytesIO()
    drawn_face(index, 64)[0].save(file, "PNG")
    return file.getvalue()


# ── one run ──


def names(folder):
    """Return everything below a folder but for what commands may leave there."""
    kept = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    own = re.compile(
        r"outputs|home/huggingface|home/e4t/(pretraining|domains/(my_faces|my_dogs|\.my_dogs\.checkpoints))(/|$)"
    )
    return {name for name in kept if not own.match(name)}


def attack(kind, sound, tmp_path, most=None):
    """Run the commands of a kind on its damaged copies; returns codes and complaints."""
    path, mutations, commands = KINDS[kind]
    root = shutil.copytree(sound, tmp_path / "k")
    data, codes, complaints = (sound / path).read_bytes(), Counter(), []
    chance = random.Random(kind)
    damaged = list(dict.fromkeys(one for mutate in mutations for one in mutate(data, chance)))
    chosen = damaged if most is None else chance.sample(damaged, min(most, len(damaged)))
    for content in chosen:
        for arguments in commands:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
            if path.startswith("pack/") and not path.endswith(".toml"):  # the manifest agrees with it
                manifest = (sound / "pack/domain.toml").read_text()
                old, new = (hashlib.sha256(one).hexdigest() for one in (data, content))
                manifest = manifest.replace(old, new)
                sized = re.sub(rf"({re.escape(path[5:])}\" = )\d+$", rf"\g<1>{len(content)}", manifest, flags=re.M)
                (root / "pack/domain.toml").write_text(sized)
            before = names(root)
            code, err, grown = run_in_child(tmp_path / "messages.txt", arguments, lambda: move_into(root))
            codes[code] += 1
            if wrong := complaint(code, err, grown, names(root) - before):
                complaints.append(
                    f"{arguments[:2]} on {content[:60]!r}… ({len(content)} bytes): {wrong}: {err[-300:]}"
                )
            for changed in ("home", "outputs"):
                shutil.rmtree(root / changed, ignore_errors=True)
            shutil.copytree(sound / "home", root / "home")
    return codes, complaints


@pytest.mark.slow
def test_sound_files_are_used(sound, tmp_path):
    """Otherwise the rest would show nothing."""
    root = shutil.copytree(sound, tmp_path / "k")
    commands = {tuple(command) for kind in KINDS for command in KINDS[kind][2]}
    for arguments in sorted(commands):
        code, err, grown = run_in_child(tmp_path / "messages.txt", list(arguments), lambda: move_into(root))
        assert code == 0 and grown < MEGABYTES, (arguments, err)
        shutil.rmtree(root / "home")
        shutil.copytree(sound / "home", root / "home")


@pytest.mark.parametrize("kind", sorted(QUICK))
def test_a_few_damaged_files(sound, tmp_path, kind):
    _, complaints = attack(kind, sound, tmp_path, FAST)
    assert not complaints


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(sound, tmp_path, kind):
    codes, complaints = attack(kind, sound, tmp_path, int(os.environ.get("E4T_TEST_MUTATIONS", "60")))
    print(json.dumps({"kind": kind, "runs": codes.total(), "codes": {str(code): codes[code] for code in codes}}))
    assert not complaints, "\n".join([f"{len(complaints)}:", *complaints[:40]])
