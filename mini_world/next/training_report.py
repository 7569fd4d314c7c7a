"""The table of training stages in docs/mini.md, from the results of a run."""

from __future__ import annotations

import json
from typing import Any

from mini_world.next.graph import STAGES
from mini_world.next.workspace import RESULT, Workspace


def training_table(work: Workspace) -> str:
    """Steps, time, losses and measurements of every finished stage, and the hashes of its files, as Markdown."""
    lines = ["| stage | plan | steps | minutes | last losses | measured on held-out drawings |", "|---|---|---|---|---|---|"]
    hashes = ["| file | sha256 |", "|---|---|"]
    for name in STAGES:
        if (found := work.find(name)) is None:
            continue
        record = json.loads((found / RESULT).read_text())
        facts = dict(record["facts"])
        seconds = facts.pop("seconds", 0.0)
        steps, losses = "", ""
        for log in sorted(found.glob("*.jsonl")):
            if log.name == "validation.jsonl" or not (text := log.read_text()):
                continue
            last = json.loads(text.splitlines()[-1])
            steps = f"{last.pop('step'):,}"
            seconds = max(seconds, last.pop("seconds"))  # the log's counts those before an interruption too
            losses = ", ".join(f"{key} {value:.3g}" for key, value in last.items())
        shown = ", ".join(_facts(facts))
        lines.append(f"| {name} | {record['plan']} | {steps} | {seconds / 60:.1f} | {losses} | {shown} |")
        hashes += [f"| {name}/{file} | `{digest[:16]}…` |" for file, digest in record["files"].items() if "safetensors" in file]
    return "\n".join([*lines, "", *hashes])


def _facts(facts: dict[str, Any]) -> list[str]:
    shown = []
    for name, value in facts.items():
        if isinstance(value, dict):  # probes by name: shares of what is right, mean errors, distances
            shares = {probe: share for probe, share in value.items() if not ({"error", "distance"} & set(probe.split()))}
            if shares:
                least = min(shares, key=shares.__getitem__)
                mean = sum(shares.values()) / len(shares)
                shown.append(f"{name}: {mean:.3f} mean of {len(shares)}, least {least} {shares[least]:.3f}")
        else:
            shown.append(f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}")
    return shown
