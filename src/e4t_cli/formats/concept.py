"""A concept's file: tensors, and a JSON card in the header of a safetensors file.

The prepared picture and its mask, the picture's image features (so that no image tower is needed
again), on wish the tuned weights; in the header domain, base, recipe, seed and hashes. Reading is
strict: nothing missing, nothing unknown, every number finite.

A concept: one personalized subject.

The prepared picture, what the encoder sees of it, and the recipe and seed: enough to tune it again,
to the same bits, in seconds. On wish it also holds the tuned weights, which saves those seconds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from e4t_cli.errors import IntegrityError, UsageError, printable
from e4t_cli.files import write_atomically
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.adapters import merge_lora
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import PreparedImage, check_name

SCHEMA = 1

_PLAIN = (
    "domain", "descriptor", "base_name", "base_fingerprint", "pack_digest", "seed",
    "image_sha256", "placeholder",
)  # fmt: skip
"""Entries of the card that every concept has; their values are text, but for the seed."""


def write_concept(fields: Mapping[str, Any], path: str | Path, *, overwrite: bool = True) -> None:
    """Write the fields of a concept to one file.

    Raises:
        FileExistsError: it exists and may not be overwritten.
    """
    tensors = {
        "image": torch.from_numpy(numpy.array(fields["prepared"].image)),
        "image_features": _smallest(fields["image_features"].float().cpu()),
    }
    if fields["prepared"].mask is not None:
        tensors["mask"] = torch.from_numpy(numpy.array(fields["prepared"].mask))
    tensors |= {f"weights.{key}": value for key, value in fields["weights"].items()}
    card = {
        "schema": SCHEMA,
        **{name: fields[name] for name in _PLAIN},
        **({"package": fields["package"]} if fields["package"] else {}),
        **({"photo": fields["photo"]} if fields["photo"] else {}),
        "recipe": fields["config"].as_dict(),
    }
    data = save({k: v.contiguous() for k, v in tensors.items()}, {"e4t": json.dumps(card)})
    write_atomically(path, data, overwrite=overwrite)


def read_concept(path: str | Path) -> dict[str, Any]:
    """Return the fields of a concept.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is not a concept, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"there is no concept {printable(str(path))}",
            hint="make one: e4t personalize … --save",
        )
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {})["e4t"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if card.pop("schema", None) != SCHEMA:
            raise ValueError("its schema is unknown; a newer e4t may read it")
        config = TuningConfig.from_dict(card.pop("recipe"))
        if set(card) - {"package", "photo"} != set(_PLAIN):
            raise ValueError("its card has other entries than a concept's")
        check_name(card["domain"])
        for key in card:
            if not isinstance(card[key], int if key == "seed" else str):
                raise ValueError(f"its {key} is of the wrong kind")
        for key, value in tensors.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{key} has numbers that are not finite")
        mask = tensors.pop("mask", None)
        prepared = PreparedImage(
            image=Image.fromarray(tensors.pop("image").numpy()),
            mask=None if mask is None else Image.fromarray(mask.numpy()),
        )
        features = tensors.pop("image_features").float()
        prefix = "weights."
        if features.dim() != 2 or any(not key.startswith(prefix) for key in tensors):
            raise ValueError("it holds other tensors than a concept")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{printable(str(path))} is not a usable concept: {printable(str(error))}"
        ) from error
    weights = {key[len(prefix) :]: value for key, value in tensors.items()}
    return {
        "prepared": prepared, "image_features": features, "config": config, "weights": weights,
        **card,
    }  # fmt: skip


def _smallest(values: Tensor) -> Tensor:
    """Return them in half precision if that loses nothing."""
    half = values.half()
    return half if torch.equal(half.float(), values) else values


