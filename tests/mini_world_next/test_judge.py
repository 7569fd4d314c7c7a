"""The judge's targets, network and readings; evaluation rows, tables, the parser, and drawings of the old world."""

import json
import random

import numpy
import pytest
import torch

from mini_world.next import evaluate, today
from mini_world.next.data import load_drawings
from mini_world.next.evaluate import Method, Rows, degraded, held_out_photos, prepared_photo, run_drawings, run_method
from mini_world.next.identities import ATTRIBUTES, DEGREES, draw_identity, is_held_out
from mini_world.next.judge import (
    ABSENT,
    CONTEXT,
    CONTEXT_SIZES,
    DEGREE_HEADS,
    HEAD_SIZES,
    HEADS,
    Judge,
    Outputs,
    Targets,
    _augment,
    accuracy,
    classify,
    load_judge,
    losses,
    save_judge,
    targets_of,
    train_judge,
)
from mini_world.next.parser import build_parser, head_iou, train_parser
from mini_world.next.scores import Wanted, score
from mini_world.next.tables import ahead, class_left, degree_errors, table, words_table
from mini_world.next.tasks import Task, prompts_of
from mini_world.next.world import Scene

WIDTHS = (8, 8, 8, 8, 8, 8)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    return load_drawings(tmp_path_factory.mktemp("mini"), "some", 120, processes=1, seed=41)


class Oracle(torch.nn.Module):
    """A judge that knows the images: its outputs are the targets."""

    def __init__(self, images, targets):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.rows = {image.tobytes(): row for row, image in enumerate(images)}
        self.targets = targets

    def forward(self, pixels):
        images = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        rows = torch.tensor([self.rows[image.tobytes()] for image in images])
        found = self.targets.select(rows, torch.device("cpu"))
        logits = [
            torch.cat(
                [
                    torch.nn.functional.one_hot(column.clamp(min=0), size)
                    for column, size in zip(part.T, sizes, strict=True)
                ],
                1,
            )
            for part, sizes in ((found.attributes, HEAD_SIZES), (found.context, CONTEXT_SIZES))
        ]
        return Outputs(
            *(one.float() for one in logits), found.degrees.nan_to_num(), found.garment.nan_to_num(), found.backdrop
        )


def test_targets_are_what_the_drawing_shows(drawings):
    targets = targets_of(drawings)
    assert targets.attributes.shape == (120, len(HEADS)) and targets.degrees.shape == (120, len(DEGREE_HEADS))
    for row in range(len(drawings)):
        who, scene = drawings.identity(row), drawings.scene(row)
        for column, (kind, name, _) in enumerate(HEADS):
            value = int(targets.attributes[row, column])
            if value != ABSENT:
                assert who.kind == kind and ATTRIBUTES[kind][name][value] == who[name]
        sketch = scene.medium == "sketch"
        assert (targets.context[row, 3] == ABSENT) == (sketch and scene.role in ("hat", "scarf"))
        plain = scene.place == "plain" and scene.medium == "photo" and (who is None or who.kind != "art")
        assert targets.backdrop[row].isnan().all() == (not plain)
        if plain:
            assert ((targets.backdrop[row] + 1) * 127.5).round().tolist() == drawings.backdrop[row].tolist()
    shown = [targets.attributes[drawings.facts[:, 6] == number] != ABSENT for number in range(4)]
    assert all(part.any() for part in shown)


