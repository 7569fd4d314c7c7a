"""What `personalize` and `generate` do with pictures: save each as it comes, and say where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from e4t_cli.cli.console import Console
from e4t_cli.errors import PartialResult, UsageError, printable

if TYPE_CHECKING:
    from e4t_cli.results import GeneratedImage, Personalization


class Saver:
    """Saves what one command makes and reports every path on stdout.

    Args:
        console: of the running command.
        out: the folder; made now, so that a wrong one costs no tuning.
        metadata: whether prompts and settings go into the files.
        grid: whether there will be a contact sheet.
        concept: where the concept goes, None for nowhere; must not exist.

    Raises:
        UsageError: one of the places cannot be written to.
    """

    def __init__(
        self,
        console: Console,
        out: Path,
        *,
        metadata: bool = True,
        grid: bool = False,
        concept: Path | None = None,
    ) -> None:
        from e4t_cli.results import check_folder

        self.console, self.out = console, check_folder(out)
        self.options: dict[str, Any] = {"include_prompts": metadata}
        self.grid, self.concept = grid, concept
        if concept is not None:
            if concept.exists():
                shown = printable(str(concept))
                raise UsageError(f"{shown} exists and is not overwritten", hint="use another name")
            check_folder(concept.parent)

    def picture(self, image: GeneratedImage) -> None:
        """Save one picture the moment it is there: an interrupt later does not take it away."""
        path = image.save(self.out, **self.options)
        details = image.record.as_dict()
        self.console.product(str(path), {"type": "image", "path": str(path), **details})

    def rest(self, result: Personalization) -> None:
        """Save the contact sheet and the concept, then say where the time went."""
        if self.grid and result.images:
            path = result.save_grid(self.out, **self.options)
            self.console.product(str(path), {"type": "grid", "path": str(path)})
        if self.concept is not None:
            result.concept.save(self.concept)
            record = {"type": "concept", "path": str(self.concept)}
            self.console.product(str(self.concept), record)
        for withheld in result.withheld if self.console.json else ():
            details = withheld.as_dict(include_prompts=self.options["include_prompts"])
            self.console.product("", {"type": "withheld", **details})
        seconds = ", ".join(f"{k} {v:.1f}" for k, v in result.timings.as_dict().items() if v)
        self.console.note(f"seed {result.seed}; {result.timings.total:.1f} s: {seconds}")
        self.console.detail(f"peak memory {_peak_megabytes():.0f} MB")
        if result.withheld:
            wanted = len(result.images) + len(result.withheld)
            raise PartialResult(
                f"the safety checker withheld {len(result.withheld)} of {wanted} pictures",
                hint="another --seed or prompt; --no-safety-checker if it is mistaken",
            )


def _peak_megabytes() -> float:
    try:
        import resource
    except ImportError:  # Windows has no such count
        return float("nan")
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024
