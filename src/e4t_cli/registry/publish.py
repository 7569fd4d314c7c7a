"""Sending a folder to the hub: private unless said otherwise, and never a pickle.

Publishing a pack: a repository of the hub with its card, its files, and a page for people.
"""

from __future__ import annotations

import json
import re
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.errors import UsageError, WeightsUnavailable, printable
from e4t_cli.files import write_atomically
from e4t_cli.hub.download import check_repository, has_token
from e4t_cli.hub.errors import as_e4t_error
from e4t_cli.hub.paths import endpoint, is_offline
from e4t_cli.progress import ProgressCallback
from e4t_cli.registry.archives import CARD, copy_pack, open_folder
from e4t_cli.registry.domain import Domain
from e4t_cli.registry.manifest import Manifest, read_manifest, toml_text
from e4t_cli.registry.weights import READY, weights_state, weights_states

_ALLOWED = ("*.safetensors", "*.toml", "*.json", "*.md", "*.txt", "*.png", "*.jpg")


def push_folder(
    folder: Path, repository: str, *, private: bool = True, message: str = "Upload by e4t"
) -> str:
    """Upload a folder as a model repository of the user's, made if it does not exist.

    Args:
        folder: what is uploaded; only files of the kinds that this program writes are.
        repository: "owner/name".
        private: for a repository that is made now.
        message: of the commit.

    Returns:
        "owner/name@commit", which is what a domain's `weights` take after "hub:".

    Raises:
        UsageError: there is no such folder, or the name is none, or it should be private and is
            open to all already.
        WeightsUnavailable: no token, no network, or no right to write there.
    """
    try:
        check_repository(repository)
    except WeightsUnavailable as error:
        raise UsageError(error.message, hint=error.hint) from error
    if not folder.is_dir():
        raise UsageError(f"there is no folder {printable(str(folder))}")
    if is_offline():
        raise WeightsUnavailable("nothing can be uploaded: e4t is offline")
    if not has_token():
        raise WeightsUnavailable("the hub does not know who you are", hint="hf auth login")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint())
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            # One that existed stays as open as it was, whatever is asked for now.
            raise UsageError(
                f"{repository} exists and is open to all: nothing was uploaded",
                hint="--public uploads into it; another name makes a private one",
            )
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            allow_patterns=list(_ALLOWED),
        )
    except Exception as error:
        raise as_e4t_error(error, repository) from error
    return f"{repository}@{done.oid}"


