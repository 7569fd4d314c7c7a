"""`rehearse`: what `pretrain` would do, with what it costs, from a few steps that leave nothing."""

from __future__ import annotations

import os
import sys
import time
from itertools import islice
from typing import TYPE_CHECKING, Any

from e4t_cli.api.pretraining import Data, PretrainingRun, own_device
from e4t_cli.api.pretraining_setup import (
    CacheChoice,
    check_cache,
    check_new_name,
    choose_cache,
    plan_domain,
)
from e4t_cli.api.resolve import base_name, resolve_base
from e4t_cli.api.session import Session
from e4t_cli.datasets.reader import signature
from e4t_cli.datasets.sources import ImageItem, ImageSource, MapStyleSource, find_source
from e4t_cli.hub.paths import AskLicence, HubAccess
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import Domain, PreparedImage

if TYPE_CHECKING:
    import torch

    from e4t_cli.models.text_to_image import TextToImageModel

MEASURED_STEPS = 4
"""Steps that are taken for the estimate; the first one, which warms up, is left out of it."""
OPENED = 2000
"""Of more pictures than these a spread sample is opened."""


def plan_pretraining(
    name: str | Domain,
    data: Data,
    *,
    descriptor: str | None = None,
    base: str | os.PathLike[str] | TextToImageModel = "auto",
    config: PretrainingConfig | None = None,
    tuning: TuningConfig | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    base_learning_rate: float | None = None,
    reg_weight: float | None = None,
    micro_batch: int | None = None,
    cache: str = "auto",
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    accept_license: bool | AskLicence = False,
    on_progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Open the pictures, take a few steps, write nothing, and say what `pretrain` would cost.

    The arguments are those of `pretrain`.

    Returns:
        Plain values: pictures found, opened and left out, steps, passes over the data, bytes of
        cache and memory, and seconds.

    Raises:
        E4TError: as `pretrain`.
    """
    check_new_name(name)
    check_cache(cache)
    source = find_source(data, offline=HubAccess(offline=offline).cut_off)
    from e4t_cli.pretraining.batches import init_distributed

    with init_distributed(device) as processes:
        session = Session(own_device(device, processes), dtype, on_progress)
        access = HubAccess(
            offline=offline, accept_license=accept_license, on_progress=session.report
        )
        place = resolve_base(base, access, device=device, dtype=dtype, safety=False)
        plan = plan_domain(
            name, base_name(place), descriptor=descriptor, config=config, tuning=tuning,
            steps=steps, batch_size=batch_size,
            base_learning_rate=base_learning_rate, reg_weight=reg_weight,
        )  # fmt: skip
        with session.running():
            session.load(place, None)
            run = PretrainingRun(session, plan, source, access, processes, strict=strict)
            run.reader.log = None
            samples = plan.config.steps * plan.config.batch_size * processes.count
            choice = choose_cache(cache, source, session.model, samples, mask=plan.config.mask)
            opened, some, opening = _open(run, plan.config.batch_size)
            if not some:
                raise run.reader.empty_error()
            looking, stepping, memory = _measure(run, some, micro_batch)
    usable = choice.pictures
    if opened == choice.pictures:
        usable = opened - len(run.reader.left_out)
    for note in (*source.notes, *run.reader.notes(usable or None)):
        session.note("encode", note)
    return {
        "type": "plan",
        "domain": run.domain.name,
        "descriptor": run.domain.descriptor,
        "base": session.model.base.name,
        "data": source.title,
        "pictures": choice.pictures,
        "opened": opened,
        "left_out": len(run.reader.left_out),
        "no_pictures": source.other_files,
        "steps": plan.config.steps,
        "batch": plan.config.batch_size,
        "processes": processes.count,
        "learning_rate": plan.config.learning_rate * processes.count,
        "passes": round(samples / choice.pictures, 2) if choice.pictures else None,
        "cache": {"used": choice.used, "bytes": choice.size},
        "memory_bytes": memory,
        "seconds": _seconds(
            choice, opening + looking, stepping, plan.config.steps, plan.config.batch_size,
            processes.count,
        ),
    }  # fmt: skip


def _open(run: PretrainingRun, wanted: int) -> tuple[int, list[PreparedImage], float]:
    """Open pictures; return how many, some that can be used, and the seconds that one takes."""
    some: list[PreparedImage] = []
    items, total = _spread(run.source)
    opened, begun = 0, time.perf_counter()
    for item in items:
        opened += 1
        prepared = run.reader.prepare(item)
        if not isinstance(prepared, str):
            run.reader.duplicates.add(item.name, item.digest(), signature(prepared.image))
            if len(some) < wanted:
                some.append(prepared)
        run.session.report(Progress(stage="open", done=opened, total=total))
    return opened, some, (time.perf_counter() - begun) / max(opened, 1)


def _spread(source: ImageSource) -> tuple[list[ImageItem] | Any, int]:
    if isinstance(source, MapStyleSource):
        count = min(len(source), OPENED)
        return (source[place * len(source) // count] for place in range(count)), count
    return islice(source, OPENED), 0


def _measure(
    run: PretrainingRun, some: list[PreparedImage], micro_batch: int | None
) -> tuple[float, float, int]:
    """Return seconds to look at a picture, seconds of a step, and bytes of memory at most."""
    from e4t_cli.pretraining.encoded_images import EncodedImages, encode_images
    from e4t_cli.pretraining.loop import TrainingCallbacks, pretrain_domain

    model, times = run.session.model, []
    begun = time.perf_counter()
    encoded: EncodedImages = encode_images(model, some, batch_size=8)
    looking = (time.perf_counter() - begun) / len(some)

    def clock(step: object) -> None:
        _settle(model.device)
        times.append(time.perf_counter())
        run.session.report(Progress(stage="measure", done=len(times), total=MEASURED_STEPS))

    pretrain_domain(
        model,
        encoded,
        domain=run.info(),
        config=run.plan.config.replace(steps=MEASURED_STEPS),
        options=run.options(micro_batch=micro_batch),
        callbacks=TrainingCallbacks(on_step=clock),
        processes=run.processes,
    )
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return looking, sorted(gaps)[len(gaps) // 2] if gaps else 0.0, _most_memory(model.device)


def _settle(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _most_memory(device: torch.device) -> int:
    """Return the bytes that were in use at most: of the graphics card, or of this process."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _seconds(
    choice: CacheChoice, looking: float, stepping: float, steps: int, batch: int, processes: int
) -> dict[str, float]:
    """Estimate the whole run; pictures that the cache has already take no time."""
    if choice.used:
        encode = choice.pictures * looking / processes
    else:
        stepping, encode = stepping + batch * looking, 0.0
    return {
        "picture": round(looking, 4),
        "encode": round(encode, 1),
        "step": round(stepping, 4),
        "total": round(encode + steps * stepping, 1),
    }
