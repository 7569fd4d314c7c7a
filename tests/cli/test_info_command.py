"""`e4t info` reads everything that e4t writes, and refuses the rest with a sentence."""

import json
import os
import shutil
import struct

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import e4t_cli
from e4t_cli.formats import recognition
from e4t_cli.formats.recognition import recognize
from e4t_cli.formats.textual_inversion import write_with_embedding
from e4t_cli.images.png_metadata import GenerationRecord, png_bytes
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.discovery import user_domains_folder

TUNING = TuningConfig(steps=1, base_learning_rate=1e-5, reg_weight=0.25, method="lora").as_dict()
RECORD = GenerationRecord(
    prompt="S* at sea", seed=7, steps=2, guidance=3.0, scheduler="ddim", width=8, height=8, domain="face",
    concept_scale=0.5, weights_fingerprint="abc", tuning={**TUNING, "seed": 1}, versions={},
)  # fmt: skip


def picture(path, records=RECORD, **text):
    """Write a picture with its record, or with other texts."""
    image = Image.new("RGB", (8, 6))
    if text:
        info = PngInfo()
        for key, value in text.items():
            info.add_text(key, value)
        image.save(path, "PNG", pnginfo=info)
    else:
        path.write_bytes(png_bytes(image, records))
    return path


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    """One of everything that e4t writes, under the type that it is."""
    root = tmp_path_factory.mktemp("written")
    os.environ["XDG_DATA_HOME"] = str(root / "data")
    shutil.copytree(world.pack, user_domains_folder() / "my_faces")
    concept = e4t_cli.personalize(world.pack, world.photo, base=world.base, tune_steps=1, seed=4).concept
    concept.save(root / "me.e4t")
    e4t_cli.export(root / "me.e4t", root / "model", base=world.base)
    e4t_cli.export(root / "me.e4t", root / "me-lora.safetensors", base=world.base, lora=4)
    weights = {"model.diffusion_model.out.0.weight": torch.zeros(3)}
    write_with_embedding(root / "one.safetensors", weights, torch.zeros(24), dtype=torch.float16)
    from e4t_cli.pretraining.checkpoints import Checkpoints

    module = torch.nn.Linear(2, 2)
    Checkpoints(root / ".x.checkpoints", {"recipe": TUNING}).write(12, module, torch.optim.SGD(module.parameters()))
    return {
        "image": picture(root / "a.png"), "grid": picture(root / "grid.png", [RECORD, RECORD]),
        "concept": root / "me.e4t", "model": root / "model", "lora": root / "me-lora.safetensors",
        "word": root / "me-lora-word.safetensors", "checkpoint": root / "one.safetensors", "domain": world.pack,
        "training_checkpoint": root / ".x.checkpoints" / "step-00000012.safetensors",
        "training_checkpoints": root / ".x.checkpoints",
    }  # fmt: skip


FACTS = {
    "image": {"width": 8, "height": 6, "marked_as_generated": True},
    "grid": {"marked_as_generated": True},
    "concept": {"image": {"width": 32, "height": 32, "masked": False}, "weights": "made again by tuning"},
    "model": {"exported": True, "parts": ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]},
    "lora": {"ranks": [4], "dtypes": ["F16"]},
    "word": {"vectors": 1, "width": 24},
    "checkpoint": {"tensors": 1, "dtypes": ["F16"]},
    "domain": {"missing": []},
    "training_checkpoint": {"tensors": 2},
    "training_checkpoints": {"checkpoints": ["step-00000012.safetensors"]},
}
RECORDED = {
    "image": {"prompt": "S* at sea", "concept_scale": 0.5, "weights_fingerprint": "abc"},
    "concept": {"domain": "my_faces", "placeholder": "S*", "base_name": "tiny"},
    "model": {"tokens": ["S*"]},
    "lora": {"ss_network_dim": "4"},
    "domain": {"name": "my_faces", "base": "tiny"},
    "training_checkpoint": {"step": 12},
}


def is_part(part, whole):
    return all(whole[key] == value for key, value in part.items())


@pytest.mark.parametrize("kind", FACTS)
def test_it_reads_everything_that_e4t_writes(written, kind):
    found = recognize(written[kind])
    assert found.type == kind
    assert is_part(FACTS[kind], found.facts)
    assert is_part(RECORDED.get(kind, {}), found.recorded)


