"""The tables of docs/mini.md: metrics and their formatting."""

import numpy
import pytest
import torch
from torch import nn

from mini_world.clip import HEAD_SIZES, HEADS
from mini_world.data import SUBJECTS
from mini_world.evaluate import (
    VALUES,
    Scores,
    Task,
    draw_references,
    drawn_scores,
    held_out_photos,
    pixels_of,
    prepared_photo,
    score,
    tasks_of,
)
from mini_world.identities import ATTRIBUTES, is_held_out
from mini_world.judge import CONTEXT_NAMES, CONTEXT_SIZES
from mini_world.report import table, write_between
from mini_world.world import Scene


class Oracle(nn.Module):
    """A judge with known labels of some drawings, which it recognises by their pixels."""

    def __init__(self):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.answers = {}

    def add_labels(self, image, who, task):
        attributes = [torch.zeros(size) for size in HEAD_SIZES]
        for column, (kind, name, _) in enumerate(HEADS):
            if kind == who.kind:
                attributes[column][ATTRIBUTES[kind][name].index(who[name])] = 1
        context = [torch.zeros(size) for size in CONTEXT_SIZES]
        for column, name in enumerate(CONTEXT_NAMES):
            subject = task.thing or who.kind
            value = subject if name == "subject" else getattr(task.scene, name)
            context[column][VALUES[name].index(value)] = 1
        self.answers[image.tobytes()] = (torch.cat(attributes), torch.cat(context))

    def forward(self, pixels):
        found = []
        for one in ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1):
            found.append(self.answers[one.contiguous().numpy().tobytes()])
        attributes, context = zip(*found, strict=True)
        return torch.stack(attributes), torch.stack(context)


@pytest.mark.parametrize("kind", ["face", "cat", "art"])
def test_a_drawing_of_the_identity_itself_is_all_right(kind):
    own, other = (photo.who for photo in held_out_photos(kind, 2, seed=3))
    tasks, oracle = tasks_of(kind), Oracle()
    drawn = {}
    for who in (own, other):
        drawn[who.shift] = draw_references(who, tasks, 0)
        for image, task in zip(drawn[who.shift], tasks, strict=True):
            oracle.add_labels(image, who, task)
    assert score(oracle, own, tasks, drawn[own.shift]) == ([1.0] * len(tasks), [1.0] * len(tasks))
    identity, prompt = score(oracle, own, tasks, drawn[other.shift])
    shared = [own[name] == other[name] for name in ATTRIBUTES[kind]]
    assert not all(shared)
    assert identity == [sum(shared) / len(shared)] * len(tasks)
    assert prompt == [1.0] * len(tasks)


def test_only_what_the_prompt_asks_for_counts():
    who = held_out_photos("face", 1, seed=4)[0].who
    shown = Task("", Scene(place="snow", role="hat", framing="close"))
    (image,) = draw_references(who, [shown], 0)
    oracle = Oracle()
    oracle.add_labels(image, who, shown)

    def prompt_score(**scene):
        return score(oracle, who, [Task("", Scene(**scene))], [image])[1][0]

    assert prompt_score() == 1.0  # a face
    assert prompt_score(place="snow") == 1.0
    assert prompt_score(place="beach") == 1 / 2
    assert prompt_score(place="snow", role="scarf") == 2 / 3
    assert prompt_score(place="snow", role="hat", medium="sketch") == 3 / 4
    assert score(oracle, who, [Task("", Scene(), "tree")], [image])[1] == [0.0]


@pytest.mark.parametrize("kind", ["face", "cat", "art"])
def test_the_shipped_judge_tells_an_identity_from_another(judge, kind):
    photos = held_out_photos(kind, 4, seed=5)
    own, other = (drawn_scores(judge, kind, photos, other=swapped) for swapped in (False, True))
    looks = [photo.who.values for photo in photos]
    # There are some seventy held-out styles: a neighbour can be the same one.
    apart = [look != neighbour for look, neighbour in zip(looks, looks[1:] + looks[:1], strict=True)]
    assert sum(apart) >= 3
    assert (own.identity.mean(1)[apart] > other.identity.mean(1)[apart] + 0.2).all()
    assert own.identity.shape == own.prompt.shape == (4, len(tasks_of(kind)))
    assert own.prompt.mean() > 0.8