def test_readings_of_the_targets_score_one(drawings):
    targets = targets_of(drawings)
    judge = Oracle(drawings.images, targets)
    readings = classify(judge, torch.from_numpy(numpy.array(drawings.images)).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert len(readings) == 120
    for row in range(120):
        who, scene = drawings.identity(row), drawings.scene(row)
        if who is None:
            continue
        garment = tuple(int(c) for c in drawings.garment[row]) if who.kind == "face" and scene == Scene() else None
        found = score(Wanted(who, scene, drawings.subject(row), garment=garment), readings.of(row, who.kind))
        assert found["identity"] is None or found["identity"] >= 0.999
        assert found["prompt"] in (None, 1.0) and found["subject"] == 1
        assert found["garment"] is None or found["garment"] < 0.1
    summary = accuracy(judge, drawings)
    assert all(value == 1 for name, value in summary.items() if " of " not in name)
    assert all(value < 0.01 for name, value in summary.items() if " of " in name)
    assert set(CONTEXT) < set(summary) and "error of face.width" in summary and "distance of garment" in summary


def test_a_saved_judge_reads_the_same(tmp_path):
    torch.manual_seed(1)
    judge = Judge().eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    pixels = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        assert torch.allclose(
            judge(pixels).context, load_judge(tmp_path / "judge.safetensors")(pixels).context, atol=5e-3
        )
    assert (tmp_path / "judge.safetensors").stat().st_size < 3_000_000


def test_a_flat_image_has_its_own_colour():
    torch.manual_seed(0)
    judge = Judge(WIDTHS).eval()
    pixels = torch.tensor([0.5, -0.25, 0.0])[None, :, None, None].expand(2, 3, 128, 128)
    with torch.no_grad():
        found = judge(pixels)
    assert found.garment.tolist() == [pytest.approx([0.5, -0.25, 0.0], abs=1e-5)] * 2
    assert found.attributes.shape == (2, sum(HEAD_SIZES)) and found.context.shape == (2, sum(CONTEXT_SIZES))


def test_absent_targets_have_no_gradient(drawings):
    torch.manual_seed(0)
    judge = Judge(WIDTHS)
    targets = targets_of(drawings).select(torch.arange(8), torch.device("cpu"))
    pixels = torch.rand(8, 3, 128, 128)
    absent = Targets(
        torch.full_like(targets.attributes, ABSENT),
        targets.context,
        torch.full_like(targets.degrees, torch.nan),
        torch.full_like(targets.garment, torch.nan),
        targets.backdrop,
    )
    parts = losses(judge(pixels), absent, torch.ones(8, 1))
    sum(parts.values()).backward()
    assert all(torch.isfinite(part) for part in parts.values())
    assert judge.attributes.weight.grad.abs().sum() == 0 and judge.degrees.weight.grad.abs().sum() == 0
    assert judge.context.weight.grad.abs().sum() > 0


def test_augmentation_keeps_the_image_and_says_its_contrast():
    pixels = torch.full((16, 3, 128, 128), 0.5)
    mixed, contrast = _augment(pixels, torch.Generator().manual_seed(0))
    assert mixed.shape == pixels.shape and contrast.shape == (16, 1)
    assert torch.allclose(mixed.mean((1, 2, 3)), 0.5 * contrast[:, 0], atol=0.01)
    assert contrast.min() >= 0.92 and contrast.max() <= 1.08 and contrast.std() > 0.01


def test_training_learns_and_goes_on_where_it_was(drawings, tmp_path):
    old = today.old_drawings(8)
    judge = train_judge(tmp_path / "whole", drawings, steps=4, batch=8, old=old)
    again = train_judge(tmp_path / "whole", drawings, steps=4, batch=8, old=old)
    for key, value in judge.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not judge.training
    names = {name.split(".")[0] for name in accuracy(judge, drawings)}
    assert {"face", "cat", "dog", "art", "role", "colour"} <= names


# ── evaluation ──


@pytest.mark.parametrize("kind", ["face", "cat", "dog", "art"])
def test_photos_are_held_out_and_plain(kind):
    photos, again = held_out_photos(kind, 3, seed=6), held_out_photos(kind, 2, seed=6)
    for photo, other in zip(photos, again, strict=False):
        assert photo.image.tobytes() == other.image.tobytes()
    for photo in photos:
        assert is_held_out(kind, photo.who.values) and photo.scene == Scene()
        assert (prepared_photo(photo).mask is None) == (kind == "art")


def test_one_attribute_in_twenty_is_degraded():
    rng, wrong, total = random.Random(1), 0, 0
    for _ in range(400):
        who = draw_identity("face", rng, held_out=True)
        other = degraded(who, 0.05, rng)
        wrong += sum(other[name] != who[name] for name in who.values) + sum(
            other.degrees[n] != who.degrees[n] for n in who.degrees
        )
        total += len(who.values) + len(who.degrees)
        assert all(-1 <= degree <= 1 for degree in other.degrees.values())
    assert 0.035 < wrong / total < 0.065


@pytest.fixture
def without_overrides(monkeypatch):
    monkeypatch.setattr(evaluate, "overrides_of", lambda who: ())


def test_an_interrupted_evaluation_goes_on(tmp_path, monkeypatch, without_overrides):
    photos, path = held_out_photos("cat", 3, seed=8), tmp_path / "rows.jsonl"
    tuned, judge = [], Judge(WIDTHS).eval()
    monkeypatch.setattr(
        evaluate, "generate", lambda model, tuned, tasks, seed, rare="", sampling=None: [photos[0].image] * len(tasks)
    )
    method = Method(lambda prepared, seed: tuned.append(seed))
    run_method(Rows(path), None, judge, "ours", method, photos[:2], "cat", seed=5)
    whole = path.read_bytes()
    assert tuned == [5, 6] and whole.count(b"\n") == 2 * (len(prompts_of("cat")) + 4)
    with path.open("ab") as file:
        file.write(b'{"method": "ours", "numb')
    rows = Rows(path)
    assert path.read_bytes() == whole and len(rows.rows) == whole.count(b"\n")
    run_method(rows, None, judge, "ours", method, photos, "cat", seed=5)
    assert tuned == [5, 6, 7]
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [
        row["number"] for row in rows.rows
    ]
    assert {row["about"] for row in rows.rows} == {"prompt", "class"}


def test_references_are_drawn_once(tmp_path, without_overrides):
    photos, judge = held_out_photos("cat", 2, seed=9), Judge(WIDTHS).eval()
    rows = Rows(tmp_path / "rows.jsonl")
    run_drawings(rows, judge, photos, "cat")
    count = len(rows.rows)
    assert {row["method"] for row in rows.rows} == {"drawings", "drawings, 5% wrong", "drawings of another"}
    run_drawings(Rows(rows.path), judge, photos, "cat")
    assert rows.path.read_text().count("\n") == count


def row(method, number, identity, about="prompt", **more):
    blank = dict.fromkeys(("prompt", "subject", "bound", "override", "garment", "backdrop"))
    return (
        {"method": method, "number": number, "about": about, "identity": identity, "right": {}, "errors": {}}
        | blank
        | more
    )


def test_tables_are_made_of_rows():
    rows = []
    for number in range(10):
        rows += [
            row("drawings", number, 0.9, prompt=1.0, garment=60.0),
            row("plain word", number, 0.4),
            row("plain word", number, 0.4, "class"),
            row(
                "ours",
                number,
                0.8,
                prompt=0.5,
                subject=1,
                bound=number % 2,
                garment=12.0,
                backdrop=20.0,
                errors={"width": 0.1},
            ),
            row("ours", number, 0.65, "class"),
            row("ours", number, 0.7, "override", override=1),
            row("theirs", number, 0.8 - 0.01 * (number % 3)),
        ]
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in table(rows).splitlines()[2:]
    }
    ours = lines["ours"]
    assert ours[:2] == ["0.800 [0.800, 0.800]", "80%"] and ours[2].startswith("0.500") and ours[4].startswith("0.500")
    assert (
        ours[5].startswith("1.000")
        and ours[6].startswith("0.700")
        and ours[7] == "12, 20"
        and ours[8].startswith("0.250")
    )
    assert lines["plain word"][8].startswith("0.000") and lines["theirs"][8] == "-"
    assert class_left(rows, "drawings") is None
    assert ahead(rows, "ours", "theirs").excludes_zero and not ahead(rows, "ours", "ours").excludes_zero
    assert degree_errors(rows, "ours")["width"].mean == pytest.approx(0.1)
    word = {"kind": "cat", "group": "role", "prompt": "a cat in a red hat", "subject": 1}
    shown = words_table([word | {"right": 1, "bound": 0}, word | {"right": 0, "bound": None}]).splitlines()[-1]
    assert shown == "| cat | role | a cat in a red hat | 0.50 | 1.00 | 0.00 | 2 |"