def test_todays_names_are_shown(written):
    """Files have the names of the first version, everything printed has today's."""
    tuning = {"steps": 1, "reg_weight": 0.25, "lora_rank": 8, "method": "lora"}
    assert is_part(tuning, recognize(written["image"]).recorded["tuning"])
    assert is_part(tuning, recognize(written["training_checkpoints"]).recorded["run"]["recipe"])
    assert len(recognize(written["grid"]).recorded["images"]) == 2
    assert recognize(written["concept"]).recorded["tuning"]["method"] == "full"
    assert set(recognize(written["domain"]).recorded["tuning"]) == set(TuningConfig.__annotations__)
    text = json.dumps([recognize(path).recorded for path in written.values()])
    for stored in ("embedding_penalty", "adapter_rank", "pack_", "strength", "pictures", "exact"):
        assert f'"{stored}' not in text


def test_several_at_once_are_one_object_a_line(run, written, tmp_path):
    (tmp_path / "README.md").write_text("# none\n")
    paths = [str(path) for path in written.values()]
    ended = run("info", *paths[:3], "README.md", *paths[3:], "--json")
    told = [json.loads(line) for line in ended.lines]
    assert [one["type"] for one in told] == list(written)
    assert [one["path"] for one in told] == paths
    assert all(one["schema"] == 1 for one in told)
    assert ended.code == 3 and json.loads(ended.err)["error"]["message"].startswith("README.md is a text")
    blocks = run("info", *paths[:2]).out.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == paths[:2]


def test_neither_torch_nor_tensors_are_loaded(written, start):
    code = f"""
import sys
from e4t_cli.formats.recognition import recognize
for path in {[str(path) for path in written.values()]!r}:
    recognize(path)
sys.exit(" ".join({{"torch", "transformers", "diffusers"}} & set(sys.modules)))
"""
    import subprocess
    import sys

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


def test_what_a_file_says_of_itself_stands_apart(run, tmp_path):
    """None of our keys can be set from inside a file, in JSON or in the lines for people."""
    claims = {"schema": 9, "type": "concept", "path": "x", "marked_as_generated": True, "width": 1, "recorded": {}}
    picture(tmp_path / "a.png", e4t=json.dumps({**claims, "x\nmarked as generated  yes": "\nrecorded"}))
    ended = run("info", "a.png", "--json")
    told = json.loads(ended.out)
    recorded = told.pop("recorded")
    assert told == {
        "schema": 1, "type": "image", "path": "a.png", "width": 8, "height": 6, "marked_as_generated": False,
    }  # fmt: skip
    assert recorded["type"] == "concept" and recorded["schema"] == 9
    shown = run("info", "a.png").lines[1:]
    ours = [line for line in shown if not line.startswith("recorded ")]
    assert [line.split()[0] for line in ours] == ["type", "width", "height", "marked"]
    assert next(line for line in ours if line.startswith("marked")).split()[-1] == "no"


@pytest.mark.parametrize(
    "value", ["NaN", '{"a": Infinity}', "[" * 5000, '{"a":' * 300 + "1" + "}" * 300, "[]", "3", '"x"', '{"a": 1e999}']
)
def test_any_json_in_a_picture_ends_in_a_sentence(run, tmp_path, value):
    picture(tmp_path / "a.png", e4t=value)
    ended = run("info", "a.png", "--json")
    assert ended.code in (0, 3, 5)
    assert "Infinity" not in ended.out.replace('"', "") or '"inf"' in ended.out
    if ended.code == 0:
        json.loads(ended.out, parse_constant=pytest.fail)
    assert "unexpected" not in ended.err


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def concept(**header) -> bytes:
    metadata = {"__metadata__": {"e4t": json.dumps({"schema": 1, "recipe": {}, **header})}}
    image = {"image": {"dtype": "U8", "shape": [1, 1, 3], "data_offsets": [0, 3]}}
    return safetensors(json.dumps(metadata | image).encode(), b"abc")


TENSOR = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'


