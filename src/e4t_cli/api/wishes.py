"""What was asked for, as values: prompts, seeds, recipes. Everything here is light."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TypeVar

from e4t_cli.errors import UsageError, printable
from e4t_cli.prompts import Prompt, parse_prompt
from e4t_cli.recipes import TUNING_METHODS, PretrainingRecipe, TuningRecipe

_R = TypeVar("_R", TuningRecipe, PretrainingRecipe)

MOST_SEED = 2**32 - 1
"""The largest seed that other programs' metadata readers take."""


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


def with_method(recipe: TuningRecipe, method: str) -> TuningRecipe:
    """Return the recipe with another way of tuning."""
    try:
        return recipe.replace(method=method)
    except ValueError as error:
        raise UsageError(
            f"there is no way of tuning {printable(method)!r}",
            hint=f"--tune {' or '.join(TUNING_METHODS)}",
        ) from error
