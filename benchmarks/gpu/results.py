"""Keeps the figures of the GPU benchmark in one file, and writes them as a table into benchmarks/README.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- python -m benchmarks.gpu --table -->", "<!-- end -->"
# Key of a figure, what it is, the target of it.
ROWS = (
    ("tune full", "15 steps, full", "≤ 2.0 s (goal 1.5)"),
    ("tune lora", "15 steps, LoRA", "≤ 1.2 s"),
    ("draw 8", "8 images, 20 steps", "≤ 0.75 s"),
    ("draw 1", "1 image, 20 steps", ""),
    ("warm", "photo → first image, warm", "≤ 2.0 s"),
    ("cold", "photo → first image, fresh process", "≤ 10 s"),
)
EQUAL = ("tune full", "tune lora", "draw 8", "draw 1")


class Results:
    """The figures in a folder: read anew and written whole at each change, by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.json"

    def read(self) -> dict[str, Any]:
        """Return all figures."""
        empty: dict[str, Any] = {"facts": {}, "figures": {}, "parts": {}}
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else empty

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def put(self, section: str, key: str, value: Any) -> None:
        """Keep one value."""
        content = self.read()
        content[section][key] = value
        making = self.path.with_suffix(".making")
        making.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        making.replace(self.path)

    def times(self, key: str, values: Sequence[float]) -> None:
        """Keep the seconds of each round."""
        self.put("figures", key, [round(value, 4) for value in values])

    def note(self, part: str, trouble: str, seconds: float) -> None:
        """Keep how a part ended."""
        self.put("parts", part, {"ended": trouble or "well", "seconds": round(seconds, 1)})

    def table(self) -> str:
        """Return the figures in Markdown; what is missing is "not measured"."""
        content = self.read()
        facts, figures = content["facts"], content["figures"]
        if not facts:
            return "Not measured."
        lines = [
            "{date}, {card}, {cores} cores, torch {torch}, diffusers {diffusers}, transformers {transformers}, Python "
            "{python}; {model}. A matrix multiplication reached {tflops:.3g} TFLOP/s.".format(**facts),
            "",
            "| median (min … max) | target | one by one | CUDA graphs |",
            "|---|---|---|---|",
        ]
        for key, title, target in ROWS:
            plain, graphs = (_spread(figures.get(name)) for name in (key, f"{key}, graphs"))
            lines.append(f"| {title} | {target} | {plain} | {graphs} |")
        for key in ("draw 8, compiled", "tune full, compiled"):
            if key in figures:
                plain = key.partition(",")[0]
                title = next(title for name, title, _ in ROWS if name == plain)
                lines.append(f"| {title}, blocks compiled by torch.compile | | {_spread(figures[key])} | |")
        lines += ["", "| difference of results | one by one, twice | CUDA graphs |", "|---|---|---|"]
        for key in EQUAL:
            twice, graphs = (_difference(figures.get(f"{key}, {name}")) for name in ("twice", "graphs differ"))
            lines.append(f"| {next(title for name, title, _ in ROWS if name == key)} | {twice} | {graphs} |")
        memory = [figures[key] for key in figures if key.startswith("memory")]
        lines += ["", "| peak memory of a tuning step, GB | predicted | allocated | reserved |", "|---|---|---|---|"]
        for row in memory:
            sizes = [
                f"{row[key]:.1f}" if row[key] else "not measured" for key in ("predicted", "allocated", "reserved")
            ]
            lines.append(f"| {row['method']}, `--vram {row['vram']}` | {' | '.join(sizes)} |")
        if tests := figures.get("tests"):
            lines += ["", f"Tests that need a GPU: {tests}."]
        if troubles := [f"{name}: {one['ended']}" for name, one in content["parts"].items() if one["ended"] != "well"]:
            lines += ["", f"Incomplete: {'; '.join(troubles)}."]
        return "\n".join(lines)


def _spread(values: Sequence[float] | None) -> str:
    if not values:
        return "not measured"
    return f"{statistics.median(values):.2f} s ({min(values):.2f} … {max(values):.2f})"


def _difference(value: float | None) -> str:
    if value is None:
        return "not measured"
    return "equal in every bit" if value == 0 else f"at most {value:.1e}"


def update_readme(results: Results, readme: Path = README) -> None:
    """Write the table between the two marks of benchmarks/README.md.

    Raises:
        SystemExit: there is no such run, it was a rehearsal, or the marks are missing.
    """
    facts = results.read()["facts"]
    if not facts:
        raise SystemExit(f"error: there is no run in {results.path.parent}: python -m benchmarks.gpu --out DIR")
    if facts["rehearsal"]:
        raise SystemExit("error: that was a rehearsal, whose figures say nothing: run it on a GPU")
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: {readme} lacks the lines {BEGIN} and {END}")
    readme.write_text(f"{before}{begin}\n\n{results.table()}\n\n{end}{after}", encoding="utf-8")