# ── parser and the old world ──


def test_the_parser_trains_and_is_measured(drawings, tmp_path):
    parser = train_parser(tmp_path, drawings, steps=2, batch=2)
    assert parser(pixel_values=torch.zeros(1, 3, 128, 128)).logits.shape == (1, 10, 32, 32)
    assert sum(p.numel() for p in build_parser().parameters()) < 500_000
    faces = drawings.select(numpy.flatnonzero(drawings.facts[:, 6] == 0)[:8])
    assert 0 <= head_iou(parser, faces) < 0.9

    class Perfect:
        device = torch.device("cpu")

        def __call__(self, pixel_values):
            logits = torch.nn.functional.one_hot(torch.from_numpy(faces.labels).long(), 10).permute(0, 3, 1, 2).float()
            return type("Output", (), {"logits": logits})

    assert head_iou(Perfect(), faces) == 1.0


def test_old_drawings_have_the_facts_that_both_worlds_know():
    old = today.old_drawings(60)
    targets = targets_of(old)
    known = {(kind, name) for kind, names in today.NAMES.items() for name in names}
    for column, (kind, name, _) in enumerate(HEADS):
        if (kind, name) not in known:
            assert (targets.attributes[:, column] == ABSENT).all()
    assert targets.degrees.isnan().all() and targets.garment.isnan().all() and targets.backdrop.isnan().all()
    assert (targets.attributes != ABSENT).any()
    scarves = old.facts[:, 2] == 4
    assert (targets.context[scarves, 3] == ABSENT).all() and (targets.context[~scarves, 1] >= 0).all()


@pytest.mark.parametrize("kind", ["face", "cat", "art"])
def test_an_old_photo_is_scored_by_its_own_attributes(kind):
    (photo,) = held_out_photos(kind, 1, seed=3, world=today.WORLD)
    assert photo.image.size == (64, 64) and today.WORLD.resize(photo.image).size == (128, 128)
    again = today.WORLD.draw(photo.who, Scene(), random.Random(0), None)
    assert again.who == photo.who
    task = Task("", Scene(place="beach"), "tree" if kind == "art" else None)
    wanted = evaluate.wanted_of(photo, task, today.WORLD)
    read = type("R", (), {"subject": "face", "scene": task.scene, "values": photo.who.values, "degrees": {}})
    found = score(wanted, read)
    assert found["identity"] == 1.0 and set(found["right"]) <= today.NAMES[kind] and not found["errors"]
    assert all(t.scene.colour in ("none", "red") for t in today.WORLD.prompts(kind))
    assert not set(DEGREES[kind]) & today.NAMES[kind]
