"""``e4t domains info``: everything about one domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import DomainName, Json
from e4t_cli.hub.places import shown_size

if TYPE_CHECKING:
    from e4t_cli.domain import Domain
    from e4t_cli.manifest import Manifest
    from e4t_cli.recipes import TuningRecipe
    from e4t_cli.shelf import WeightsState


def domain_info(name: DomainName, json: Json = False) -> None:
    """Show everything about one domain: its packs, their files, recipes, licence and limits."""
    from e4t_cli.registry import find_listing

    console = consoles.start(json=json)
    listing = find_listing(name)
    assert listing.domain is not None
    about = {"source": f"{listing.package} {listing.version}".strip()}
    about |= about_domain(listing.domain)
    if not json:
        del about["name"]
        packs = about.pop("weights")
        for base, pack in packs.items():
            about[f"weights for {base}"] = state_text(pack, long=True)
            about |= {f"{base}: {key}": value for key, value in _lines(pack).items()}
    console.details(listing.domain.name, about)


def about_domain(domain: Domain) -> dict[str, Any]:
    """Return a domain as a record, with the state of its weights for each base."""
    from e4t_cli.shelf.weights import weights_states  # pydantic, which --help does not wait for

    return {
        "name": domain.name,
        "summary": domain.summary,
        "descriptor": domain.descriptor,
        "tuning": recipe_text(domain.tuning),
        "licence": domain.licence,
        "weights": {state.base: _about_weights(state) for state in weights_states(domain)},
    }


def state_text(pack: dict[str, Any], *, long: bool = False) -> str:
    """Return the state of weights in a few words, or with everything there is to say."""
    size = shown_size(pack["size"]) if pack.get("size") else ""
    if pack["state"] == "to fetch":
        said = f"{size} to fetch".strip()
    else:
        said = f"{pack['state']}, {size}" if long and size else pack["state"]
    more = pack.get("tuning") or pack.get("hint") or pack.get("reason")
    return f"{said}: {more}" if long and more else said


def recipe_text(recipe: TuningRecipe) -> str:
    """Return the numbers of tuning in a few words."""
    mask = ", masked" if recipe.mask else ""
    return (
        f"{recipe.steps} steps, rate {recipe.learning_rate:.3g}, "
        f"penalty {recipe.embedding_penalty:g}{mask}"
    )


def _about_weights(state: WeightsState) -> dict[str, Any]:
    plain = {key: getattr(state, key) for key in ("size", "location", "reason", "hint")}
    record = {"state": state.state, **{key: value for key, value in plain.items() if value}}
    return record | (_about_card(state.card, state) if state.card else {})


def _about_card(card: Manifest, state: WeightsState) -> dict[str, Any]:
    assert state.folder is not None
    return {
        "tuning": recipe_text(card.tuning),
        "pretraining": card.pretraining.as_dict(),
        "folder": str(state.folder),
        "images": card.images,
        "licence": card.licence,
        "limits": card.limits,
        "notes": card.notes,
        "base_revision": card.base_revision,
        "base_fingerprint": card.base_fingerprint,
        "base_config_hash": card.base_config_hash,
        "image_tower": card.image_tower,
        "files": {
            name: {"bytes": (state.folder / name).stat().st_size, "sha256": sha256}
            for name, sha256 in card.files.items()
        },
    }


def _lines(pack: dict[str, Any]) -> dict[str, str]:
    """Return what a card says, a line each, for people."""
    if "files" not in pack:
        return {}
    before = pack["pretraining"]
    lines = {
        "pictures": f"{pack['images']:,}",
        "pre-training": f"{before['steps']:,} steps of {before['batch_size']}",
        "made for": f"{pack['base_revision']} {pack['base_fingerprint'][:12]}".strip(),
        **{
            key.replace("_", " "): pack[key]
            for key in ("image_tower", "licence", "limits", "notes")
        },
        "folder": pack["folder"],
    }
    for name, file in pack["files"].items():
        lines[name] = f"{file['bytes']:,} bytes, SHA-256 {file['sha256']}"
    return lines
