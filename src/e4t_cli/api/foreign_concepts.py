"""A tuned checkpoint of e4t-diffusion as a concept: drawn as it is, without tuning again."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from e4t_cli.api.choices import base_name, choose_base
from e4t_cli.api.foreign import Imported, base_of, import_checkpoint
from e4t_cli.domain import PreparedImage
from e4t_cli.e4t_diffusion import MERGED, TUNED, read_checkpoint
from e4t_cli.errors import UsageError, printable
from e4t_cli.hub.access import Access
from e4t_cli.images import center_square
from e4t_cli.photos import Picture, open_picture
from e4t_cli.progress import ProgressCallback
from e4t_cli.registry import USER
from e4t_cli.session import Session


def import_concept(
    folder: str | os.PathLike[str],
    save: str | os.PathLike[str],
    *,
    image: Picture | None = None,
    name: str | None = None,
    base: str | os.PathLike[str] | None = None,
    licence: str = "",
    normalised_patches: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    access: Access | None = None,
    on_progress: ProgressCallback | None = None,
) -> Imported:
    """Convert a tuned checkpoint into a domain of the user's and a concept with its weights.

    The concept holds the tuned U-Net with its offsets merged, in half precision, and what the
    tuned encoder says of the picture: what e4t-diffusion itself would draw from.

    Args:
        folder: with unet.pt, encoder.pt, config.json.
        save: the concept's file.
        image: the picture it was tuned on; by default the domain.png that lies there.
        access: how the base may be fetched.

    The other arguments are those of `import_checkpoint` and of `personalize`.

    Raises:
        UsageError: it has no tuned U-Net, or nobody knows the picture.
        E4TError: another of its children.
    """
    checkpoint = read_checkpoint(Path(folder))
    if checkpoint.weights != TUNED:
        raise UsageError(
            f"{printable(str(folder))} has no {TUNED}: it is a domain, and no concept to save",
            hint="leave --save away, then: e4t personalize DOMAIN PHOTO PROMPT",
        )
    if image is None and checkpoint.photo is None:
        raise UsageError(
            "the picture it was tuned on is not in the folder", hint="give it with --image FILE"
        )
    opened = open_picture(image if image is not None else str(checkpoint.photo))
    session = Session(device, dtype, on_progress)
    access = access or Access(on_progress=session.report)
    place = choose_base(
        base if base is not None else base_of(checkpoint), access, device=device, dtype=dtype
    )
    imported = import_checkpoint(
        folder,
        name=name,
        base=base if base is not None else base_name(place),
        licence=licence,
        normalised_patches=normalised_patches,
        keep_unet=True,
        on_progress=session.report,
    )
    try:
        with session.running():
            session.load(place, imported.folder)
            _save(session, imported, opened.image, opened.sha256, Path(save))
    except BaseException:
        shutil.rmtree(imported.folder, ignore_errors=True)  # both, or nothing
        raise
    with contextlib.suppress(OSError):
        (imported.folder / MERGED).unlink()  # the concept has them now
    return imported


def _save(session: Session, imported: Imported, photo: object, sha256: str, path: Path) -> None:
    import torch

    from e4t_cli.concept import Concept
    from e4t_cli.pack_files import read_tensors

    model, pretrained = session.model, session.pretrained
    # Theirs sees the whole square, without a mask.
    prepared = PreparedImage(image=center_square(photo, model.resolution))  # type: ignore[arg-type]
    features = pretrained.image_features(model, model.pixels([prepared.image]))
    with torch.no_grad():
        folded = pretrained.encoder.to(features.device).fold(features)
    unet = read_tensors(imported.folder / MERGED)
    weights = {f"unet.{key}": value.half() for key, value in unet.items()}
    settled = pretrained.encoder.settled().state_dict()
    weights |= {f"encoder.{key}": value.cpu() for key, value in settled.items()}
    concept = Concept(
        domain=imported.name,
        descriptor=pretrained.descriptor,
        base_name=model.base.name,
        base_fingerprint=model.fingerprint,
        pack_digest=pretrained.digest,
        prepared=prepared,
        image_features=features[0].cpu(),
        recipe=pretrained.tuning.replace(steps=0),  # nothing was tuned by this program
        seed=0,
        image_sha256=sha256,
        package=USER,
        weights={**weights, "folded": folded.cpu()},
    )
    concept.tuned(model, pretrained)  # weights of another model stop us before a file is written
    concept.save(path)
