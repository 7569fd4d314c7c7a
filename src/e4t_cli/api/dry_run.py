"""`plan_pretraining`: what `pretrain` would do and cost, measured in a few steps without output."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice
from typing import Any, Unpack

from e4t_cli.api.options import DomainTrainingKeywords, DomainTrainingOptions
from e4t_cli.api.photographs import note_photographs
from e4t_cli.api.pretraining import Data, PretrainingRun, process_options
from e4t_cli.api.pretraining_setup import CacheChoice, check_cache, check_new_name, plan_domain
from e4t_cli.api.resolve import base_name, resolve_base
from e4t_cli.api.session import Session
from e4t_cli.datasets.reader import signature
from e4t_cli.datasets.sources import ImageItem, ImageSource, MapStyleSource, find_source
from e4t_cli.devices import peak_memory
from e4t_cli.hub.paths import HubAccess
from e4t_cli.progress import Progress
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import Domain, PreparedImage

MEASURED_STEPS = 4  # the first one, which warms up, is left out
OPENED = 2000  # of more images than these an evenly spaced sample is opened


def plan_pretraining(
    name: str | Domain, data: Data, *, config: PretrainingConfig | None = None, tuning: TuningConfig | None = None,
    **options: Unpack[DomainTrainingKeywords],
) -> dict[str, Any]:  # fmt: skip
    """Open the images, take a few steps, write nothing, and return what `pretrain`, with these arguments, would cost.

    Returns:
        Plain values: images found, opened and left out, steps, passes over the data, bytes of cache and memory, and
        seconds.

    Raises:
        E4TError: as `pretrain`.
    """
    asked = DomainTrainingOptions(**options)
    check_new_name(name)
    check_cache(asked.cache)
    source = find_source(data, offline=HubAccess(offline=asked.offline).cut_off)
    from e4t_cli.pretraining.batches import init_distributed

    with init_distributed(asked.device) as processes:
        session = Session(process_options(asked, processes))
        base = resolve_base(asked, session.access, safety=False)
        plan = plan_domain(name, base_name(base), asked, config=config, tuning=tuning)
        with session.running():
            session.load(base, None)
            run = PretrainingRun(session, plan, source, asked, processes)
            run.reader.log = None
            choice = run.choose_cache()
            opened, some, opening = _open(run)
            if not some:
                raise run.reader.empty_error()
            encoding, stepping, memory = _measure(run, some)
            note_photographs(session, some)
    usable = choice.images - (len(run.reader.left_out) if opened == choice.images else 0)
    for note in (*source.notes, *run.reader.notes(usable or None)):
        session.note("encode", note)
    return {
        "type": "plan",
        "domain": run.domain.name,
        "descriptor": run.domain.descriptor,
        "base": session.model.base.name,
        "data": source.title,
        "images": choice.images,
        "opened": opened,
        "left_out": len(run.reader.left_out),
        "other_files": source.other_files,
        "steps": plan.config.steps,
        "batch": plan.config.batch_size,
        "processes": processes.count,
        "learning_rate": plan.config.learning_rate * processes.count,
        "passes": round(run.samples / choice.images, 2) if choice.images else None,
        "cache": {"used": choice.used, "bytes": choice.size},
        "memory_bytes": memory,
        "seconds": _seconds(choice, opening + encoding, stepping, plan.config, processes.count),
    }


def _open(run: PretrainingRun) -> tuple[int, list[PreparedImage], float]:
    """Open images; return how many, a batch of usable ones, and the seconds per image."""
    some: list[PreparedImage] = []
    items, total = _spread(run.source)
    opened, begun = 0, time.perf_counter()
    for item in items:
        opened += 1
        prepared = run.reader.prepare(item)
        if not isinstance(prepared, str):
            run.reader.duplicates.add(item.name, item.digest(), signature(prepared.image))
            if len(some) < run.plan.config.batch_size:
                some.append(prepared)
        run.session.report(Progress(stage="open", done=opened, total=total))
    return opened, some, (time.perf_counter() - begun) / max(opened, 1)


def _spread(source: ImageSource) -> tuple[Iterable[ImageItem], int]:
    """Return the items to open, and their number (0: unknown)."""
    if isinstance(source, MapStyleSource):
        count = min(len(source), OPENED)
        return (source[index * len(source) // count] for index in range(count)), count
    return islice(source, OPENED), 0


def _measure(run: PretrainingRun, some: list[PreparedImage]) -> tuple[float, float, int]:
    """Return the seconds to encode an image and to take a step, and the peak memory in bytes."""
    import torch

    from e4t_cli.pretraining.encoded_images import encode_images
    from e4t_cli.pretraining.loop import TrainingCallbacks

    model = run.session.model
    begun = time.perf_counter()
    encoded = encode_images(model, some, batch_size=8)
    encoding = (time.perf_counter() - begun) / len(some)
    times: list[float] = []

    def on_step(step: object) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        times.append(time.perf_counter())
        run.session.report(Progress(stage="measure", done=len(times), total=MEASURED_STEPS))

    run.train(encoded, callbacks=TrainingCallbacks(on_step=on_step), steps=MEASURED_STEPS)
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return encoding, sorted(gaps)[len(gaps) // 2] if gaps else 0.0, peak_memory(model.device)


def _seconds(
    choice: CacheChoice, encoding: float, stepping: float, config: PretrainingConfig, processes: int
) -> dict[str, float]:
    """Estimate the whole run, as if no image was in the cache, from the seconds per image and per step."""
    if choice.used:
        encode = choice.images * encoding / processes
    else:
        stepping, encode = stepping + config.batch_size * encoding, 0.0
    return {
        "image": round(encoding, 4),
        "encode": round(encode, 1),
        "step": round(stepping, 4),
        "total": round(encode + config.steps * stepping, 1),
    }
