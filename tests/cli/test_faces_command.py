"""`e4t faces`: numbered boxes in a picture, JSON, and what is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from e4t_domains import face as module
from tests.domains.test_face_detection import Upright, drawn

ME = str(Path(__file__).parents[2] / "examples" / "me.png")


@pytest.fixture
def party(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "find_detector", lambda target: Upright())
    drawn((640, 480), ((150, 240), 30, 10), ((450, 220), 45, -20)).save(tmp_path / "party.png")
    return "party.png"


def test_the_picture_and_one_object_for_each_face(run, tmp_path, party):
    ended = run("faces", party, "--json")
    assert ended.code == 0, ended.err
    left, right, picture = map(json.loads, ended.lines)
    assert [one["number"] for one in (left, right)] == [1, 2]
    assert left["box"][0] < 150 < left["box"][0] + left["box"][2] and len(left["points"]) == 5
    assert right["chosen"] and not left["chosen"] and 0.5 < right["score"] <= 1
    assert (picture["type"], picture["path"], picture["faces"]) == ("picture", "outputs/party-faces.png", 2)
    with Image.open(tmp_path / picture["path"]) as shown, Image.open(tmp_path / party) as photo:
        assert shown.size == photo.size and shown.tobytes() != photo.tobytes()
        x, y, width, height = left["box"]
        edges = [shown.getpixel((round(x + across * width), round(y + height))) for across in (0.25, 0.75)]
        assert edges == [(255, 230, 0)] * 2
        assert "e4t" not in shown.info  # it is no generated image


def test_without_json_only_the_path_and_no_file_is_overwritten(run, tmp_path, party):
    assert run("faces", party, "-o", "seen").lines == ["seen/party-faces.png"]
    assert run("faces", party, "-o", "seen").lines == ["seen/party-faces-2.png"]
    assert run("faces", party, "-o", "one.png").lines == ["one.png"]
    assert run("faces", party, "-o", "one.png").code == 2
    assert run("faces", party, "-o", "one.png", "--force").lines == ["one.png"]
    assert run("faces", party, "-o", "one.jpg").code == 2


def test_the_numbers_are_those_of_personalize(run, tmp_path, party):
    for number in ("1", "2", "center"):
        command = ["personalize", "face", party, "--base", "sd14", "--face", number, "--mask", "face-ellipse"]
        ended = run(*command, "--save-prepared", f"{number}.png")
        assert ended.code == 0, ended.err
        assert f"2 faces, {'the central one' if number == 'center' else 'number ' + number}" in ended.err
        assert "elliptic mask" in ended.err
    first, second, central = ((tmp_path / f"{name}.png").read_bytes() for name in ("1", "2", "center"))
    assert first != second == central
    refused = run("personalize", "face", party, "--base", "sd14", "--face", "3", "--save-prepared", "3.png")
    assert refused.code == 3 and "e4t faces" in refused.err


def test_no_face_and_no_detector(run, tmp_path, party):
    drawn((320, 240)).save(tmp_path / "empty.png")
    ended = run("faces", "empty.png", "-o", "here")
    assert ended.code == 3 and "no face" in ended.err and not any((tmp_path / "here").iterdir())
    assert run("faces", "nobody.png").code == 2


def test_without_a_network_the_detector_is_named(run):
    ended = run("faces", ME, "--offline")
    assert ended.code == 4 and "face_detection_yunet" in ended.err and "without --offline" in ended.err


def test_the_faces_of_drawings(run):
    ended = run("faces", ME, "--base", "mini", "--json", "--offline")
    assert ended.code == 0 and json.loads(ended.lines[0])["chosen"]
