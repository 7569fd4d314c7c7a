"""A saved concept and what it needs, at hand again: for whoever draws or exports it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from e4t_cli.api.choices import choose_base, find_domain_again, find_pack
from e4t_cli.hub.access import Access
from e4t_cli.session import Session

if TYPE_CHECKING:
    from e4t_cli.base_model import TextToImageModel
    from e4t_cli.concept import Concept


def open_concept(concept: Concept | str | os.PathLike[str]) -> Concept:
    """Return a concept, read from its file if it is not one already."""
    from e4t_cli.concept import Concept

    return concept if isinstance(concept, Concept) else Concept.load(concept)


def load_for(
    concept: Concept,
    session: Session,
    access: Access,
    *,
    base: str | os.PathLike[str] | TextToImageModel,
    device: str,
    dtype: str,
    safety: bool,
) -> None:
    """Load the base and the pack that a concept was made with.

    Args:
        base: "auto" is the one that it names.
        safety: whether the base's safety checker is wanted too.

    Raises:
        IntegrityError: this machine's base or pack is not the one it was made with.
        E4TError: another of its children.
    """
    value = find_domain_again(concept.domain, concept.package)
    wanted = concept.base_name if base == "auto" else base
    place = choose_base(wanted, access, device=device, dtype=dtype, tower=False, safety=safety)
    session.load(place, find_pack(value, place, access))
    concept.check(session.model, session.pretrained)