# What the hub calls licences; anything else is "other", with its name beside it.
_HUB_LICENCES = (
    "apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "creativeml-openrail-m", "openrail", "bsd-3-clause", "gpl-3.0",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Published:
    """A pack that is on the hub now.

    Args:
        location: "owner/repository@commit": for `e4t domains add`, and after "hub:" in `weights`.
        private: whether only the owner sees it, if the repository was made just now.
        size: bytes of its files, for `Domain.download_sizes`.
        card: what it says about itself.
    """

    location: str
    private: bool
    size: int
    card: Manifest


def publish_domain(
    domain: Domain,
    repository: str,
    *,
    base: str = "",
    licence: str = "",
    private: bool = True,
    on_progress: ProgressCallback | None = None,
) -> Published:
    """Upload a domain's pack for one base as a repository of the hub, with a page about it.

    Args:
        domain: whose weights are on this machine.
        repository: "owner/name"; made if it does not exist.
        base: which pack; may be left out if there is one.
        licence: of weights and pictures, for a card that has none, or instead of it.
        private: for a repository that is made now.
        on_progress: called while the files are checked.

    Raises:
        UsageError: no licence is given, or it is not clear which pack is meant.
        WeightsUnavailable: there is no pack here, no token, or no network.
        IntegrityError: the pack is damaged.
    """
    folder = _pack_to_publish(domain, base)
    licence = (licence or read_manifest(folder / CARD).licence or domain.licence).strip()
    if not licence or not licence.isprintable():
        raise UsageError(
            f"the domain {domain.name!r} has no licence: others could not use it",
            hint="--licence CC0-1.0, or whatever the weights and their pictures are under",
        )

    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "pack"
        with open_folder(folder, links_into=Path(folder.anchor)) as parcel:
            card = copy_pack(parcel, staged, on_progress)
        if card.licence != licence:
            table = {**tomllib.loads((staged / CARD).read_text("utf-8")), "licence": licence}
            write_atomically(staged / CARD, toml_text(table).encode())
            card = read_manifest(staged / CARD)
        write_atomically(staged / "README.md", model_card(card, domain, repository).encode())
        with _no_bars():
            location = push_folder(
                staged, repository, private=private, message=f"{card.name} for {card.base}"
            )
        size = sum(path.stat().st_size for path in staged.iterdir())
    return Published(location=location, private=private, size=size, card=card)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the progress bars of huggingface_hub off: nothing below the commands prints."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def model_card(card: Manifest, domain: Domain, repository: str) -> str:
    """Return the page of a repository, in Markdown below a head that the hub reads."""
    licence = re.sub(r"\s+", "-", card.licence.lower())
    known = licence in _HUB_LICENCES
    head = {"license": licence if known else "other"}
    if not known:
        head["license_name"] = card.licence
    owner, _, revision = card.base_revision.partition("@")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", owner):
        head["base_model"] = owner
    tags = ["e4t", "text-to-image", "personalization", f"e4t-base-{card.base}"]
    rows = "\n".join(
        f"| `{name}` | {card.sizes.get(name, 0):,} | `{sha256}` |"
        for name, sha256 in card.files.items()
    )
    summary = f"{domain.summary}. " if domain.summary else ""
    # JSON's strings are YAML's.
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    return f"""---
{chr(10).join(lines)}
library_name: e4t
pipeline_tag: text-to-image
tags: {json.dumps(tags)}
---

# {_plain(card.name)}: a domain for e4t

{_plain(summary)}One photo of a {_plain(card.descriptor)} in, a personalised text-to-image
model out. These are the encoder and the weight offsets of *Encoder-based Domain Tuning for Fast
Personalization of Text-to-Image Models*, trained on {card.images:,} pictures for the base
`{card.base}`. A commit in the place of `main` is what never changes.

```console
$ e4t domains add {repository}@main
$ e4t personalize {card.name} photo.jpg "S* on the beach"
```

Limits: {_plain(card.limits or "not stated.")}

{_plain(card.notes)}

| | |
|---|---|
| licence | {_plain(card.licence)} |
| base | {card.base} {_plain(card.base_revision)} |
| weights of the base | `{_plain(card.base_fingerprint)}` |
| image tower | {_plain(card.image_tower or "that of the base")} |
| pictures | {card.images:,} |
| pre-training | {_numbers(card.pretraining.as_dict())} |
| tuning | {_numbers(card.tuning.as_dict())} |

| file | bytes | SHA-256 |
|---|---|---|
{rows}
"""


def _pack_to_publish(domain: Domain, base: str) -> Path:
    if base:
        found = [weights_state(domain, base)]
    else:
        found = [one for one in weights_states(domain) if one.state == READY]
    if len(found) > 1:
        names = " or ".join(one.base for one in found)
        raise UsageError(
            f"the domain {domain.name!r} has several packs", hint=f"say which: --base {names}"
        )
    if not found or found[0].folder is None:
        raise WeightsUnavailable(
            f"the domain {domain.name!r} has no weights on this machine"
            + (f" for {printable(base)}" if base else ""),
            hint=f"make them: e4t pretrain --domain {domain.name} --data FOLDER",
        )
    return found[0].folder


def _plain(text: str) -> str:
    """Return text from a card as Markdown shows it, not as Markdown reads it."""
    return re.sub(r"([\\`*_|<>\[\]#!])", r"\\\1", printable(text, limit=2000))


def _numbers(config: dict[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in config.items())
