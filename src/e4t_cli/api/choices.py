"""What was asked for, as values: bases, packs, prompts, seeds. Everything here is light."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from e4t_cli.bases import Base, find_base
from e4t_cli.domain import Domain, PretrainingRecipe, TuningRecipe
from e4t_cli.errors import UsageError
from e4t_cli.prompts import Prompt, parse_prompt
from e4t_cli.registry import weights_folder

if TYPE_CHECKING:
    from e4t_cli.base_model import TextToImageModel

_R = TypeVar("_R", TuningRecipe, PretrainingRecipe)

MOST_SEED = 2**32 - 1
"""The largest seed that other programs' metadata readers take."""


def choose_base(base: str | os.PathLike[str] | TextToImageModel) -> Base | TextToImageModel:
    """Return the base of that name or folder; a loaded model is one already."""
    return find_base(base) if isinstance(base, str | os.PathLike) else base


def base_name(base: Base | TextToImageModel) -> str:
    """Return the key of `Domain.weights`."""
    return base.name if isinstance(base, Base) else base.base.name


def find_pack(domain: Domain, base: Base | TextToImageModel) -> Path:
    """Return the folder with the domain's weights for a base.

    Raises:
        WeightsUnavailable: there are none; the hint is the command that makes them.
    """
    return weights_folder(domain, base_name(base))


def parse_prompts(prompts: str | Sequence[str], placeholder: str) -> list[Prompt]:
    """Parse one prompt or several; the first that does not name the concept is refused."""
    wanted = [prompts] if isinstance(prompts, str) else prompts
    return [parse_prompt(prompt, placeholder) for prompt in wanted]


def choose_seed(seed: int | None, count: int) -> int:
    """Return the seed of the first picture; a random one if none was asked for.

    Raises:
        UsageError: one of `count` seeds is out of range.
    """
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"the number of pictures per prompt must be 1 or more, not {count!r}")
    if seed is None:
        return secrets.randbelow(2**31)  # short enough to type, far from the end
    if not 0 <= seed <= MOST_SEED + 1 - count:
        raise UsageError(f"seeds must be 0 to {MOST_SEED}, not {seed} to {seed + count - 1}")
    return seed


def with_steps(recipe: _R, steps: int) -> _R:
    """Return the recipe with another number of steps."""
    try:
        return recipe.replace(steps=steps)
    except ValueError as error:
        raise UsageError(str(error)) from error
