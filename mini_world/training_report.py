"""The table of training stages in docs/mini.md, from the training logs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mini_world.stages import JUDGE, PACKAGED, PACKS
from mini_world.training_plans import PORTRAITS


def training_table(folder: Path) -> str:
    """Steps, time, losses and metrics of every stage, and the hashes of the shipped files, as Markdown."""
    lines = ["| stage | steps | minutes | last losses | measured on held-out drawings |", "|---|---|---|---|---|"]
    decoder, unet = (sorted(path.stem for path in folder.glob(f"{name}*.jsonl")) for name in ("decoder", "unet-"))
    for stage in ("vae", *decoder, "clip", "tower", *unet, "parser", "judge"):
        log = folder / f"{stage}.jsonl"
        if not log.exists():
            continue
        last = json.loads(log.read_text().splitlines()[-1])
        steps, seconds = last.pop("step"), last.pop("seconds")
        losses = ", ".join(f"{name} {value:.3g}" for name, value in last.items())
        found = folder / f"{stage}.report.json"
        facts = ", ".join(_facts(json.loads(found.read_text()))) if found.exists() else ""
        lines.append(f"| {stage} | {steps:,} | {seconds / 60:.0f} | {losses} | {facts} |")
    for name in PORTRAITS:
        watch = folder / f"watch-{name}.jsonl"
        if watch.exists():
            last = json.loads(watch.read_text().splitlines()[-1])
            facts = f"loss with its own concept {last['own']:.4f}, with another's {last['swapped']:.4f}"
            found = [json.loads(line) for line in (folder / f"domain-{name}.jsonl").read_text().splitlines()]
            steps, minutes = found[-1]["step"], _seconds(found) / 60
            lines.append(f"| domain {name} | {steps:,} | {minutes:.0f} | | {facts} (at step {last['step']:,}) |")
    lines += ["", "| shipped file | bytes | sha256 |", "|---|---|---|"]
    for path in sorted([*PACKAGED.rglob("*.safetensors"), *PACKS.rglob("*.safetensors"), JUDGE]):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"| {path} | {path.stat().st_size:,} | `{digest[:16]}…` |")
    return "\n".join(lines)


def _seconds(lines: list[dict]) -> float:
    """The seconds of a training whose log restarts its clock at every resume."""
    clocks = [line["seconds"] for line in lines]
    return sum(clock for clock, after in zip(clocks, [*clocks[1:], 0.0], strict=True) if after < clock)


def _facts(report: dict) -> list[str]:
    found = []
    for name, value in report.items():
        if isinstance(value, dict):
            mean = sum(value.values()) / len(value)
            found.append(f"{name}: {mean:.3f} mean of {len(value)} probes")
        else:
            found.append(f"{name} {value:g}")
    return found
