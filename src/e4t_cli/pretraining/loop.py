"""The loop of domain pre-training (section 3.3)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from e4t_cli.models.domain_weights import DomainWeights, facts_about, usual_limits
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.adapters import frozen_copy
from e4t_cli.nn.precision import PrecisionPolicy
from e4t_cli.nn.randomness import generator
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import WordEmbeddingEncoder
from e4t_cli.pretraining.batches import Batches, DistributedContext, PretrainingLoss
from e4t_cli.pretraining.checkpoints import CheckpointOptions, Checkpoints, check_weights, diverged
from e4t_cli.pretraining.encoded_images import TrainingData
from e4t_cli.progress import Progress, ProgressCallback, StopRequest
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.training.loss import Losses
from e4t_cli.training.optim import adamw

REPORT_EVERY = 10  # steps between two progress reports; a report waits for the device
SMOOTHING = 0.9  # share of the past in the smoothed loss, from one report to the next
MAX_STOP_DELAY = 2.0  # seconds after which all processes have noticed that one of them was asked to stop


@dataclass(frozen=True, kw_only=True)
class DomainInfo:
    """What domain weights contain beside parameters; licence and notes are for the manifest."""

    name: str
    descriptor: str
    templates: tuple[str, ...]  # training prompts with "{}" in the concept's place
    tuning: TuningConfig  # of inference-time tuning
    licence: str = ""
    notes: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How `pretrain_domain` computes."""

    seed: int = 0  # of the initial weights and of all noise
    autocast: bool | None = None  # the U-Net in bfloat16, trained weights in float32; None: if the hardware can
    detach_features: bool = False  # see `training_loss`
    hidden_width: int | None = None  # of the encoder; None for the image encoder's width
    micro_batch: int | None = None  # samples in one forward pass: changes memory and rounding only; None is all


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainingStep:
    """Argument of `on_step`, after each optimizer step; encoder and offsets are read only."""

    step: int  # steps done, 1 …
    encoder: WordEmbeddingEncoder
    offsets: WeightOffsets
    diffusion: Tensor  # eq. 4 of this process's samples (batch,), detached
    penalty: Tensor  # eq. 2, likewise
    snapshot: Callable[[], DomainWeights]  # copies the domain as it is now, ready for `tune`


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingCallbacks:
    """What `pretrain_domain` calls, the functions in the first process only."""

    # When it is set, the step is finished and saved, and KeyboardInterrupt raised.
    stop: StopRequest = field(default_factory=StopRequest)
    # Every few steps, with the mean losses since then, the smoothed loss and the speed.
    on_progress: ProgressCallback | None = None
    on_step: Callable[[PretrainingStep], None] | None = None  # after each step
    # Once, before the first step of a resumed run, with the step it resumes from, which has no losses.
    on_resume: Callable[[PretrainingStep], None] | None = None


class RunningLosses:
    """The losses since the last report, kept on the device until then."""

    def __init__(self, config: PretrainingConfig, done: int) -> None:
        self.config, self.reported = config, done
        self.recent: list[Tensor] = []
        self.since, self.seconds = time.perf_counter(), math.inf  # seconds of a step
        self.smooth = self.weight = 0.0

    def add(self, diffusion: Tensor, penalty: Tensor) -> None:
        self.recent.append(torch.stack((diffusion.mean(), penalty.mean())))

    def report(self, step: int, kept: int, processes: DistributedContext) -> Progress:
        """Return the means since the last report, or raise DivergedError if one of them is not finite.

        Paper silent: no gradient clipping here, so a bad value shows in the loss.
        """
        now = time.perf_counter()
        spent = (now - self.since) / len(self.recent)
        both = torch.stack(self.recent).float()
        # Together with the losses, so that all processes hold the same number of seconds.
        found = processes.mean(torch.cat((both.flatten(), both.new_tensor([spent]))))
        rows, self.seconds = found[:-1].view(-1, 2).tolist(), float(found[-1])
        rows = [(diffusion + self.config.reg_weight * penalty, diffusion, penalty) for diffusion, penalty in rows]
        for bad, (loss, *_) in enumerate(rows, start=self.reported + 1):
            if not math.isfinite(loss):
                raise diverged(bad, f"the loss is {loss}", good=bad - 1, kept=kept)
        loss, diffusion, penalty = torch.tensor(rows).mean(dim=0).tolist()
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        self.recent, self.since, self.reported = [], now, step
        values = {"loss": loss, "diffusion": diffusion, "penalty": penalty}
        values |= {"smoothed": self.smooth / self.weight, "it/s": 1 / max(self.seconds, 1e-9)}
        return Progress(stage="pretrain", done=step, total=self.config.steps, values=values)

    def steps_in(self, seconds: float) -> int:
        """Return how many steps fit into some seconds, 1 … REPORT_EVERY, alike in all processes."""
        return max(1, min(REPORT_EVERY, int(seconds / max(self.seconds, 1e-9))))


