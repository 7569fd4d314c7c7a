"""Trains the text encoder of `mini` on captions alone: linear heads read from its hidden states what each caption says.

Contrastive training with small batches leaves words that a text encoder does not distinguish, and large ones need a GPU. A head
for every attribute, every part of the context and the rare identifiers asks for each word directly, and needs no image. The heads
read the end token and the mean of the hidden states, which the U-Net's cross-attention sees, with noise: a word that moved the
states by less than the noise would not be read, so that each word has to move them visibly.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from mini_world.next.captions import Caption, write_caption
from mini_world.next.identities import ATTRIBUTES, DEGREES, Identity, draw_identity
from mini_world.next.loop import default_device, random_rows, train
from mini_world.next.optimizers import adamw
from mini_world.next.scenes import COLOURS, FRAMINGS, MEDIA, PLACES, ROLES
from mini_world.next.text import LENGTH, WIDTH, CaptionEncoder, CaptionTokenizer, TokenizedCaptions
from mini_world.next.things import THINGS
from mini_world.next.words import IDENTIFIERS, word_of
from mini_world.next.world import Scene

ABSENT = -100  # the ignore_index of cross_entropy
UNSAID = "unsaid"
KINDS = ("face", "cat", "dog", "art", "thing")
SHARES = (0.38, 0.2, 0.14, 0.18, 0.1)
CONTEXT: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "subject": ("face", "cat", "dog", *THINGS, UNSAID),
    "place": PLACES,
    "role": ROLES,
    "colour": (*COLOURS, UNSAID),
    "medium": MEDIA,
    "framing": FRAMINGS,
    "identifier": ("none", *IDENTIFIERS),
}
# Every head of a category: (kind or "scene", name, classes). The attributes have a class for captions that do not name them.
CATEGORIES: list[tuple[str, str, tuple[str, ...]]] = [("scene", name, values) for name, values in CONTEXT.items()] + [
    (kind, name, (*values, UNSAID)) for kind, table in ATTRIBUTES.items() for name, values in table.items()
]
CATEGORY_SIZES = [len(values) for _, _, values in CATEGORIES]
# Every degree, one regression each.
DEGREE_NAMES = [(kind, name) for kind, table in DEGREES.items() for name in table]
NOISE = 0.6  # of the normalized hidden states, whose components have variance 1


@dataclass(frozen=True)
class Statement:
    """What a caption is about: the subject's word, its identity and its scene."""

    subject: str
    who: Identity | None
    scene: Scene


@dataclass(frozen=True)
class Readings:
    """What captions say: categories (N, heads) as positions, ABSENT where a head does not apply; degrees (N, degrees), 0 where
    unsaid, NaN where they do not apply; overridden (N, heads): whether a phrase corrects a folded word."""

    categories: Tensor
    degrees: Tensor
    overridden: Tensor

    def __getitem__(self, rows) -> Readings:
        return Readings(*(column[rows] for column in vars(self).values()))

    def to(self, device: torch.device) -> Readings:
        return Readings(*(column.to(device) for column in vars(self).values()))


def draw_statement(rng: random.Random, *, held_out: bool = False) -> Statement:
    """A random identity in a random scene, every part of which is less often the usual one than in drawings."""
    kind = rng.choices(KINDS, SHARES)[0]
    who = None if kind == "thing" else draw_identity(kind, rng, held_out=held_out)
    animate = kind in ("face", "cat", "dog")

    def often(values: tuple[str, ...], share: float) -> str:
        return values[0] if rng.random() < share else rng.choice(values[1:])

    role = often(ROLES, 0.35) if animate else "none"
    scene = Scene(
        place=often(PLACES, 0.3),
        role=role,
        colour=rng.choice(COLOURS[1:]) if role in ("hat", "scarf") else "none",
        medium="photo" if kind == "art" else often(MEDIA, 0.5),
        framing=often(FRAMINGS, 0.5),
    )
    return Statement(kind if animate else rng.choice(THINGS), who, scene)


