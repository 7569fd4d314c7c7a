"""The stages that measure a finished base: every method of its domains on held-out identities, and every word of the base.

Their rows are appended to JSON lines files in the stage's state, so that they go on after any interruption with the image after
the last; their results are tables, and the rows compressed.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.tuning import tune
from mini_world.next import tables
from mini_world.next.evaluate import Method, Row, Rows, held_out_photos, plain_method, run_drawings, run_method, run_words
from mini_world.next.judge import Judge
from mini_world.next.loop import Unfinished
from mini_world.next.stopping import seconds_left

SEED = 700  # of the photos; no choice was made on these identities


class StoppableRows(Rows):
    """Rows that end the process when the time of the run is over, after they were written."""

    def append(self, rows: list[Row]) -> None:  # type: ignore[override]
        super().append(rows)
        if seconds_left() <= 0:
            raise Unfinished(f"{self.path.stem}: stopped with {len(self.rows)} rows; the same command goes on from there.")


def methods_of(model, pretrained: DomainWeights) -> dict[str, Method]:
    """The rows of a domain's table beside drawings: the plain word (the floor), the encoder alone, and with tuning."""

    def tuned(steps: int) -> Callable:
        config = pretrained.tuning.replace(steps=steps)
        return lambda prepared, seed: tune(model, pretrained, prepared, config, seed=seed)

    own = pretrained.tuning.steps
    return {
        tables.FLOOR: plain_method(model, pretrained.descriptor),
        "encoder alone": Method(tuned(0)),
        f"{own} steps": Method(tuned(own)),
    }


def evaluate_domain(
    folder: Path, model, judge: Judge, pretrained: DomainWeights, kind: str, count: int, sampling: SamplingConfig
) -> Rows:
    """Measure every method on the photos of `count` held-out identities; returns all rows."""
    photos, rows = held_out_photos(kind, count, SEED), StoppableRows(folder / f"{kind}.jsonl")
    run_drawings(rows, judge, photos, pretrained.descriptor)
    for name, method in methods_of(model, pretrained).items():
        run_method(rows, model, judge, name, method, photos, pretrained.descriptor, seed=SEED, sampling=sampling)
    return rows


def evaluate_words(folder: Path, model, judge: Judge, kinds: tuple[str, ...], pictures: int, sampling: SamplingConfig) -> Rows:
    """Draw every word of the base for every kind `pictures` times; returns all rows."""
    rows = StoppableRows(folder / "words.jsonl")
    for kind in kinds:
        run_words(rows, model, judge, kind, count=pictures, sampling=sampling)
    return rows


def write_domains(made: Path, domains: dict[str, Rows]) -> dict[str, int]:
    """Write domains.md and the compressed rows of every domain; returns the numbers of images."""
    parts = []
    for kind, rows in domains.items():
        methods = list(dict.fromkeys(row["method"] for row in rows.rows))
        parts += [f"## {kind}", tables.table(rows.rows), _errors(rows, methods)]
    (made / "domains.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    return {kind: _keep_rows(made, rows) for kind, rows in domains.items()}


def write_words(made: Path, rows: Rows) -> dict[str, int]:
    """Write words.md and the compressed rows; returns the number of images."""
    (made / "words.md").write_text(f"## Words of the base\n\n{tables.words_table(rows.rows)}\n")
    return {"images": _keep_rows(made, rows)}


def _keep_rows(made: Path, rows: Rows) -> int:
    content = rows.path.read_bytes() if rows.path.exists() else b""
    (made / f"{rows.path.name}.gz").write_bytes(gzip.compress(content, mtime=0))
    return len(rows.rows)


def _errors(rows: Rows, methods: list[str]) -> str:
    """The table of continuous attributes, empty for kinds without."""
    found = {method: tables.degree_errors(rows.rows, method) for method in methods}
    names = list(dict.fromkeys(name for errors in found.values() for name in errors))
    if not names:
        return ""
    lines = ["| mean absolute error | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method, errors in found.items():
        lines.append(f"| {method} | " + " | ".join(str(errors[name]) if name in errors else "-" for name in names) + " |")
    return "\n".join(lines)
