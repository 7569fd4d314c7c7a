"""What is to be pre-trained: the domain as a value, its numbers, and where its pack will be."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from e4t_cli.domain import Domain
from e4t_cli.errors import E4TError, UsageError, WeightsUnavailable, printable
from e4t_cli.names import check_name
from e4t_cli.recipes import PretrainingRecipe, TuningRecipe
from e4t_cli.registry import (
    USER,
    installed_domains,
    user_domain,
    user_domains_folder,
    weights_folder,
)


@dataclass(frozen=True, kw_only=True)
class NewDomain:
    """A domain about to be pre-trained for a base.

    Args:
        domain: the value; its descriptor counts unless `names_itself`.
        names_itself: the descriptor is to be found in the name.
        recipe, tuning: the numbers of training, and those that the pack will carry.
        folder: where the pack goes.
    """

    domain: Domain
    names_itself: bool
    recipe: PretrainingRecipe
    tuning: TuningRecipe
    folder: Path

    @property
    def work(self) -> Path:
        """The folder of checkpoints, logs and sheets while the domain is made."""
        return self.folder.with_name(f".{self.folder.name}.checkpoints")


def check_new_name(name: str | Domain) -> None:
    """Make sure that a domain can have this name, before anything is fetched or loaded.

    Raises:
        UsageError: it cannot.
    """
    if isinstance(name, str):
        try:
            check_name(name)
        except ValueError as error:
            raise UsageError(str(error)) from error


def plan_domain(
    name: str | Domain,
    base: str,
    *,
    descriptor: str | None = None,
    recipe: PretrainingRecipe | None = None,
    tuning: TuningRecipe | None = None,
    folder: str | os.PathLike[str] | None = None,
    **numbers: float | None,
) -> NewDomain:
    """Decide everything about a new domain that does not need its base.

    Args:
        name: a new domain's, an installed one's that lacks weights for this base, or a value.
        base: name of the base.
        numbers: fields of the recipe to change; None leaves them as they are.

    Raises:
        UsageError: a number is out of range, or there are such weights already.
    """
    domain, is_new = _find(name, base)
    if descriptor is not None:
        try:
            domain = replace(domain, descriptor=descriptor)
        except ValueError as error:
            raise UsageError(str(error)) from error
    recipe = recipe or domain.pretraining or PretrainingRecipe(steps=60_000)
    changed: dict[str, Any] = {key: value for key, value in numbers.items() if value is not None}
    try:
        recipe = recipe.replace(**changed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    target = Path(folder) if folder is not None else user_domains_folder() / domain.name
    if (target / "domain.toml").exists():
        raise UsageError(
            f"there is a domain in {printable(str(target))} already",
            hint=f"choose another name, or remove it: e4t domains rm {domain.name}",
        )
    return NewDomain(
        domain=domain,
        names_itself=is_new and descriptor is None,
        recipe=recipe,
        tuning=tuning or domain.tuning,
        folder=target,
    )


def _find(name: str | Domain, base: str) -> tuple[Domain, bool]:
    """Return the value, the installed domain of that name, or a new plain one; and which it is."""
    if isinstance(name, Domain):
        return name, False
    installed = installed_domains()
    # A package's domain comes before the user's folder of that name, which serves it as weights.
    for listing in sorted(installed, key=lambda one: one.package == USER):
        if listing.name == name and listing.domain is not None:
            with contextlib.suppress(WeightsUnavailable):
                weights_folder(listing.domain, base)
                raise UsageError(
                    f"the domain {name!r} has weights for {base} already",
                    hint="choose another name with --domain",
                )
            return listing.domain, False
    known = [one.domain for one in installed if one.domain is not None]
    tuning, pretraining = _known_recipes(known, base)
    return Domain(name=name, descriptor=name, tuning=tuning, pretraining=pretraining), True


def _known_recipes(known: list[Domain], base: str) -> tuple[TuningRecipe, PretrainingRecipe]:
    """Return the numbers that a new domain begins with on a base.

    The paper's rates belong to Stable Diffusion; a pack that was made for this very base knows
    better ones. Of several, one without a mask and with the usual sentences is the nearest.
    """
    for domain in sorted(known, key=lambda one: bool(one.prompt_templates)):
        with contextlib.suppress(E4TError):
            pack = user_domain(weights_folder(domain, base))
            if pack.pretraining is not None and not pack.tuning.mask:
                return pack.tuning, pack.pretraining.replace(mask=False)
    # The paper's numbers for cats, its unmasked domain of things (section 3.5).
    tuning = TuningRecipe(steps=5, base_learning_rate=3e-6, embedding_penalty=1e-4)
    return tuning, PretrainingRecipe(steps=60_000)
