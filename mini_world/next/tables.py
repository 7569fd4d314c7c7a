"""Tables of docs/mini.md from the rows of an evaluation: means over identities with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mini_world.next.intervals import Interval, bootstrap, paired, per_identity

FLOOR, CEILING = "plain word", "drawings"
COLUMNS = (
    "identity",
    "relative",
    "prompt",
    "subject",
    "bound",
    "override",
    "rest kept",
    "copied clothes, backdrop",
    "class left",
)
Rows = Iterable[Mapping]


def means(rows: Rows, method: str, name: str, about: str) -> dict[int, float]:
    """A score of a method for every identity, over its images of one sort of task."""
    return per_identity((row for row in rows if row["method"] == method and row["about"] == about), name)


def interval(values: Mapping[int, float]) -> Interval | None:
    """The mean over identities with its interval; None without any."""
    return bootstrap(list(values.values())) if values else None


def class_left(rows: Rows, method: str) -> Interval | None:
    """How much nearer to the photo's identity the plain word's images are than those of the base, after tuning.

    The identity score of the plain word's images against the photo's identity, minus that of the untuned base with the same
    noise; 0 means that the class is as it was.
    """
    rows = list(rows)
    own, base = (means(rows, name, "identity", "class") for name in (method, FLOOR))
    return paired(own, base) if own.keys() & base.keys() else None


def degree_errors(rows: Rows, method: str) -> dict[str, Interval]:
    """The mean absolute error of every degree, of images of prompts."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["method"] == method and row["about"] == "prompt":
            for name, error in row["errors"].items():
                found.setdefault(name, {}).setdefault(row["number"], []).append(error)
    return {name: bootstrap([sum(e) / len(e) for e in numbers.values()]) for name, numbers in found.items()}


def attribute_shares(rows: Rows, method: str) -> dict[str, float]:
    """The share of images of prompts in which each categorical attribute is right."""
    found: dict[str, list[int]] = {}
    for row in rows:
        if row["method"] == method and row["about"] == "prompt":
            for name, right in row["right"].items():
                found.setdefault(name, []).append(right)
    return {name: sum(values) / len(values) for name, values in found.items()}


def ahead(rows: Rows, first: str, second: str, name: str = "identity") -> Interval:
    """The paired difference of two methods over the identities that both have, in images of prompts.

    Raises:
        ValueError: they share no identity.
    """
    rows = list(rows)
    return paired(means(rows, first, name, "prompt"), means(rows, second, name, "prompt"))


def table(rows: Rows) -> str:
    """One kind's methods as Markdown; "relative" is identity from the floor, the plain word (0 %), to drawings (100 %)."""
    rows = list(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    ends = [interval(means(rows, name, "identity", "prompt")) for name in (FLOOR, CEILING)]
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method in methods:
        identity = interval(means(rows, method, "identity", "prompt"))
        relative = "-"
        if identity and ends[0] and ends[1] and ends[1].mean > ends[0].mean:
            relative = f"{(identity.mean - ends[0].mean) / (ends[1].mean - ends[0].mean):.0%}"
        some = [interval(means(rows, method, name, "prompt")) for name in ("prompt", "subject", "bound")]
        override, rest = (interval(means(rows, method, name, "override")) for name in ("override", "identity"))
        copied = [interval(means(rows, method, name, "prompt")) for name in ("garment", "backdrop")]
        distances = ", ".join("-" if one is None else f"{one.mean:.0f}" for one in copied)
        cells = [_shown(identity), relative, *map(_shown, [*some, override, rest]), distances, _shown(class_left(rows, method))]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def words_table(rows: Rows) -> str:
    """The base alone: for every word the shares of images that show it, its subject, and its colour given the hat or scarf."""
    found: dict[tuple[str, str, str], list[Mapping]] = {}
    for row in rows:
        found.setdefault((row["kind"], row["group"], row["prompt"]), []).append(row)
    lines = ["| kind | group | prompt | shown | subject | colour bound | images |", "|---|---|---|---|---|---|---|"]
    for (kind, group, prompt), some in found.items():
        shares = [_share(some, name) for name in ("right", "subject", "bound")]
        lines.append(f"| {kind} | {group} | {prompt} | {' | '.join(shares)} | {len(some)} |")
    return "\n".join(lines)


def _share(rows: list[Mapping], name: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{sum(values) / len(values):.2f}" if values else "-"


def _shown(found: Interval | None, form: Callable[[Interval], str] = str) -> str:
    return "-" if found is None else form(found)