def read_caption(statement: Statement, caption: Caption) -> tuple[list[int], list[float]]:
    """What this caption says of the statement: the row of `Readings`."""
    who, scene = statement.who, statement.scene
    context = vars(scene) | {
        "kind": who.kind if who is not None else "thing",
        "subject": statement.subject if "subject" in caption.said else UNSAID,
        "colour": scene.colour if "colour" in caption.said or scene.colour == "none" else UNSAID,
        "identifier": caption.identifier,
    }
    categories = []
    for kind, name, values in CATEGORIES:
        if kind == "scene":
            categories.append(values.index(context[name]))
        elif who is None or who.kind != kind or not who.visible(name):
            categories.append(ABSENT)
        else:
            categories.append(values.index(who[name] if name in caption.said else UNSAID))
    degrees = []
    for kind, name in DEGREE_NAMES:
        mine = who is not None and who.kind == kind
        degrees.append((who.degrees[name] if name in caption.said else 0.0) if mine and who is not None else float("nan"))
    return categories, degrees


def draw_captions(
    tokenizer: CLIPTokenizer, count: int, seed: int, *, held_out: bool = False
) -> tuple[TokenizedCaptions, Readings]:
    """`count` random captions, tokenized, and what they say."""
    rng = random.Random(f"{seed} captions {held_out}")
    categories, overridden = numpy.empty((count, len(CATEGORIES)), numpy.int8), numpy.zeros((count, len(CATEGORIES)), bool)
    captions, degrees = [], []
    for row in range(count):
        statement = draw_statement(rng, held_out=held_out)
        captions.append(write_caption(statement.subject, statement.who, statement.scene, rng))
        said, values = read_caption(statement, captions[-1])
        categories[row] = said
        overridden[row] = [name in captions[-1].overridden for _, name, _ in CATEGORIES]
        degrees.append(values)
    tokens = CaptionTokenizer(tokenizer)(captions)
    return tokens, Readings(torch.from_numpy(categories), torch.tensor(degrees), torch.from_numpy(overridden))


