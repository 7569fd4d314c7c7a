"""Pre-trains the three domains of `mini` with the library's `pretrain_domain`.

The hyperparameters for a base this small are defined here and are saved with the weights of each domain.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image

from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.pretraining.checkpoints import CheckpointOptions
from e4t_cli.pretraining.encoded_images import EncodedImages, encode_images
from e4t_cli.pretraining.loop import DomainInfo, PretrainingStep, TrainingCallbacks, pretrain_domain
from e4t_cli.progress import StopRequest
from e4t_cli.prompts import training_templates
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.discovery import find_domain
from e4t_cli.registry.domain import PreparedImage
from mini_world.next.data import Drawings
from mini_world.next.loop import Unfinished
from mini_world.next.stopping import seconds_left
from mini_world.next.world import SUBJECT_LABELS

# Departure: λ_r. The norm of a word embedding is about 0.3 here. A weight of 0.01 on ‖E‖² (with s = 0.1, 1 on ‖s·E‖²) drives E
# to zero within a few hundred steps, because the identity reduces the loss by a thousandth only.
# Departure: the learning rate. 1e-6 · 16 is for a pre-trained tower of 632 M parameters and 480,000 samples.
# Departure: faces are masked in pre-training too, so that E represents the head and not the garment.
REG_WEIGHT = 1e-5
# For faces: at 1e-5 the predicted embedding had a larger norm than the descriptor's (0.45 against 0.35), and prompts were
# followed less.
FACE_REG_WEIGHT = 1e-4
SAVE_EVERY = 100  # steps, about a minute of one core


@dataclass(frozen=True)
class DomainConfigs:
    """The configs of one domain on `mini`."""

    pretraining: PretrainingConfig
    tuning: TuningConfig


def domain_configs(steps: dict[str, int], batch: int = 32) -> dict[str, DomainConfigs]:
    """The configs of the three domains, each pre-trained for `steps` steps of `batch` images."""
    faces = PretrainingConfig(
        steps=steps["face"],
        base_learning_rate=1e-3 / batch,
        batch_size=batch,
        reg_weight=FACE_REG_WEIGHT,
        mask=True,
        offsets_rate=0.01,
    )
    others = faces.replace(mask=False, reg_weight=REG_WEIGHT)
    # Departure: the learning rates of tuning were chosen on identities that no table reports; the base has a hundredth of the
    # parameters of Stable Diffusion and needs a hundred times the learning rate. Section 3.5 has three times the learning rate
    # of faces for cats and styles; here it is the same for all, the best of four for cats and for styles.
    tuning = TuningConfig(steps=15, base_learning_rate=1e-4 / 16, reg_weight=FACE_REG_WEIGHT, mask=True)
    quick = tuning.replace(steps=5, reg_weight=REG_WEIGHT, mask=False)
    return {
        "face": DomainConfigs(faces, tuning),
        "cat": DomainConfigs(others.replace(steps=steps["cat"]), quick),
        "art": DomainConfigs(others.replace(steps=steps["art"]), quick),
    }


def prepared_images(drawings: Drawings, masks: bool):
    """Yield drawings as `PreparedImage`s, with the exact masks of their subjects if `masks`."""
    for image, labels in zip(drawings.images, drawings.labels, strict=True):
        mask = Image.fromarray(numpy.isin(labels, SUBJECT_LABELS).astype(numpy.uint8) * 255) if masks else None
        yield PreparedImage(image=Image.fromarray(numpy.asarray(image)), mask=mask)


def encode_drawings(model, drawings: Drawings, path: Path, *, masks: bool) -> EncodedImages:
    """Latents, [CLS] features and masks of a domain's images, cached in `path`."""
    if path.exists():
        return EncodedImages.load(path)
    images = prepared_images(drawings, masks)
    data = encode_images(model, images, batch_size=64, total=len(drawings), autocast=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    data.save(partial)
    partial.replace(path)
    return data


def train_domain(model, folder: Path, name: str, data: EncodedImages, plan: DomainConfigs, watch=None) -> DomainWeights:
    """Pre-train one domain with checkpoints in `folder`; `watch(step)` is called after every step.

    Raises:
        Unfinished: the time of the run is over, or SIGTERM was received; a checkpoint is saved.
    """
    domain = find_domain(name)
    folder.mkdir(parents=True, exist_ok=True)
    log, begun = folder / f"domain-{name}.jsonl", time.monotonic()
    stop, terminated = StopRequest(), []

    def report(progress) -> None:
        if progress.values and (progress.done % 50 == 0 or progress.done == plan.pretraining.steps):
            with log.open("a") as lines:
                line = {"step": progress.done, "seconds": round(time.monotonic() - begun, 1)} | dict(progress.values)
                lines.write(json.dumps(line) + "\n")

    def on_step(step: PretrainingStep) -> None:
        if terminated or seconds_left() <= 0:
            stop.ask()
        if watch is not None:
            watch(step)

    before = signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))
    try:
        return pretrain_domain(
            model,
            data,
            domain=DomainInfo(
                name=name,
                descriptor=domain.descriptor,
                templates=tuple(training_templates(domain)),
                tuning=plan.tuning,
                licence="Apache-2.0",
                notes="drawn by mini_world; trained by make mini",
            ),
            config=plan.pretraining,
            checkpoints=CheckpointOptions(folder=folder / "checkpoints", every=SAVE_EVERY),
            callbacks=TrainingCallbacks(stop=stop, on_progress=report, on_step=on_step),
        )
    except KeyboardInterrupt:
        if stop.asked:
            raise Unfinished(f"domain-{name}: stopped with its state saved; the same command goes on from there.") from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
