"""``e4t domains check``: does a domain keep the contract?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import Json, Quiet, complete_domain
from e4t_cli.errors import E4TError

EXAMPLES = """
In a test: [bold]from e4t_cli.testing import check_domain[/bold], then
[bold]check_domain("my_dogs")[/bold]
"""

Subject = Annotated[
    str,
    typer.Argument(
        metavar="NAME|DIR", autocompletion=complete_domain, help="A domain, or a domain's folder."
    ),
]


def check(subject: Subject, json: Json = False, quiet: Quiet = False) -> None:
    """Run every check on a domain: its value, sentences, preparation and weights."""
    console = consoles.start(json=json, quiet=quiet)
    from e4t_cli.testing import examine_domain

    problems = 0
    folder = Path(subject)
    domain = folder if "/" in subject or (folder / "domain.toml").is_file() else subject
    for finding in examine_domain(domain):
        problems += bool(finding.problem)
        word = "FAILED" if finding.problem else "ok"
        said = finding.problem or finding.remark
        console.product(
            f"{word:7} {finding.subject}{': ' if said else ''}{said}",
            {"type": "finding", "subject": finding.subject, "ok": not finding.problem,
             "message": said},
        )  # fmt: skip
    if problems:
        raise E4TError(f"{problems} of the checks failed on {subject}")