class ReadOut(nn.Module):
    """Linear heads on the hidden states of a text encoder: one set on a position after the text, one on the mean of all.

    The padding after the end token attends to the whole text, and the U-Net's cross-attention sees it: so the first set reads the
    end token, and in training half of the time one of the positions after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.categories = nn.ModuleList(nn.Linear(WIDTH, sum(CATEGORY_SIZES)) for _ in range(2))
        self.degrees = nn.ModuleList(nn.Linear(WIDTH, len(DEGREE_NAMES)) for _ in range(2))

    def forward(self, hidden: Tensor, ends: Tensor, generator: torch.Generator | None = None) -> list[tuple[Tensor, Tensor]]:
        """Hidden states (B, length, WIDTH) to logits (B, sum of sizes) and degrees
        (B, degrees), for both sets; with a generator, for training, of other positions and with noise.

        ends (B,): the positions of the end tokens."""
        rows, places = torch.arange(len(hidden), device=hidden.device), ends.long()
        if generator is not None:
            later = torch.rand(2, len(hidden), generator=generator, device=hidden.device)
            places = torch.where(later[0] < 0.5, places, places + (later[1] * (hidden.shape[1] - places)).long())
        results = []
        for k, states in enumerate((hidden[rows, places], hidden.mean(1))):
            states = F.layer_norm(states.float(), (WIDTH,))
            if generator is not None:
                states = states + NOISE * torch.randn(states.shape, generator=generator, device=states.device)
            results.append((self.categories[k](states), self.degrees[k](states)))
        return results


def read_out_loss(readings: list[tuple[Tensor, Tensor]], targets: Readings) -> dict[str, Tensor]:
    """Mean cross-entropy of the heads that apply, and mean squared error of the degrees that apply."""
    categories = targets.categories.long()
    said = targets.degrees.isfinite()
    words = degrees = torch.zeros((), device=categories.device)
    for logits, values in readings:
        for part, target in zip(logits.float().split(CATEGORY_SIZES, 1), categories.unbind(1), strict=True):
            words = words + F.cross_entropy(part, target, reduction="sum", ignore_index=ABSENT)
        degrees = degrees + (values.float()[said] - targets.degrees[said]).square().mean()
    return {"words": words / (2 * (categories != ABSENT).sum()), "degrees": 0.5 * degrees}


def train_text(folder: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, *, steps: int, batch: int, captions: int):
    """Train the text encoder with the heads on `captions` random captions; returns the heads."""
    device = default_device()
    torch.manual_seed(2)
    caption_encoder, heads = CaptionEncoder(text_encoder), ReadOut()
    tokens, targets = (part.to(device) for part in draw_captions(tokenizer, captions, seed=5))
    # Batches of captions of about one length are shortened to it; one in four has all positions, so that these are trained too.
    by_length = tokens.ends.long().argsort(stable=True)

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step % 4 == 0:
            rows, length = random_rows(captions, batch, generator), LENGTH
        else:
            pool = min(captions, 16 * batch)
            first = int(random_rows(captions - pool + 1, 1, generator))
            rows = by_length[first + random_rows(pool, batch, generator)]
            length = min(LENGTH, int(tokens.ends[rows].max()) + 2)
        hidden, _ = caption_encoder(tokens[rows].shortened(length))
        return read_out_loss(heads(hidden, tokens.ends[rows], generator), targets[rows])

    modules = {"text_encoder": text_encoder, "heads": heads}
    decayed = partial(adamw, weight_decay=0.03)
    train("text", folder, modules, loss_of_step, steps=steps, learning_rate=1e-3, average=0.99, optimizer=decayed)
    return heads


@torch.no_grad()
def read_out_accuracy(caption_encoder: CaptionEncoder, heads: ReadOut, tokens: TokenizedCaptions, targets: Readings):
    """Read from the mean of the hidden states: the accuracy of each head where the caption says a value (context: always), and
    of all attributes where a phrase corrects a folded word ("overridden"); of degrees the mean absolute error where said."""
    parts = []
    for rows in torch.arange(len(tokens)).split(256):
        hidden, _ = caption_encoder(tokens[rows])
        parts.append(heads(hidden, tokens.ends[rows])[1])
    logits, degrees = (torch.cat(columns) for columns in zip(*parts, strict=True))
    result, corrected = {}, []
    columns = zip(
        CATEGORIES,
        logits.split(CATEGORY_SIZES, 1),
        targets.categories.long().unbind(1),
        targets.overridden.unbind(1),
        strict=True,
    )
    for (kind, name, values), part, target, wrong in columns:
        corrected.append((part.argmax(1) == target)[wrong & (target != ABSENT)])
        some = (target != ABSENT) if kind == "scene" else (target != ABSENT) & (target != len(values) - 1)
        if some.any():
            result[f"{kind}.{name}"] = round(float((part.argmax(1) == target)[some].float().mean()), 4)
    result["overridden"] = round(float(torch.cat(corrected).float().mean()), 4)
    for column, (kind, name) in enumerate(DEGREE_NAMES):
        truth = targets.degrees[:, column]
        some = truth.isfinite() & (truth != 0)
        if some.any():
            result[f"{kind}.{name} error"] = round(float((degrees[some, column] - truth[some]).abs().mean()), 4)
    return result


def measured_phrases() -> dict[str, str]:
    """What `word_distances` measures: phrases to short captions that contain them; "nice" has no meaning, for comparison."""
    named = [*IDENTIFIERS, "nice"]
    named += [word_of(name, value) for name, values in ATTRIBUTES["face"].items() for value in values]
    texts = {
        word: f"a photo of a {word} face" for word in [*named, *(side for sides in DEGREES["face"].values() for side in sides)]
    }
    texts |= {f"in a {colour} hat": f"a photo of a face in a {colour} hat" for colour in COLOURS[1:]}
    ends = ("wearing a crown", "in a red scarf", "as an astronaut", "on the beach", "in the snow", "in the forest", "in the city",
            "in space", "from afar", "up close", "as pixel art", "as an oil painting", "as a pencil sketch")  # fmt: skip
    return texts | {end: f"a photo of a face {end}" for end in ends}


@torch.no_grad()
def word_distances(caption_encoder: CaptionEncoder, tokenizer: CLIPTokenizer, phrases: dict[str, str]) -> dict[str, float]:
    """How far each phrase moves the hidden states of all other positions, relative to their norm.

    `phrases`: a phrase to the caption that contains it, which is compared with the same caption without it, position by position.
    """
    read = CaptionTokenizer(tokenizer)
    result = {}
    for phrase, text in phrases.items():
        before, after = text.split(phrase)
        tokens = read([Caption(text, ""), Caption(f"{before} {after}", ""), Caption(before, ""), Caption(phrase, "")])
        first, length = int(tokens.ends[2]), int(tokens.ends[3]) - 1
        (named, unnamed), _ = caption_encoder(tokens[:2])
        named, unnamed = torch.cat([named[:first], named[first + length :]]), unnamed[:-length]
        result[phrase] = round(float((named - unnamed).norm() / unnamed.norm()), 4)
    return result
