"""Writes the tables of docs/mini.md, measured on held-out identities: `python -m mini_world report`.

The learning rate of every tuning method is selected on other held-out identities than those of the table.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy

from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.schedulers import SamplingConfig
from mini_world.evaluate import (
    Scores,
    drawn_scores,
    dreambooth_config,
    dreambooth_weights,
    held_out_photos,
    plain_method,
    run_method,
    tuned_method,
)

FEW_STEPS = 5
COUNTS = {"face": 32, "cat": 16, "art": 10}
SAMPLING = SamplingConfig(steps=12, guidance=3.0)
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
SELECTION_COUNTS = {"face": 4, "cat": 4, "art": 4}


def _cached(path: Path, name: str, make) -> dict:
    """A row of the table, from the cache of these weights or measured; an interrupted report resumes."""
    rows = json.loads(path.read_text()) if path.exists() else {}
    if name not in rows:
        result = make()
        rows[name] = (
            result.summary() | {"each": result.identity.mean(1).round(4).tolist()} if isinstance(result, Scores) else result
        )
        path.write_text(json.dumps(rows, indent=1) + "\n")
    return rows[name]


def evaluate(folder: Path, model, judge, kind: str) -> dict[str, dict[str, float]]:
    """All rows of one domain's table."""
    from mini_world.stages import PACKS

    pretrained = DomainWeights.load(PACKS / kind / "mini")
    path = folder / f"figures-{kind}-{model.fingerprint[:8]}-{pretrained.digest[:8]}.json"
    photos = held_out_photos(kind, COUNTS[kind], seed=11)
    others = held_out_photos(kind, SELECTION_COUNTS[kind], seed=50)
    rare = dreambooth_weights(model, pretrained)
    config = pretrained.tuning

    def run(what, **options) -> Scores:
        return run_method(model, judge, kind, photos, what, SAMPLING, **options)

    _cached(path, "drawings", lambda: drawn_scores(judge, kind, photos))
    _cached(path, "drawings of another", lambda: drawn_scores(judge, kind, photos, other=True))
    _cached(path, "plain word", lambda: run(plain_method(model, pretrained.descriptor)))
    _cached(path, "encoder, no tuning", lambda: run(tuned_method(model, pretrained, config.replace(steps=0))))
    if config.steps != FEW_STEPS:
        _cached(path, f"tuned, {config.steps} steps", lambda: run(tuned_method(model, pretrained, config)))

    def few(rate: float):
        return tuned_method(model, pretrained, config.replace(steps=FEW_STEPS, base_learning_rate=rate / config.batch_size))

    def rarely(rate: float):
        return tuned_method(model, rare, dreambooth_config(config, FEW_STEPS, rate))

    for name, method_of, is_rare in (
        (f"tuned, {FEW_STEPS} steps", few, False),
        (f"DreamBooth-like, {FEW_STEPS} steps", rarely, True),
    ):

        def choose(method_of=method_of, is_rare=is_rare) -> dict[str, float]:
            tried = {}
            for rate in RATES:
                scores = run_method(model, judge, kind, others, method_of(rate), SAMPLING, rare=is_rare, seed=500).summary()
                tried[str(rate)] = round(scores["identity"] + scores["prompt"], 4)
            return tried

        rates = _cached(path, f"rates of {name}", choose)
        best = float(max(rates, key=rates.__getitem__))
        _cached(path, name, lambda m=method_of, r=best, rare_word=is_rare: run(m(r), rare=rare_word))
    return json.loads(path.read_text())


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as Markdown, with identity also on a scale from the minimum (0 %) to the maximum (100 %)."""
    floor, ceiling = rows["plain word"]["identity"], rows["drawings"]["identity"]
    lines = ["| | identity | relative | prompt |", "|---|---|---|---|"]
    for name, row in rows.items():
        if "identity" not in row:
            continue
        share = (row["identity"] - floor) / max(1e-6, ceiling - floor)
        lines.append(
            f"| {name} | {row['identity']:.3f} ± {row['identity±']:.3f} | {share:.0%} "
            f"| {row['prompt']:.3f} ± {row['prompt±']:.3f} |"
        )
    if f"DreamBooth-like, {FEW_STEPS} steps" not in rows:
        return "\n".join(lines)
    ours, theirs = (numpy.array(rows[f"{name}, {FEW_STEPS} steps"]["each"]) for name in ("tuned", "DreamBooth-like"))
    ahead = ours - theirs
    interval = 1.96 * ahead.std(ddof=1) / len(ahead) ** 0.5
    lines += [
        "",
        f"After {FEW_STEPS} steps the method is ahead of DreamBooth-like tuning by "
        f"{ahead.mean():+.3f} ± {interval:.3f} (paired).",
    ]
    lines += [f"Rates tried (identity + prompt on other identities): {_rates(rows)}."]
    return "\n".join(lines)


def _rates(rows: dict[str, dict[str, float]]) -> str:
    found = []
    for name, row in rows.items():
        if name.startswith("rates of "):
            found.append(
                name.removeprefix("rates of ") + ": " + ", ".join(f"{rate} → {value:.3f}" for rate, value in row.items())
            )
    return "; ".join(found)


def write_between(path: Path, mark: str, text: str) -> None:
    """Replace the text between `<!-- mark -->` and `<!-- /mark -->` in a document."""
    whole = path.read_text()
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, rest = whole.split(start, 1)
    _, after = rest.split(end, 1)
    path.write_text(f"{before}{start}\n{text}\n{end}{after}")


def write_report(folder: Path) -> None:
    """Measure what is not cached and fill docs/mini.md."""
    from mini_world.stages import load_judge, load_model
    from mini_world.training_report import training_table

    model, judge = load_model(), load_judge()
    document = Path("docs/mini.md")
    write_between(document, "training", training_table(folder))
    for kind in COUNTS:
        write_between(document, f"figures {kind}", table(evaluate(folder, model, judge, kind)))
