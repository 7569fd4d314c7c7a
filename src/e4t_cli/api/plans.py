"""`plan`: what `personalize` would do, found out without torch and without a network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from e4t_cli.api.choices import choose_domain, name_base, wants_half
from e4t_cli.api.wishes import parse_prompts
from e4t_cli.domain import Domain
from e4t_cli.errors import WeightsUnavailable
from e4t_cli.hub.access import Access
from e4t_cli.hub.converted import foreign_repository
from e4t_cli.hub.presence import look_up_base
from e4t_cli.photos import Picture, open_picture
from e4t_cli.prompts import PLACEHOLDER
from e4t_cli.registry import user_domain, weights_folder


def plan(
    domain: str | os.PathLike[str] | Domain,
    image: Picture,
    prompts: str | Sequence[str] = (),
    *,
    images_per_prompt: int = 1,
    base: str | os.PathLike[str] = "auto",
    placeholder: str = PLACEHOLDER,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
) -> dict[str, Any]:
    """Say what `personalize` would do, checking what can be checked without torch and a network.

    Raises:
        E4TError: as `personalize`.
    """
    parsed = parse_prompts(prompts, placeholder)
    value, _ = choose_domain(domain)
    photo = open_picture(image).image
    wanted = name_base(base, Access(offline=offline), domain=value, device=device, confirm=False)
    name, resolution, here = look_up_base(wanted, half=wants_half(device, dtype))
    tuning, fetched = value.tuning, [] if here else [f"the base {name}"]
    try:
        tuning = user_domain(weights_folder(value, name)).tuning
    except WeightsUnavailable:
        location = value.weights.get(name, "")
        if not location.startswith("hub:") and not foreign_repository(location):
            raise
        fetched.append(f"the weights of {value.name}")
    return {
        "domain": value.name,
        "descriptor": value.descriptor,
        "base": name,
        "photo": f"{photo.width}×{photo.height}",
        "prompts": len(parsed),
        "pictures": len(parsed) * images_per_prompt,
        "size": f"{resolution}×{resolution}" if resolution else "",
        "to fetch": " and ".join(fetched),
        "tuning": tuning.as_dict(),
    }