def pretrain_domain(
    model: TextToImageModel,
    data: TrainingData,
    *,
    domain: DomainInfo,
    config: PretrainingConfig,
    options: TrainingOptions | None = None,
    checkpoints: CheckpointOptions | None = None,
    callbacks: TrainingCallbacks | None = None,
    processes: DistributedContext | None = None,
) -> DomainWeights:
    """Train a domain's encoder and offsets on a frozen base.

    Args:
        data: from `encode_images` with this model, or any other `TrainingData`.
        config: its batch is one process's share of a step.
        processes: from `init_distributed`. Each takes its share of the global batch, and the learning rate is base ×
            batch × processes (section 3.5). All of them call this function with the same arguments.

    Returns:
        The domain. The batch in its config is the global one.

    Raises:
        UsageError: the checkpoints are those of another run, with the differences.
        DivergedError: a loss or a weight is not finite.
        ResourceError: the disk is full; the checkpoint before is intact.
        KeyboardInterrupt: `callbacks.stop` was set, and everything is saved.
    """
    options, checkpoints = options or TrainingOptions(), checkpoints or CheckpointOptions()
    callbacks, processes = callbacks or TrainingCallbacks(), processes or DistributedContext()
    seed, stop = options.seed, callbacks.stop
    total_batch = config.batch_size * processes.count
    positions = processes.positions(config.batch_size)
    size = min(options.micro_batch or config.batch_size, config.batch_size)
    micro_batches = [positions[start : start + size] for start in range(0, len(positions), size)]
    rate = config.learning_rate * processes.count
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "initial").initial_seed())
        encoder = WordEmbeddingEncoder(model.encoder_config(options.hidden_width)).to(model.device)
        offsets = WeightOffsets.for_unet(model.unet).to(model.device)
    # A copy, so that the model stays usable, also for the images of `on_step`.
    precision = PrecisionPolicy.resolve(model.device, model.dtype, options.autocast, loss_scaling=False)
    unet = frozen_copy(model.unet, {}, precision.half)
    encoder_rate, offsets_rate = rate * config.encoder_rate, rate * config.offsets_rate
    optimizer = adamw((list(encoder.parameters()), encoder_rate), (list(offsets.parameters()), offsets_rate))
    descriptor_id = model.descriptor_id(domain.descriptor)
    batches = Batches(model, data, config, domain.templates, descriptor_id, seed, total_batch)
    loss = PretrainingLoss(
        model, unet, encoder, offsets,
        e_domain=model.word_embedding(descriptor_id), scale=config.embedding_scale,
        autocast_dtype=precision.half, detach_features=options.detach_features,
    )  # fmt: skip
    run: dict[str, Any] = {"name": domain.name, "descriptor": domain.descriptor, "base": model.fingerprint}
    run |= {"data": data.fingerprint, "seed": seed, "templates": list(domain.templates)}
    run |= {"autocast": precision.half is not None, "detach_features": options.detach_features}
    run |= {"encoder": encoder.config.as_dict()}
    run |= {"recipe": {key: value for key, value in config.as_dict().items() if key != "steps"}}
    run |= {"processes": processes.count, "micro_batch": size}
    history = Checkpoints(checkpoints.folder, run) if checkpoints.folder is not None else None
    done = 0
    if history is not None:
        # The same set: what cannot be used is part of the state of data that is encoded when a step needs it.
        history.left_out = getattr(data, "left_out", history.left_out)
    if history is not None and checkpoints.resume:
        done = history.restore(loss, optimizer, force=checkpoints.force)
    processes.check_same(done, "the step of their last checkpoint")
    offsets.attach_to(unet)
    trained = processes.wrap(loss)
    on_progress, on_step = (callbacks.on_progress, callbacks.on_step) if processes.first else (None, None)

    def report(event: Progress) -> None:
        if on_progress:
            on_progress(event)

    def snapshot() -> DomainWeights:
        facts: dict[str, Any] = {**facts_about(model), **vars(domain)}
        return DomainWeights(
            encoder=copy.deepcopy(encoder).cpu(),
            offsets={path: (a.cpu(), b.cpu()) for path, (a, b) in offsets.factors().items()},
            pretraining=config.replace(batch_size=total_batch),
            images=len(data),
            limits=usual_limits(domain.descriptor, model.base.name, len(data)),
            **facts,
        )

    def after(step: int, diffusion: Tensor, penalty: Tensor) -> PretrainingStep:
        return PretrainingStep(
            step=step, encoder=encoder, offsets=offsets, diffusion=diffusion, penalty=penalty, snapshot=snapshot
        )

    def train_step(step: int) -> tuple[Tensor, Tensor]:
        """Take an optimizer step; return both losses of this process's samples (batch,)."""
        losses = []
        for micro_batch in micro_batches:
            samples = batches.of(step, micro_batch)
            more = micro_batch is not micro_batches[-1]  # with the last one, processes average their gradients
            with trained.no_sync() if isinstance(trained, DistributedDataParallel) and more else nullcontext():
                found: Losses = trained(samples)
                # A share of the mean over this process's samples; gradients are averaged over processes. No layer
                # mixes samples, so the gradient is that of the whole batch.
                torch.autograd.backward(found.total(config.reg_weight) * (len(micro_batch) / len(positions)))
            losses.append((found.diffusion.detach(), found.regularization.detach()))
        optimizer.step()
        optimizer.zero_grad()
        diffusion, penalty = zip(*losses, strict=True)
        return torch.cat(diffusion), torch.cat(penalty)

    factors = f"batch {config.batch_size} × {processes.count} process{'es' if processes.count > 1 else ''}"
    resuming = f"; resuming from step {done}" if done else ""
    rates = f"learning rate {rate:.3g} = {config.base_learning_rate:.3g} × {factors}{resuming}"
    for remark in [*(history.remarks if history is not None else []), rates]:
        report(Progress(stage="pretrain", remark=remark))
    if done and processes.first and callbacks.on_resume:
        callbacks.on_resume(after(done, torch.empty(0), torch.empty(0)))
    running, kept = RunningLosses(config, done), done
    with stop.listening():
        for finished in range(done + 1, config.steps + 1):
            diffusion, penalty = train_step(finished - 1)
            running.add(diffusion, penalty)
            ended = finished == config.steps
            # Processes have to agree on where to stop, and agreeing costs a synchronization.
            agreeing = processes.count == 1 or finished % running.steps_in(MAX_STOP_DELAY) == 0
            stopping = agreeing and not ended and processes.any(stop.asked)
            saving = history is not None and (stopping or ended or finished % checkpoints.every == 0)
            if saving or ended or finished % REPORT_EVERY == 0:
                report(running.report(finished, kept, processes))
            if saving and history is not None:
                check_weights(finished, loss, kept=kept)
                if processes.first:
                    history.write(finished, loss, optimizer)
                kept = finished
            if on_step:
                on_step(after(finished, diffusion, penalty))
            if stopping:
                saved = "saved" if saving else "not saved: there is no folder for checkpoints"
                remark = f"stopped after step {finished} of {config.steps}, {saved}"
                report(Progress(stage="pretrain", remark=remark))
                raise KeyboardInterrupt
    if history is None:
        check_weights(config.steps, loss, kept=kept)
    return snapshot()