@pytest.mark.parametrize(
    ("name", "data", "code", "words"),
    [
        ("a.jpg", b"\xff\xd8\xff\xe0JFIF", 3, "is a JPEG picture"),
        ("me.e4t", b"\xff\xd8\xff\xe0JFIF", 3, "is a JPEG picture"),
        ("README.md", "# é\n".encode() * 300, 3, "is a text that e4t does not know"),
        ("x", b"\x92\x02\xd0E\xda\xbc\x8d\xbc" + b"\0\1\2" * 9, 3, "is a file that e4t does not know"),
        ("empty", b"", 3, "is empty"),
        ("empty.e4t", b"", 3, "is empty"),
        ("a.png", b"\x89PNG\r\n\x1a\n", 3, "is not a readable PNG"),
        ("me.zip", b"PK\x03\x04", 3, "does not open"),
        ("me.e4t", b"abc", 5, "is damaged"),
        ("me.e4t", safetensors(b"{" * 30), 5, "is damaged"),
        ("x.safetensors", struct.pack("<Q", 2**62) + b"{", 5, "the length of its header"),
        ("x.safetensors", struct.pack("<Q", recognition.MAX_HEADER + 1) + b"{}", 5, "the length of its header"),
        ("x.safetensors", safetensors(TENSOR), 5, "not a complete"),
        ("x.safetensors", safetensors(TENSOR, b"x"), 3, "not know: a"),
        ("x.safetensors", safetensors(b"{}"), 3, "does not know: none"),
        ("me.e4t", concept(schema=3), 5, "newer e4t"),
        ("me.e4t", concept(schema=2), 5, "damaged concept"),
        ("me.e4t", concept(recipe="x", domain=3), 0, ""),
        ("me.e4t", safetensors(b'{"__metadata__":{"e4t":"{}"}}'), 5, "damaged concept"),
        ("me.e4t", safetensors(b'{"__metadata__":{"e4t":"["}}'), 5, "JSON cannot be read"),
        ("me.e4t", safetensors(b'{"__metadata__":{"e4t":"[]"}}'), 5, "not an object"),
        ("x.safetensors", safetensors(b'{"__metadata__":{"step":"x","run":"{}"}}'), 0, ""),
        ("domain.toml", b"schema = ", 5, "not TOML"),
        ("domain.toml", b"schema = 2", 5, "newer e4t"),
    ],
)  # fmt: skip
def test_every_other_file_is_one_sentence(run, tmp_path, name, data, code, words):
    (tmp_path / name).write_bytes(data)
    for arguments in (["info", name], ["info", name, "--json"]):
        ended = run(*arguments)
        assert ended.code == code, ended.err
        assert words in ended.err and name in (ended.err or ended.out)
        assert "unexpected" not in ended.err and "Errno" not in ended.err
        assert len(ended.err.splitlines()) <= 2


def make_path(kind):
    if kind == "pipe":
        os.mkfifo("x")
    elif kind in ("folder", "empty folder"):
        os.mkdir("x")
        if kind == "folder":
            open("x/a.txt", "w").close()
    elif kind == "loop":
        os.symlink("x", "x")
    elif kind == "pipe in a domain":
        os.mkdir("x")
        os.mkfifo("x/domain.toml")
    elif kind == "pipe in a model":
        os.mkdir("x")
        os.mkfifo("x/model_index.json")
    return {"long": "x" * 300, "nul": "x\0y", "device": "/dev/zero"}.get(kind, "x")


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("missing", 2, "there is no file x"),
        ("pipe", 3, "is a pipe or a device"),
        ("device", 3, "is a pipe or a device"),
        ("folder", 3, "is a folder, and nothing that e4t writes"),
        ("empty folder", 3, "is a folder, and nothing that e4t writes"),
        ("pipe in a domain", 3, "is not a file"),
        ("pipe in a model", 3, "is not a file"),
        ("loop", 3, "symbolic links"),
        ("long", 3, "too long"),
        ("nul", 3, "cannot be a name"),
    ],
)
def test_every_other_path_is_one_sentence(run, kind, code, words):
    ended = run("info", make_path(kind))
    assert ended.code == code and words in ended.err
    assert "unexpected" not in ended.err and len(ended.err.splitlines()) <= 2


def test_a_part_of_a_folder_names_the_folder(run, world):
    ended = run("info", str(world.pack / "encoder.safetensors"))
    assert ended.code == 3
    assert ended.err.splitlines()[1] == f"e4t info {world.pack.resolve()}"


def test_a_file_with_other_tensors_is_not_a_concept(run, tmp_path):
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert "e4t does not know: a.weight" in run("info", "x.safetensors").err


def test_the_first_line_is_never_empty(run, written, tmp_path):
    (tmp_path / "text.md").write_text("words")
    ended = run("info", "text.md", str(written["concept"]), str(written["lora"]))
    assert ended.code == 3 and ended.lines[0] == str(written["concept"])
    assert ended.lines.count("") == 1
