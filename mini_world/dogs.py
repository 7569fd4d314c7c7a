"""Measures a user domain: `python -m mini_world dogs` fills docs/mini.md and writes docs/my-dogs.png.

The public `pretrain` is run on the two hundred drawings in examples/dogs, as in the README. Then held-out dogs are personalized
with that domain, with the domain of cats (the paper's figure 8), and with the plain word.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from PIL import Image

from e4t_cli.api.personalization import personalize
from e4t_cli.api.pretraining import pretrain
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.schedulers import SamplingConfig
from mini_world.evaluate import drawn_scores, held_out_photos, plain_method, run_method, tuned_method
from mini_world.report import table, write_between

COUNT = 20
SAMPLING = SamplingConfig(steps=12, guidance=3.0)
MORE_STEPS = 15
"""Tuning steps with the wrong domain: in figure 8 a dog gets more steps than a cat."""
PROMPTS = ("S* on the beach", "S* in the snow", "S* wearing a red hat", "a pencil sketch of S*")


def train_dogs(folder: Path) -> tuple[Path, float]:
    """Pre-train my_dogs as in the README; returns its folder and the seconds it took."""
    target, save_metrics = folder / "my_dogs", folder / "my_dogs.json"
    if not (target / "domain.toml").exists():
        begun = time.monotonic()
        pretrain("my_dogs", "examples/dogs", descriptor="dog", base="mini", folder=target)
        save_metrics.write_text(json.dumps({"seconds": round(time.monotonic() - begun, 1)}))
    return target, json.loads(save_metrics.read_text())["seconds"]


def evaluate_dogs(model, judge, mine: DomainWeights, cat: DomainWeights) -> dict[str, dict]:
    """Rows of the table: name -> summary."""
    photos = held_out_photos("dog", COUNT, seed=11)

    def run(pretrained: DomainWeights, steps: int):
        config = pretrained.tuning.replace(steps=steps)
        return run_method(model, judge, "dog", photos, tuned_method(model, pretrained, config), SAMPLING)

    few = mine.tuning.steps
    return {
        "drawings": drawn_scores(judge, "dog", photos).summary(),
        "plain word": run_method(model, judge, "dog", photos, plain_method(model, "dog"), SAMPLING).summary(),
        "my_dogs, no tuning": run(mine, 0).summary(),
        f"my_dogs, {few} steps": run(mine, few).summary(),
        f"cat, {few} steps": run(cat, few).summary(),
        f"cat, {MORE_STEPS} steps": run(cat, MORE_STEPS).summary(),
    }


def draw_dogs(mine: Path, target: Path) -> None:
    """Write the comparison on examples/rex.png: the plain word, my_dogs, and the domain of cats with more steps."""
    from e4t_cli.hub.bases import find_base
    from e4t_cli.images.results import contact_sheet
    from e4t_cli.models.denoiser import TunedModel
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.prompts import parse_prompt
    from e4t_cli.sampling import sample

    photo = Image.open("examples/rex.png").convert("RGB").resize((64, 64), Image.Resampling.BOX)
    model = TextToImageModel.load(find_base("mini"))
    plain = list(sample(model, TunedModel.plain(model, "dog"), [parse_prompt(p) for p in PROMPTS], [1] * len(PROMPTS)))
    images, captions = [], []
    for name, drawn in (
        ("before: the word dog", plain),
        ("my_dogs", [one.image for one in personalize(str(mine), "examples/rex.png", PROMPTS, seed=1, base=model).images]),
        (
            f"cat, {MORE_STEPS} steps",
            [
                one.image
                for one in personalize("cat", "examples/rex.png", PROMPTS, seed=1, base=model, tune_steps=MORE_STEPS).images
            ],
        ),
    ):
        images += [photo, *drawn]
        captions += ["the photo", *(f"{name}: {prompt}" for prompt in PROMPTS)]
    sheet = contact_sheet(images, captions, columns=len(PROMPTS) + 1)
    sheet.quantize(256).save(target, optimize=True)


def write_dogs(folder: Path) -> None:
    """Train, measure, and write the results into docs/."""
    from mini_world.stages import PACKS, load_judge, load_model

    place, seconds = train_dogs(folder)
    draw_dogs(place, Path("docs/my-dogs.png"))
    model, judge = load_model(), load_judge()
    rows = evaluate_dogs(model, judge, DomainWeights.load(place), DomainWeights.load(PACKS / "cat" / "mini"))
    text = table(rows) + f"\n\n`e4t pretrain --domain my_dogs --data examples/dogs` took {seconds:.0f} seconds for this table."
    write_between(Path("docs/mini.md"), "figures dogs", text)
