"""The story of a domain of one's own, measured: `python -m mini_world dogs` fills docs/mini.md and draws docs/my-dogs.png.

The public `pretrain` learns from the two hundred drawings in examples/dogs, as the README does it; then dogs that nothing
has ever drawn are personalized with it, with the domain of cats (the paper's figure 8), and with the plain word.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from PIL import Image

from e4t_cli.api.personalization import personalize
from e4t_cli.api.pretraining import pretrain
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.sampling import SamplingConfig
from mini_world.evaluate import drawn_scores, held_out_photos, plain_method, run_method, tuned_method
from mini_world.report import table, write_between

COUNT = 20
LOOK = SamplingConfig(steps=12, guidance=3.0)
MORE_STEPS = 15
"""Of tuning through the wrong domain: figure 8 gives a dog more steps than a cat."""
PROMPTS = ("S* on the beach", "S* in the snow", "S* wearing a red hat", "a pencil sketch of S*")


def train_dogs(folder: Path) -> tuple[Path, float]:
    """Pre-train my_dogs as the README does; returns its folder and the seconds that it took."""
    target, note = folder / "my_dogs", folder / "my_dogs.json"
    if not (target / "domain.toml").exists():
        begun = time.monotonic()
        pretrain("my_dogs", "examples/dogs", descriptor="dog", base="mini", folder=target)
        note.write_text(json.dumps({"seconds": round(time.monotonic() - begun, 1)}))
    return target, json.loads(note.read_text())["seconds"]


def evaluate_dogs(model, judge, mine: DomainWeights, cat: DomainWeights) -> dict[str, dict]:
    """Rows of the table: name -> summary."""
    photos = held_out_photos("dog", COUNT, seed=11)

    def run(pack: DomainWeights, steps: int):
        config = pack.tuning.replace(steps=steps)
        return run_method(model, judge, "dog", photos, tuned_method(model, pack, config), LOOK)

    few = mine.tuning.steps
    return {
        "drawings": drawn_scores(judge, "dog", photos).summary(),
        "plain word": run_method(model, judge, "dog", photos, plain_method(model, "dog"), LOOK).summary(),
        "my_dogs, no tuning": run(mine, 0).summary(),
        f"my_dogs, {few} steps": run(mine, few).summary(),
        f"cat, {few} steps": run(cat, few).summary(),
        f"cat, {MORE_STEPS} steps": run(cat, MORE_STEPS).summary(),
    }


def draw_dogs(mine: Path, target: Path) -> None:
    """Before and after: the plain word, my_dogs, and the domain of cats with more steps, all on examples/rex.png."""
    from e4t_cli.hub.bases import find_base
    from e4t_cli.images.results import contact_sheet
    from e4t_cli.models.denoiser import TunedModel
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.prompts import parse_prompt
    from e4t_cli.sampling import sample

    photo = Image.open("examples/rex.png").convert("RGB").resize((64, 64), Image.Resampling.BOX)
    model = TextToImageModel.load(find_base("mini"))
    plain = list(sample(model, TunedModel.plain(model, "dog"), [parse_prompt(p) for p in PROMPTS], [1] * len(PROMPTS)))
    pictures, captions = [], []
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
        pictures += [photo, *drawn]
        captions += ["the photo", *(f"{name}: {prompt}" for prompt in PROMPTS)]
    sheet = contact_sheet(pictures, captions, columns=len(PROMPTS) + 1)
    sheet.quantize(256).save(target, optimize=True)


def write_dogs(folder: Path) -> None:
    """Train, measure, draw."""
    from mini_world.stages import PACKS, load_judge, load_model

    place, seconds = train_dogs(folder)
    draw_dogs(place, Path("docs/my-dogs.png"))
    model, judge = load_model(), load_judge()
    rows = evaluate_dogs(model, judge, DomainWeights.load(place), DomainWeights.load(PACKS / "cat" / "mini"))
    text = table(rows) + f"\n\n`e4t pretrain --domain my_dogs --data examples/dogs` took {seconds:.0f} seconds for this table."
    write_between(Path("docs/mini.md"), "figures dogs", text)