def test_photos_are_held_out_plain_and_the_same_every_time():
    for kind in ("face", "cat", "art"):
        photos = held_out_photos(kind, 3, seed=6)
        again = held_out_photos(kind, 2, seed=6)
        for photo, other in zip(photos, again, strict=False):
            assert photo.image.tobytes() == other.image.tobytes()
        for photo in photos:
            assert is_held_out(kind, photo.who.values)
            assert photo.scene == Scene()
            prepared = prepared_photo(photo)
            assert (prepared.mask is None) == (kind == "art")
            if prepared.mask is not None:
                assert numpy.array_equal(numpy.asarray(prepared.mask) > 0, photo.mask())
        assert photos[0].subject in SUBJECTS


def test_pixels_are_as_the_judge_takes_them(drawings):
    pixels = pixels_of([drawings[0].image, drawings[1].image])
    assert pixels.shape == (2, 3, 64, 64)
    red, _, blue = drawings[0].image.getpixel((5, 40))
    assert pixels[0, 0, 40, 5] == pytest.approx(red / 127.5 - 1)
    assert pixels[0, 2, 40, 5] == pytest.approx(blue / 127.5 - 1)


# ── tables ──


def test_summaries_are_means_over_identities():
    scores = Scores(
        identity=numpy.array([[1.0, 0.5], [0.5, 0.5], [0.25, 0.25]]),
        prompt=numpy.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]),
    )
    # Means of the rows: 0.75, 0.5, 0.25, of deviation 0.25.
    assert scores.summary() == {
        "identity": 0.5,
        "identity±": round(1.96 * 0.25 / 3**0.5, 4),
        "prompt": 1.0,
        "prompt±": 0.0,
    }
    single = Scores(numpy.array([[1.0, 0.0]]), numpy.array([[0.0, 0.0]]))
    assert single.summary() == {"identity": 0.5, "identity±": 0.0, "prompt": 0.0, "prompt±": 0.0}


def row(identity, prompt, spread=0.01):
    each = [identity - spread, identity + spread]
    return {
        "identity": identity, "identity±": spread, "prompt": prompt, "prompt±": 2 * spread,
        "each": each,
    }  # fmt: skip


def test_the_table_places_every_row_between_floor_and_ceiling():
    rows = {
        "drawings": row(0.9, 1.0),
        "plain word": row(0.4, 0.9),
        "rates of DreamBooth-like, 5 steps": {"0.0001": 1.5, "0.0002": 1.25},
        "tuned, 5 steps": row(0.65, 0.8),
        "DreamBooth-like, 5 steps": row(0.5, 0.7),
    }
    lines = table(rows).splitlines()
    width = lines[0].count("|")
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if line.startswith("| ") and line.count("|") == width
    }
    assert cells["drawings"][:2] == ["0.900 ± 0.010", "100%"]
    assert cells["plain word"][:2] == ["0.400 ± 0.010", "0%"]
    assert cells["tuned, 5 steps"] == ["0.650 ± 0.010", "50%", "0.800 ± 0.020"]
    assert cells["DreamBooth-like, 5 steps"][1] == "20%"
    assert not any(name.startswith("rates") for name in cells)


def test_a_document_is_filled_between_its_marks(tmp_path):
    path = tmp_path / "mini.md"
    path.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nmiddle\n<!-- b -->\n<!-- /b -->\nend\n")
    write_between(path, "a", "| new |")
    assert path.read_text() == ("before\n<!-- a -->\n| new |\n<!-- /a -->\nmiddle\n<!-- b -->\n<!-- /b -->\nend\n")
    write_between(path, "b", "more")
    once = path.read_text()
    write_between(path, "a", "| new |")
    write_between(path, "b", "more")
    assert path.read_text() == once
    with pytest.raises(ValueError):
        write_between(path, "c", "nowhere")
    assert path.read_text() == once


def test_the_document_has_every_mark():
    from mini_world.report import COUNTS
    from tests.mini_world.conftest import ROOT

    text = (ROOT / "docs" / "mini.md").read_text(encoding="utf-8")
    for mark in ("training", *(f"figures {kind}" for kind in COUNTS)):
        assert text.count(f"<!-- {mark} -->") == text.count(f"<!-- /{mark} -->") == 1
