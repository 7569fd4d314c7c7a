"""`plan_batch`: what `personalize_many` would do and cost, without a base and without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from e4t_cli.api.batch import Engine, IsFinished, check_jobs
from e4t_cli.api.jobs import CheckedJob, Job
from e4t_cli.api.options import GenerateKeywords, GenerateOptions
from e4t_cli.api.plans import find_addons, plan_personalization
from e4t_cli.errors import E4TError

SHARED = ("base", "to_fetch", "download_bytes", "memory_bytes")  # of `plan_personalization`, the same for every job


def plan_batch(
    jobs: Sequence[Job], *, is_finished: IsFinished | None = None, **options: Unpack[GenerateKeywords]
) -> dict[str, Any]:
    """Return what `personalize_many`, with these arguments, would do and cost, as plain values; nothing is fetched.

    Raises:
        UsageError: as `personalize_many`. What is wrong with a photo is in the plan of its job.
    """
    asked, _ = find_addons(GenerateOptions(**options))
    engine = Engine(check_jobs(jobs), asked, is_finished)
    shared: dict[str, Any] = {}
    rows = [_plan(engine, job, options, shared) for job in engine.jobs]
    seconds = [row.pop("seconds") for row in rows]
    known = [one for one in seconds if one]
    return {
        "type": "plan",
        "jobs": rows,
        "images": sum(row["images"] for row in rows),
        "finished": sum(row["finished"] for row in rows),
        "failing": sum("error" in row for row in rows),
        **shared,
        "seconds": {
            **{part: round(sum(one[part] for one in known), 1) for part in ("tune", "generate")},
            "on": known[0]["on"],
        } if known else None,
    }  # fmt: skip


def _plan(engine: Engine, checked: CheckedJob, options: GenerateKeywords, shared: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of one job, and put what is the same for all into `shared`."""
    job = checked.job
    row: dict[str, Any] = {"job": job.number, "source": job.source, "domain": checked.domain.name}
    nothing = {"images": 0, "finished": 0, "seconds": None}
    try:
        left, photos = engine.open(checked)
        row |= {"seed": left.seed, "images": len(left.wanted), "finished": left.total - len(left.wanted)}
        if photos is None:
            return {**row, "seconds": None}
        plan = plan_personalization(
            checked.domain, job.image, job.prompts, num_images_per_prompt=job.num_images_per_prompt, seed=left.seed,
            sampling=checked.sampling, placeholder=checked.placeholder, **{**options, **job.options},  # type: ignore[arg-type]
        )  # fmt: skip
    except E4TError as error:
        return {**nothing, **row, "error": job.located(error).message}
    for name in SHARED:
        shared.setdefault(name, plan[name])
    seconds = plan["seconds"]
    if seconds and left.total:
        seconds = {**seconds, "generate": seconds["generate"] * len(left.wanted) / left.total}
    return {**row, "seconds": seconds}
