"""Tells photos from prompts among the arguments of `e4t personalize`.

Before `--` come photos, after it prompts; without `--` the first argument is the photo and the others are prompts, as
with one photo. What names the concept is a prompt on either side. A file's name alone makes no photo: where the shell
has put one in place of an unquoted `S*`, somebody else would be learned.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import typer
from typer.core import TyperCommand

from e4t_cli.cli.prompt_files import STDIN
from e4t_cli.errors import UsageError, printable
from e4t_cli.prompts import check_placeholder, parse_prompt

_BEHIND = "e4t_cli.arguments_behind_dashes"  # in `Context.meta`


class PhotoCommand(TyperCommand):
    """A command that remembers how many arguments come after `--`, which parsing drops."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Count them, and parse as ever; after `--` nothing is an option."""
        if "--" in args:
            ctx.meta[_BEHIND] = len(args) - args.index("--") - 1
        return super().parse_args(ctx, args)


def split_arguments(
    context: typer.Context, first: str, others: Sequence[str], *, images: Sequence[str], placeholder: str
) -> tuple[list[str], list[str]]:
    """Return the photos and the prompts.

    Args:
        context: of a `PhotoCommand`.
        first: the argument behind the domain, a photo.
        others: those behind it.
        images: further photos, of `--image`.
        placeholder: what names the concept.

    Raises:
        UsageError: an argument before `--` is neither a file nor a prompt, or two photos are to be stdin.
    """
    check_placeholder(placeholder)
    photos, prompts = [first], list(others)
    word, behind = printable(placeholder), context.meta.get(_BEHIND)
    if behind is None:
        file = next((one for one in others[:1] if os.path.isfile(one) and not _names(one, placeholder)), None)
        if file is not None:
            several = (
                f'several photos end with --: e4t personalize … {printable(first)} {printable(file)} -- "{word} …"'
            )
            hint = (
                f"{several}; if the shell has put it in place of {word}, quote the prompt or use --placeholder '<me>'"
            )
            raise UsageError(f"{printable(file)} is a file, where a prompt should be", hint=hint)
    else:
        count = max(0, len(others) - behind)
        before, prompts = others[:count], list(others[count:])
        prompts = [one for one in before if _names(one, placeholder)] + prompts
        photos += [one for one in before if not _names(one, placeholder)]
        for one in photos[1:]:
            if one != STDIN and not os.path.exists(one):
                hint = f"photos come before --; a prompt has the word {word} in it"
                raise UsageError(f"there is no file {printable(one)}", hint=hint)
    photos += images
    if photos.count(STDIN) > 1:
        raise UsageError("only one photo can be - (stdin)", hint="give the others as files")
    return photos, prompts


def _names(argument: str, placeholder: str) -> bool:
    """Whether an argument is a prompt: it names the concept."""
    with contextlib.suppress(UsageError):
        parse_prompt(argument, placeholder)
        return not os.path.isfile(argument)
    return False