@dataclass(frozen=True, kw_only=True, eq=False)
class Concept:
    """What personalization yields, and what can be saved and drawn again.

    Args:
        domain, descriptor: whose encoder looked at the picture.
        base_name, base_fingerprint: the base it lives on.
        pack_digest: which pack of the domain.
        prepared: the square picture and its mask.
        image_features: what the pack's encoder sees of the picture (vectors, width), float32.
        recipe: the tuning recipe that was really used.
        seed: of the tuning.
        image_sha256: of the file that was handed in, "" if there was none.
        placeholder: what prompts call it.
        photo: what was found in the photo and done to it, such as "1 face, turned 4°".
        package: the distribution that the domain came with, "user" for the user's own, or "".
        weights: the tuned tensors, if they are kept; see `kept` and `tuned`.
    """

    domain: str
    descriptor: str
    base_name: str
    base_fingerprint: str
    pack_digest: str
    prepared: PreparedImage
    image_features: Tensor
    config: TuningConfig
    seed: int
    image_sha256: str = ""
    placeholder: str = "S*"
    photo: str = ""
    package: str = ""
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def check(self, model: TextToImageModel, pretrained: DomainWeights) -> None:
        """Refuse a base or a pack other than those the concept was made with.

        Raises:
            IntegrityError: the concept would come out as something else.
        """
        if model.fingerprint != self.base_fingerprint:
            raise IntegrityError(
                f"this concept lives on the base {self.base_name} ({self.base_fingerprint[:12]}), "
                f"not on this {model.base.name} ({model.fingerprint[:12]})",
                hint="personalize the picture again on this base",
            )
        if pretrained.digest != self.pack_digest:
            raise IntegrityError(
                f"this concept was made with another version of the {self.domain} pack "
                f"({self.pack_digest[:12] or 'unsaved'}, here: {pretrained.digest[:12]})",
                hint="personalize the picture again",
            )

    @staticmethod
    def kept(tuned: TunedModel) -> dict[str, Tensor]:
        """Return the tensors of a tuned model, for `weights`."""
        if tuned.adapters:  # megabytes: the rest is the base's and the pack's
            return {f"adapters.{key}": value for key, value in tuned.adapters.items()}
        assert isinstance(tuned.encoder, nn.Module)
        tensors = {f"unet.{key}": value for key, value in tuned.unet.state_dict().items()}
        tensors |= {f"encoder.{key}": value for key, value in tuned.encoder.state_dict().items()}
        tensors["folded"] = (
            tuned.encoded_image
        )  # a settled encoder cannot look at the picture again
        return {key: value.detach().cpu() for key, value in tensors.items()}

    def tuned(self, model: TextToImageModel, pretrained: DomainWeights) -> TunedModel | None:
        """Return the tuned model from the kept weights, or None if they were not kept.

        Raises:
            IntegrityError: another base or pack, or weights that do not fit.
        """
        if not self.weights:
            return None
        self.check(model, pretrained)
        adapters = self._own("adapters")
        try:
            if adapters:
                unet, encoder = merge_lora(
                    model.unet,
                    pretrained.offsets,
                    pretrained.encoder,
                    adapters,
                    dtype=model.tuned_dtype,
                )
            else:
                # torch's own `to`: diffusers' logs a warning about casts that are meant.
                unet = nn.Module.to(copy.deepcopy(model.unet), model.tuned_dtype)
                encoder = copy.deepcopy(pretrained.encoder.for_inference())
                unet.load_state_dict(self._own("unet"))
                encoder.load_state_dict(self._own("encoder"))
        except (RuntimeError, ValueError) as error:
            raise IntegrityError(f"the concept's weights do not fit its base: {error}") from error
        encoder.to(model.device).requires_grad_(False)
        token = model.descriptor_id(self.descriptor)
        encoded_image = self.weights.get("folded")
        with torch.no_grad():
            if encoded_image is None:  # of adapters, or kept before there were encoders that settle
                encoded_image = encoder.encode_image(self.image_features[None].to(model.device))
            encoded_image = encoded_image.to(model.device)
        return TunedModel(
            unet=unet,
            encoder=encoder.for_inference(),
            encoded_image=encoded_image,
            e_domain=model.word_embedding(token),
            descriptor_id=token,
            scale=pretrained.embedding_scale,
            adapters=adapters,
        )

    def _own(self, part: str) -> dict[str, Tensor]:
        """Return one part's tensors from the kept weights."""
        prefix = f"{part}."
        return {
            key[len(prefix) :]: value
            for key, value in self.weights.items()
            if key.startswith(prefix)
        }

    def save(self, path: str | Path, *, overwrite: bool = True) -> None:
        """Write the concept to one file.

        Raises:
            FileExistsError: it exists and may not be overwritten.
        """
        write_concept(vars(self), path, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a concept.

        Raises:
            UsageError: there is no such file.
            IntegrityError: it is not a concept, or damaged.
        """
        return cls(**read_concept(path))
