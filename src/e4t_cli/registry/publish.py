"""Publishes a domain's weights: a hub repository with the manifest, the files and a model card.

Repositories are private unless requested otherwise, and only safetensors, never pickles, are sent.
"""

from __future__ import annotations

import re
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from e4t_cli.errors import UsageError, WeightsUnavailable, printable
from e4t_cli.files import write_atomically
from e4t_cli.hub.errors import as_e4t_error
from e4t_cli.hub.paths import endpoint, is_offline
from e4t_cli.hub.repo_info import check_repository, has_token
from e4t_cli.progress import ProgressCallback
from e4t_cli.registry.domain import REPOSITORY, Domain
from e4t_cli.registry.manifest import MANIFEST_NAME, Manifest, read_manifest, toml_text
from e4t_cli.registry.store import copy_domain_folder
from e4t_cli.registry.weights import READY, weights_state, weights_states

# The hub's identifiers of licences; any other is "other", with its name beside it.
_HUB_LICENCES = {
    *("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    *("creativeml-openrail-m", "openrail", "bsd-3-clause", "gpl-3.0"),
}


@dataclass(frozen=True, kw_only=True)
class PublishedDomain:
    """A domain's weights that are on the hub now."""

    location: str  # "owner/repository@commit": for `e4t domains add`, and after "hub:" in `weights`
    private: bool  # whether only the owner can read it, if the repository was made just now
    size: int  # bytes of its files, for `Domain.download_sizes`
    manifest: Manifest


def publish_domain(
    domain: Domain,
    repository: str,
    *,
    base: str = "",
    licence: str = "",
    private: bool = True,
    on_progress: ProgressCallback | None = None,
) -> PublishedDomain:
    """Upload a domain's weights for one base as a model repository of the hub.

    Args:
        domain: whose weights are on this machine.
        repository: "owner/name"; made if it does not exist.
        base: for which the weights are; may be left out if there is one.
        licence: of weights and images, for a manifest that has none, or instead of it.
        private: for a repository that is made now.
        on_progress: called while the files are checked.

    Raises:
        UsageError: no licence is given, the weights are ambiguous, the repository's name is invalid, or it should be
            private and is public already.
        WeightsUnavailable: there are no weights here, no token, no network, or no permission.
        IntegrityError: the weights are damaged.
    """
    folder = _folder_to_publish(domain, base)
    licence = (licence or read_manifest(folder / MANIFEST_NAME).licence or domain.licence).strip()
    if not licence or not licence.isprintable():
        message = f"the domain {domain.name!r} has no licence: others could not use it"
        raise UsageError(message, hint="--licence CC0-1.0, or whatever the weights and their images are under")
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "domain"
        manifest = copy_domain_folder(folder, staged, on_progress, links_into=Path(folder.anchor))
        path = staged / MANIFEST_NAME
        if manifest.licence != licence:
            table = {**tomllib.loads(path.read_text("utf-8")), "licence": licence}
            write_atomically(path, toml_text(table).encode())
            manifest = read_manifest(path)
        write_atomically(staged / "README.md", model_card(manifest, domain, repository).encode())
        location = _upload(staged, repository, private=private, title=f"{manifest.name} for {manifest.base}")
        size = sum(path.stat().st_size for path in staged.iterdir())
    return PublishedDomain(location=location, private=private, size=size, manifest=manifest)


def _folder_to_publish(domain: Domain, base: str) -> Path:
    states = [weights_state(domain, base)] if base else weights_states(domain)
    found = [state for state in states if state.state == READY]
    if len(found) > 1:
        names = " or ".join(state.base for state in found)
        raise UsageError(f"the domain {domain.name!r} has weights for several bases", hint=f"name one: --base {names}")
    if not found or found[0].folder is None:
        which = f" for {printable(base)}" if base else ""
        message = f"the domain {domain.name!r} has no weights on this machine{which}"
        raise WeightsUnavailable(message, hint=f"make them: e4t pretrain --domain {domain.name} --data FOLDER")
    return found[0].folder


def _upload(folder: Path, repository: str, *, private: bool, title: str) -> str:
    """Upload a folder as a commit of that title and return "owner/name@commit"."""
    try:
        check_repository(repository)
    except WeightsUnavailable as error:
        raise UsageError(error.message, hint=error.hint) from error
    if is_offline():
        raise WeightsUnavailable("nothing can be uploaded: e4t is offline")
    if not has_token():
        raise WeightsUnavailable("the hub does not know who you are", hint="hf auth login")
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    api = HfApi(endpoint=endpoint())
    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()  # only the commands print
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            # `create_repo` does not change the visibility of a repository that exists.
            message = f"{repository} exists and is open to all: nothing was uploaded"
            raise UsageError(message, hint="--public uploads into it; another name makes a private one")
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=title)
    except Exception as error:
        raise as_e4t_error(error, repository) from error
    finally:
        if had_bars:
            enable_progress_bars()
    return f"{repository}@{done.oid}"


def model_card(manifest: Manifest, domain: Domain, repository: str) -> str:
    """Return the README.md of a repository: Markdown below a YAML header for the hub."""
    from huggingface_hub import ModelCardData

    licence = re.sub(r"\s+", "-", manifest.licence.lower())
    known = licence in _HUB_LICENCES
    base, _, _ = manifest.base_revision.partition("@")
    data = ModelCardData(
        license=licence if known else "other",
        license_name=None if known else manifest.licence,
        base_model=base if REPOSITORY.fullmatch(base) else None,
        library_name="e4t",
        pipeline_tag="text-to-image",
        tags=["e4t", "text-to-image", "personalization", f"e4t-base-{manifest.base}"],
    )
    files = "\n".join(
        f"| `{name}` | {manifest.sizes.get(name, 0):,} | `{sha256}` |" for name, sha256 in manifest.files.items()
    )
    summary = f"{domain.summary}. " if domain.summary else ""
    return f"""---
{data.to_yaml()}
---

# {_escaped(manifest.name)}: a domain for e4t

{_escaped(summary)}One photo of a {_escaped(manifest.descriptor)} in, a personalised text-to-image
model out. These are the encoder and the weight offsets of *Encoder-based Domain Tuning for Fast
Personalization of Text-to-Image Models*, trained on {manifest.images:,} images for the base
`{manifest.base}`. A commit in the place of `main` never changes.

```console
$ e4t domains add {repository}@main
$ e4t personalize {manifest.name} photo.jpg "S* on the beach"
```

Limits: {_escaped(manifest.limits or "not stated.")}

{_escaped(manifest.notes)}

| | |
|---|---|
| licence | {_escaped(manifest.licence)} |
| base | {manifest.base} {_escaped(manifest.base_revision)} |
| weights of the base | `{_escaped(manifest.base_fingerprint)}` |
| image encoder | {_escaped(manifest.image_tower or "that of the base")} |
| images | {manifest.images:,} |
| pre-training | {_listed(manifest.pretraining.as_dict())} |
| tuning | {_listed(manifest.tuning.as_dict())} |

| file | bytes | SHA-256 |
|---|---|---|
{files}
"""


def _escaped(text: str) -> str:
    """Return text of a manifest such that Markdown shows it literally."""
    return re.sub(r"([\\`*_|<>\[\]#!])", r"\\\1", printable(text, limit=2000))


def _listed(config: dict[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in config.items())
