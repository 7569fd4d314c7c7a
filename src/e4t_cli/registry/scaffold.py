"""Beginning a package with a domain in it: four files that install, and whose tests pass."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template

from e4t_cli.errors import UsageError, printable
from e4t_cli.files import write_atomically
from e4t_cli.registry.archives import copy_pack, open_folder
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.discovery import OURS, installed_packages
from e4t_cli.registry.domain import check_name
from e4t_cli.registry.manifest import Manifest

# The paper's numbers for cats, its unmasked domain of things (section 3.5).
TUNING = TuningConfig(steps=5, base_learning_rate=3e-6, reg_weight=1e-4)
PRETRAINING = PretrainingConfig(steps=60_000)


def new_domain(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    descriptor: str = "",
    licence: str = "",
    pack: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a package with one domain, ready for `pip install -e`.

    Args:
        name: of the domain; the package is called e4t-domain-NAME.
        folder: where; by default a folder of the package's name here. It must not exist, or be
            empty.
        descriptor: the everyday word for such things; by default the pack's, or the name.
        licence: of the weights and the data; by default the pack's.
        pack: a folder that `e4t pretrain` made, to travel in the package.

    Returns:
        The folder.

    Raises:
        UsageError: the name cannot be used, or the folder is not free.
        IntegrityError: the pack is damaged.
    """
    try:
        check_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if OURS in installed_packages(name):
        raise UsageError(f"the name {name!r} belongs to a domain of e4t", hint="choose another")
    for text in (descriptor, licence):
        if not text.isprintable():
            raise UsageError(f"{printable(text)!r} is not a line of plain text")
    package = f"e4t-domain-{name.replace('_', '-').strip('-')}"
    module = package.replace("-", "_")
    target = Path(folder if folder is not None else package)
    shown = printable(str(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{shown} is not an empty folder", hint="name another one")
    building = target.parent / f".{secrets.token_hex(8)}~"
    try:
        building.mkdir(parents=True)
        (building / "tests").mkdir()
        (building / module).mkdir()
        card = None if pack is None else _ship(Path(pack), building / module / "packs")
        place = {} if card is None else {card.base: f"package:{module}/packs/{card.base}"}
        word = descriptor or (card.descriptor if card else name)
        values = {
            "name": name,
            "package": package,
            "module": module,
            "descriptor": _quoted(word),
            "summary": _quoted(f"one {word}, from one photo"),
            "recipes": _recipes(card),
            "weights": _quoted(place),
            "licence": _quoted(licence or (card.licence if card else "")),
        }
        for template, path in (
            ("pyproject.toml", "pyproject.toml"),
            ("README.md", "README.md"),
            ("module.py", f"{module}/__init__.py"),
            ("test_domain.py", "tests/test_domain.py"),
        ):
            write_atomically(building / path, _filled(template, values).encode())
        building.replace(target)  # an empty folder gives way, any other does not
    except OSError as error:
        raise UsageError(f"{shown} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _ship(pack: Path, packs: Path) -> Manifest:
    packs.mkdir()
    with open_folder(pack) as parcel:
        card = copy_pack(parcel, packs / "new")
    (packs / "new").rename(packs / card.base)
    return card


def _recipes(card: Manifest | None) -> str:
    tuning, pretraining = (card.tuning, card.pretraining) if card else (TUNING, PRETRAINING)
    origin = "those of its pack" if card else "the paper's for cats (section 3.5)"
    changed = {k: v for k, v in vars(tuning).items() if v != _DEFAULTS.get(k)}
    before = {k: v for k, v in vars(pretraining).items() if v != _USUAL.get(k)}
    return (
        f"    # The numbers are {origin}.\n"
        f"    tuning=TuningConfig({_arguments(changed)}),\n"
        f"    pretraining=PretrainingConfig({_arguments(before)}),"
    )


# What need not be written, because it is what a recipe has anyway.
_DEFAULTS = {
    key: value
    for key, value in vars(TUNING).items()
    if key not in ("steps", "base_learning_rate", "reg_weight")
}
_USUAL = {key: value for key, value in vars(PRETRAINING).items() if key != "steps"}


def _arguments(numbers: dict[str, object]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in numbers.items())


def _quoted(value: object) -> str:
    """Return text or a table of texts as both Python and TOML write it."""
    return json.dumps(value, ensure_ascii=False)


def _filled(template: str, values: dict[str, str]) -> str:
    source = files("e4t_cli") / "registry" / "template" / f"{template}.template"
    return Template(source.read_text(encoding="utf-8")).substitute(values)
