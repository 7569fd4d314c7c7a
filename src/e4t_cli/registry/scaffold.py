"""Writes a new package with one domain: four files that install, and whose tests pass."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from functools import partial
from importlib.resources import files
from pathlib import Path
from string import Template

from e4t_cli.errors import UsageError, printable
from e4t_cli.files import holds_only, put_in_place, staging_directory, sync_tree, write_atomically
from e4t_cli.hub.bases import find_base
from e4t_cli.models.descriptors import Vocabulary, choose_descriptor
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.discovery import OURS, installed_packages
from e4t_cli.registry.domain import check_name
from e4t_cli.registry.manifest import Manifest
from e4t_cli.registry.store import copy_domain_folder
from e4t_cli.temporary import sweep

PROJECT = "pyproject.toml"

# The paper's values for cats, its unmasked domain of things (section 3.5).
TUNING = TuningConfig(steps=5, base_learning_rate=3e-6, reg_weight=1e-4)
PRETRAINING = PretrainingConfig(steps=60_000)


def new_domain(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    descriptor: str = "",
    licence: str = "",
    weights: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Write a package with one domain, ready for `pip install -e`, and return its folder.

    Args:
        name: of the domain; the package is called e4t-domain-NAME.
        folder: new or empty; by default a folder of the package's name in the current one.
        descriptor: the everyday word for such things; by default the weights', or the word in the name.
        licence: of the weights and the data; by default the weights'.
        weights: a domain folder that `e4t pretrain` made, to be shipped in the package.
        force: replace a package that this function wrote, if nobody has changed a file of it.

    Raises:
        UsageError: the name cannot be used, or has no word that is a descriptor, the folder is not empty, or it cannot
            be written.
        IntegrityError: the weights are damaged.
        ResourceError: the disk is full.
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
    quoted = partial(json.dumps, ensure_ascii=False)  # in the syntax that Python and TOML share
    package = f"e4t-domain-{name.replace('_', '-').strip('-')}"
    module = package.replace("-", "_")
    target = Path(folder if folder is not None else package)
    if target.name in ("", ".."):
        raise UsageError(f"{printable(str(target))} is no name for a new folder", hint="call it by its own name")
    _check_free(target, force)
    with staging_directory(target) as staging:
        building = staging / target.name
        for path in (building / "tests", building / module):
            path.mkdir(parents=True)
        manifest = None
        if weights:
            packs = building / module / "packs"
            packs.mkdir()
            manifest = copy_domain_folder(Path(weights), packs / "new")
            (packs / "new").rename(packs / manifest.base)
        location = {manifest.base: f"package:{module}/packs/{manifest.base}"} if manifest else {}
        word = descriptor or (manifest.descriptor if manifest else _descriptor(name))
        values = {
            "name": name,
            "package": package,
            "module": module,
            "descriptor": quoted(word),
            "summary": quoted(f"one {word}, from one photo"),
            "configs": _configs(manifest),
            "weights": quoted(location),
            "licence": quoted(licence or (manifest.licence if manifest else "")),
        }
        templates = files("e4t_cli") / "registry" / "template"
        paths = {"module.py": f"{module}/__init__.py", "test_domain.py": "tests/test_domain.py"}
        for template in ("pyproject.toml", "README.md", *paths):
            text = (templates / f"{template}.template").read_text(encoding="utf-8")
            write_atomically(building / paths.get(template, template), Template(text).substitute(values).encode())
        with (building / PROJECT).open("ab") as file:
            file.write(f'\n[tool.e4t]\nwritten = "{_digest(building)}"\n'.encode())
        sync_tree(building)
        _check_free(target, force)
        if holds_only(target, ()):
            target.rmdir()
        put_in_place(building, target, ours=is_unchanged_package if force else None)
    return target


def _descriptor(name: str) -> str:
    """Return the word in a domain's name that `e4t pretrain` would find on the base that comes with e4t.

    Raises:
        UsageError: there is none; the hint lists similar words.
    """
    return choose_descriptor(name, Vocabulary.of_base(find_base()))


def _check_free(target: Path, force: bool) -> None:
    """Raise UsageError unless a folder is absent or empty, or with `force`, a package that nobody has changed."""
    sweep(target)
    if not os.path.lexists(target) or holds_only(target, ()) or (force and is_unchanged_package(target)):
        return
    shown = printable(str(target))
    if force:
        message = f"{shown} is no package of e4t domains new, or was changed since: it is not replaced"
        raise UsageError(message, hint="name another folder")
    raise UsageError(
        f"{shown} is not an empty folder", hint="name another one, or replace what is as e4t wrote it: --force"
    )


def is_unchanged_package(folder: Path) -> bool:
    """Whether `new_domain` wrote a folder and every file in it; what Python and pip leave there does not count."""
    try:
        written = tomllib.loads((folder / PROJECT).read_text(encoding="utf-8"))["tool"]["e4t"]["written"]
        return bool(written == _digest(folder)) and not os.path.islink(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _digest(folder: Path) -> str:
    """Return a hash of all files in a package, without the lines of this hash."""
    made_by_others = ("__pycache__", ".pytest_cache", ".egg-info")
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if os.path.isdir(path) or any(part.endswith(made_by_others) for part in name.parts):
            continue
        data = path.read_bytes().partition(b"\n[tool.e4t]\n")[0] if name.as_posix() == PROJECT else path.read_bytes()
        digest.update(f"{name.as_posix()} {hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()


def _configs(manifest: Manifest | None) -> str:
    """Return the two configurations as Python arguments, without what equals the defaults."""
    tuning, pretraining, origin = TUNING, PRETRAINING, "Values of the paper for cats (section 3.5)."
    if manifest:
        tuning, pretraining, origin = manifest.tuning, manifest.pretraining, "Values of the weights in this package."
    required = ("steps", "base_learning_rate", "reg_weight")
    return (
        f"    # {origin}\n"
        f"    tuning=TuningConfig({_arguments(tuning, TUNING, required)}),\n"
        f"    pretraining=PretrainingConfig({_arguments(pretraining, PRETRAINING, ('steps',))}),"
    )


def _arguments(config: object, defaults: object, required: tuple[str, ...]) -> str:
    chosen = [item for item in vars(config).items() if item[0] in required or item not in vars(defaults).items()]
    return ", ".join(f"{name}={value!r}" for name, value in chosen)
