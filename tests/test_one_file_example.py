"""examples/e4t_in_one_file.py, a second implementation of the method, agrees with the library."""

import ast
import importlib.util
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image, ImageDraw

from e4t_cli.images.loading import center_square
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.sampling import sample
from e4t_cli.training.tuning import TuningOptions, tune

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILE = EXAMPLES / "e4t_in_one_file.py"
PROMPT, SEED = "S* on the beach", 3


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("one_file_example", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["cat", "face with a mask"])
def both(request, example):
    """The same photo, seed and config through the library and through the example."""
    torch.set_num_threads(1)
    domain, _, masked = request.param.partition(" ")
    domain_folder = example.PACKS / domain / "mini"
    with Image.open(EXAMPLES / ("me.png" if masked else "tiger.png")) as photo:
        image, mask = center_square(photo.convert("RGB"), 64), None
    if masked:
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).ellipse((9, 6, 50, 61), fill=255)  # its border cuts through latents
        ImageDraw.Draw(mask).rectangle((20, 55, 41, 63), fill=100)

    model, pretrained = TextToImageModel.load(example.BASE), DomainWeights.load(domain_folder)
    # The gradients of `mini` are smaller than the domain's clipping limit, which would leave it untested.
    config = pretrained.tuning.replace(steps=2 if masked else 3, gradient_clip=0.01)
    events = []
    tuned = tune(
        model,
        pretrained,
        PreparedImage(image=image, mask=mask),
        config,
        seed=SEED,
        on_progress=lambda progress: events.append(progress.values),
        options=TuningOptions(autocast=False),
    )
    (picture,) = sample(model, tuned, [parse_prompt(PROMPT)], [SEED])

    e4t = example.E4T(example.BASE, domain_folder)
    e4t.info["tuning"] |= {"steps": config.steps, "gradient_clip": config.gradient_clip}
    history = e4t.tune(image, mask, SEED)
    return SimpleNamespace(
        rate=config.learning_rate, tuned=tuned, picture=picture,
        losses=[[one["loss"], one["diffusion"], one["penalty"]] for one in events],
        e4t=e4t, history=history, drawn=e4t.sample(PROMPT, SEED),
    )  # fmt: skip


def test_every_step_has_the_same_losses(both):
    found, expected = torch.tensor(both.history), torch.tensor(both.losses)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # measured: 2e-7


@torch.no_grad()
def test_the_tuned_weights_are_the_same(both):
    """In units of the learning rate, which is about what AdamW moves a weight by in a step."""
    modules = [(both.e4t.unet, both.tuned.unet), (both.e4t.encoder, both.tuned.encoder)]
    differences = torch.cat(
        [
            (getattr(mine.get_submodule(path), name) - expected).flatten() / both.rate
            for mine, other in modules
            for path, layer in other.named_modules()
            for name, expected in layer.named_parameters(recurse=False)
        ]
    )
    assert len(differences) == sum(w.numel() for _, other in modules for w in other.parameters())
    # Where a gradient is nothing but rounding, so is what AdamW makes of it.
    assert differences.abs().max() < 0.2  # measured: 0.003
    assert differences.square().mean().sqrt() < 5e-4  # measured: 8e-6


def test_the_images_are_the_same(both):
    found, expected = (numpy.asarray(one).astype(int) for one in (both.drawn, both.picture))
    assert abs(found - expected).max() <= 1  # measured: 0
    assert (found != expected).mean() < 0.01


def test_it_is_short_and_stands_alone():
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    own = {TextToImageModel.__module__.partition(".")[0], "e4t_domains", "mini_world", "tests"}
    assert not own & {name.partition(".")[0] for name in imported}


def test_it_runs_as_its_docstring_describes(tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "tiger.png"
    photo = EXAMPLES / "tiger.png"
    monkeypatch.setattr("sys.argv", list(map(str, [FILE, photo, PROMPT, "--output", output])))
    runpy.run_path(str(FILE), run_name="__main__")
    said = capsys.readouterr()
    assert said.out == f"{output}\n"
    assert said.err.count("L 0.0") == 5
    with Image.open(output) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 64))
