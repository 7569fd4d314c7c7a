"""What stands at any moment of pre-training, as a pack, and what whoever watches is shown.

The losses between two reports: kept on the device until they are checked and smoothed.

The loop of domain pre-training (section 3.3).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from e4t_cli.models.domain_weights import DomainWeights, facts_about, usual_limits
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.adapters import frozen_copy
from e4t_cli.nn.precision import PrecisionPolicy
from e4t_cli.nn.randomness import generator
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import WordEmbeddingEncoder
from e4t_cli.pretraining.batches import Batches, DistributedContext, Objective
from e4t_cli.pretraining.checkpoints import Checkpoints, check_weights, diverged
from e4t_cli.pretraining.encoded_images import TrainingData
from e4t_cli.progress import Progress, ProgressCallback, StopRequest
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.training.loss import Losses
from e4t_cli.training.optim import adamw


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainingStep:
    """What `on_step` sees after each optimiser step.

    Args:
        step: steps done, 1 …
        encoder, offsets: in training; look, do not touch.
        diffusion, penalty: eq. 4 and eq. 2 of this step's samples (batch,), detached; with several
            processes, of this one's.
        snapshot: call it for a copy of the domain as it is now, ready for `tune`.
    """

    step: int
    encoder: WordEmbeddingEncoder
    offsets: WeightOffsets
    diffusion: Tensor
    penalty: Tensor
    snapshot: Callable[[], DomainWeights]


def packed(
    model: TextToImageModel,
    encoder: WordEmbeddingEncoder,
    offsets: WeightOffsets,
    *,
    descriptor: str,
    images: int,
    **stated: Any,
) -> DomainWeights:
    """Return copies of what is in training, in main memory, as a pack for the base.

    Args:
        images: how many pictures it has learned from.
        stated: other fields of `DomainWeights`.
    """
    return DomainWeights(
        encoder=copy.deepcopy(encoder).cpu(),
        offsets={path: (a.cpu(), b.cpu()) for path, (a, b) in offsets.factors().items()},
        descriptor=descriptor,
        images=images,
        limits=usual_limits(descriptor, model.base.name, images),
        **facts_about(model),
        **stated,
    )


REPORT_EVERY = 10
"""Steps between two progress reports; a report waits for the device."""

SMOOTHING = 0.9
"""Share of the past in the smoothed loss, from one report to the next."""


class RunningLosses:
    """The losses since the last report, kept on the device until then, and what became of them."""

    def __init__(self, config: PretrainingConfig, done: int) -> None:
        self.config, self.reported = config, done
        self.recent: list[Tensor] = []
        self.since = time.perf_counter()
        self.smooth = self.weight = 0.0
        self.seconds = math.inf

    def add(self, diffusion: Tensor, penalty: Tensor) -> None:
        self.recent.append(torch.stack((diffusion.mean(), penalty.mean())))

    def report(self, step: int, kept: int, processes: DistributedContext) -> Progress:
        """Return the means since the last report.

        Paper silent: no gradient clipping here, so a bad number shows in the loss.

        Raises:
            DivergedError: one of them is not finite.
        """
        now = time.perf_counter()
        spent = (now - self.since) / len(self.recent)
        both = torch.stack(self.recent).float()
        # Together with the losses, so that all processes hold the same number of seconds.
        found = processes.mean(torch.cat((both.flatten(), both.new_tensor([spent]))))
        rows, self.seconds = found[:-1].view(-1, 2).tolist(), float(found[-1])
        weight = self.config.reg_weight
        totals = [diffusion + weight * penalty for diffusion, penalty in rows]
        for index, loss in enumerate(totals):
            if not math.isfinite(loss):
                bad = self.reported + index + 1
                raise diverged(bad, f"the loss is {loss}", good=bad - 1, kept=kept)
        loss, diffusion, penalty = torch.tensor(
            [[total, *row] for total, row in zip(totals, rows, strict=True)]
        ).mean(dim=0).tolist()  # fmt: skip
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        self.recent.clear()
        self.since, self.reported = now, step
        return Progress(
            stage="pretrain",
            done=step,
            total=self.config.steps,
            values={
                "loss": loss,
                "diffusion": diffusion,
                "penalty": penalty,
                "smoothed": self.smooth / self.weight,
                "it/s": 1 / max(self.seconds, 1e-9),
            },
        )

    def steps_in(self, seconds: float) -> int:
        """Return how many steps fit into some seconds, 1 … REPORT_EVERY, alike in all processes."""
        return max(1, min(REPORT_EVERY, int(seconds / max(self.seconds, 1e-9))))


MAX_NONFINITE = 2.0
"""Seconds after which several processes have noticed that one of them was asked to stop."""


def pretrain_domain(
    model: TextToImageModel,
    data: TrainingData,
    *,
    name: str,
    descriptor: str,
    config: PretrainingConfig,
    tuning: TuningConfig,
    templates: Sequence[str],
    seed: int = 0,
    licence: str = "",
    notes: str = "",
    autocast: bool | None = None,
    detach_features: bool = False,
    hidden_width: int | None = None,
    micro_batch: int | None = None,
    processes: DistributedContext | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = True,
    force: bool = False,
    stop: StopRequest | None = None,
    on_progress: ProgressCallback | None = None,
    on_step: Callable[[PretrainingStep], None] | None = None,
) -> DomainWeights:
    """Train a domain's encoder and offsets on a frozen base.

    Args:
        data: from `encode_images` with this model, or any other `TrainingData`.
        name, descriptor: of the domain.
        recipe: the numbers of training; its batch is one process's share of a step.
        tuning: the recipe that the pack will carry for personalization.
        templates: training sentences with "{}" in the concept's place.
        seed: of the first weights and of every draw.
        licence, notes: for the pack's card.
        autocast: run the U-Net in bfloat16, with the trained weights in float32; None where the
            hardware has bfloat16.
        detach_features: see `training_loss`.
        hidden_width: of the encoder; None takes the image tower's width.
        micro_batch: samples that go through the model together; gradients are summed until the
            batch is whole, so that it changes memory and rounding, nothing else. None is all.
        processes: from `join_processes`. Each takes its share of the global batch, and the
            learning rate is base × batch × processes (section 3.5). All of them call this
            function alike; the first one reports and saves.
        checkpoints: a folder for resumable state; the last two are kept. None keeps none.
        checkpoint_every: steps between checkpoints.
        resume: go on from the latest checkpoint in the folder, if there is one.
        force: go on also if it is that of a run with other settings.
        stop: when it asks, the step is finished and saved, and KeyboardInterrupt raised.
        on_progress: called every few steps with the mean losses since the last report, the
            smoothed loss and the speed.
        on_step: called after each step. Both are called in the first process only.

    Returns:
        The domain. Its recipe's batch is the global one, so that it says what was done.

    Raises:
        UsageError: the checkpoints are those of another run; the message says in what.
        DivergedError: a loss or a weight is not finite.
        ResourceError: the disk is full; the checkpoint before is intact.
        KeyboardInterrupt: `stop` has asked, and everything is saved.
    """
    processes = processes or DistributedContext()
    total_batch = config.batch_size * processes.count
    own = processes.positions(config.batch_size)
    size = min(micro_batch or config.batch_size, config.batch_size)
    parts = [own[first : first + size] for first in range(0, len(own), size)]
    rate = config.learning_rate * processes.count
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "initial").initial_seed())
        encoder = WordEmbeddingEncoder(model.encoder_config(hidden_width)).to(model.device)
        offsets = WeightOffsets.for_unet(model.unet).to(model.device)
    # Another one, so that the model stays usable, also for what `on_step` draws.
    precision = PrecisionPolicy.resolve(model.device, model.dtype, autocast, loss_scaling=False)
    unet = frozen_copy(model.unet, {}, precision.half)
    optimizer = adamw(
        (list(encoder.parameters()), rate * config.encoder_rate),
        (list(offsets.parameters()), rate * config.offsets_rate),
    )
    descriptor_id = model.descriptor_id(descriptor)
    batches = Batches(model, data, config, templates, descriptor_id, seed, total_batch)
    state = {"encoder": encoder, "offsets": offsets, "optimizer": optimizer}
    run = {
        "name": name,
        "descriptor": descriptor,
        "base": model.fingerprint,
        "data": data.fingerprint,
        "seed": seed,
        "templates": list(templates),
        "autocast": precision.half is not None,
        "detach_features": detach_features,
        "encoder": encoder.config.as_dict(),
        "recipe": {key: value for key, value in config.as_dict().items() if key != "steps"},
        "processes": processes.count,
        "micro_batch": size,
    }
    folder = Path(checkpoints) if checkpoints is not None else None
    history = Checkpoints(folder, run) if folder is not None else None
    done = history.restore(**state, force=force) if history is not None and resume else 0
    processes.check_same(done, "how far their checkpoints are")
    offsets.attach_to(unet)
    objective = Objective(
        model, unet, encoder, offsets,
        e_domain=model.word_embedding(descriptor_id), scale=config.embedding_scale,
        precision=precision, detach_features=detach_features,
    )  # fmt: skip
    trained = processes.wrap(objective)

    def snapshot() -> DomainWeights:
        return packed(
            model,
            encoder,
            offsets,
            name=name,
            descriptor=descriptor,
            tuning=tuning,
            pretraining=config.replace(batch_size=total_batch),
            templates=tuple(templates),
            images=len(data),
            licence=licence,
            notes=notes,
        )

    def remark(sentence: str) -> None:
        if on_progress and processes.first:
            on_progress(Progress(stage="pretrain", remark=sentence))

    if history is not None:
        for sentence in history.remarks:
            remark(sentence)
    remark(
        f"learning rate {rate:.3g} = {config.base_learning_rate:.3g} × batch {config.batch_size}"
        f" × {processes.count} process{'es' if processes.count > 1 else ''}"
        + (f"; going on from step {done}" if done else "")
    )
    stop = stop or StopRequest()
    running = RunningLosses(config, done)
    kept = done
    with stop.listening():
        for step in range(done, config.steps):
            losses = []
            for index, positions in enumerate(parts):
                last = index == len(parts) - 1
                samples = batches.of(step, positions)
                with nullcontext() if last else _unsynchronized(trained):
                    found: Losses = trained(samples)
                    # A share of the mean over this process's samples; the engine takes the mean
                    # over processes. No layer mixes samples, so the gradient is that of the whole.
                    share = len(positions) / len(own)
                    (found.total(config.reg_weight) * share).backward()
                losses.append((found.diffusion.detach(), found.regularization.detach()))
            optimizer.step()
            optimizer.zero_grad()
            diffusion, penalty = (torch.cat(both) for both in zip(*losses, strict=True))
            running.add(diffusion, penalty)
            finished = step + 1
            reporting = finished % REPORT_EVERY == 0 or finished == config.steps
            # Processes have to agree on where to stop; asking each other costs a wait.
            looking = processes.count == 1 or finished % running.steps_in(MAX_NONFINITE) == 0
            stopping = looking and finished < config.steps and processes.any(stop.asked)
            saving = history is not None and (
                stopping or finished % checkpoint_every == 0 or finished == config.steps
            )
            if saving or reporting:
                progress = running.report(finished, kept, processes)
                if on_progress and processes.first:
                    on_progress(progress)
            if saving and history is not None:
                check_weights(finished, encoder, offsets, kept=kept)
                if processes.first:
                    history.write(finished, **state)
                kept = finished
            if on_step and processes.first:
                on_step(
                    PretrainingStep(
                        step=finished,
                        encoder=encoder,
                        offsets=offsets,
                        diffusion=diffusion,
                        penalty=penalty,
                        snapshot=snapshot,
                    )
                )
            if stopping:
                saved = "saved" if saving else "not saved: there is no folder for checkpoints"
                remark(f"stopped after step {finished} of {config.steps}, {saved}")
                raise KeyboardInterrupt
    if history is None:
        check_weights(config.steps, encoder, offsets, kept=kept)
    return snapshot()


def _unsynchronized(trained: nn.Module) -> AbstractContextManager[None]:
    """Let gradients pile up without exchanging them, where they are exchanged at all."""
    no_sync = getattr(trained, "no_sync", None)
    return no_sync() if no_sync is not None else nullcontext()
