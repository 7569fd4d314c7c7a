"""A concept: one personalized subject, and its `.e4t` file.

The prepared images, their image features (so that no image tower is needed again), the config and the seed are enough
to repeat the tuning bit for bit, in seconds. The tuned weights can be stored too, which saves those seconds. The file
is a safetensors file with JSON in its header. Reading is strict: no entry missing or unknown, every value finite.

The file of one photo has schema 1, as ever. Schema 2 has several: `image.1`, `mask.1`, … beside `image` and `mask`.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from e4t_cli.errors import E4TError, InputError, IntegrityError, UsageError, printable
from e4t_cli.files import write_atomically
from e4t_cli.formats.recognition import recognize
from e4t_cli.hub.addons import Addon, check_same
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.fingerprints import is_recorded
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.adapters import merge_lora
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import PreparedImage, check_name

SCHEMA, SCHEMA_OF_SEVERAL = 1, 2
# Entries of the header; their values are text, but for the seed.
_REQUIRED = (
    "domain", "descriptor", "base_name", "base_fingerprint", "pack_digest", "seed", "image_sha256", "placeholder",
)  # fmt: skip
_OPTIONAL = ("package", "photo", "domain_base")
_FIELDS = {"pack_digest": "weights_digest"}  # entry -> field of `Concept`, where the names differ


@dataclass(frozen=True, kw_only=True, eq=False)
class Concept:
    """The result of personalization, which can be saved, and generated from again.

    Args:
        domain, descriptor, weights_digest: whose encoder encoded the image.
        base_name, base_fingerprint: the base it was tuned on.
        prepared: the square image and its mask, of the first photo.
        others: those of further photos of the same subject.
        image_features: by the domain's encoder (vectors, width), float32; of several photos their mean.
        config, seed: of the tuning.
        image_sha256: of the user's file, "" if there was none.
        others_sha256: of the other photos' files.
        placeholder: the concept's token in prompts.
        photo: what preparation found in the photo and changed, such as "1 face, turned 4°".
        package: the distribution that the domain came with, "user" for a user domain, or "".
        domain_base: the base that the domain weights were trained for, where that is another than `base_name`.
        addons: the LoRAs and the VAE that the base had.
        weights: the tuned tensors, if they are stored; see `weights_of` and `tuned`.
    """

    domain: str
    descriptor: str
    base_name: str
    base_fingerprint: str
    weights_digest: str
    prepared: PreparedImage
    image_features: Tensor
    config: TuningConfig
    seed: int
    image_sha256: str = ""
    placeholder: str = "S*"
    photo: str = ""
    package: str = ""
    domain_base: str = ""
    addons: Sequence[Addon] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    others: Sequence[PreparedImage] = ()
    others_sha256: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.others) != len(self.others_sha256):
            raise ValueError("each of the other photos has a SHA-256, and each SHA-256 a photo")

    @property
    def photos(self) -> tuple[PreparedImage, ...]:
        """All photos that it is tuned on, at least one."""
        return self.prepared, *self.others

    @property
    def photos_sha256(self) -> tuple[str, ...]:
        """The SHA-256 of each photo's file."""
        return self.image_sha256, *self.others_sha256

    def check(self, model: TextToImageModel, pretrained: DomainWeights) -> None:
        """Raise IntegrityError for another base or other domain weights than the concept was made with."""
        if not is_recorded(model.base, self.base_fingerprint):
            wanted = f"{self.base_name} ({self.base_fingerprint[:12]})"
            here = f"{model.base.name} ({model.weights_fingerprint[:12]})"
            message = f"this concept lives on the base {wanted}, not on this {here}"
            raise IntegrityError(message, hint="personalize the picture again on this base")
        check_same(self.addons, model.addons, "this concept")
        if pretrained.digest != self.weights_digest:
            digests = f"({self.weights_digest[:12] or 'unsaved'}, here: {pretrained.digest[:12]})"
            message = f"this concept was made with another version of the {self.domain} weights {digests}"
            raise IntegrityError(message, hint="personalize the picture again")
        pretrained.check_features(self.image_features)

    @staticmethod
    def weights_of(tuned: TunedModel) -> dict[str, Tensor]:
        """Return the tensors of a tuned model, for `weights`."""
        if tuned.adapters:  # megabytes: the rest is in the base and in the domain weights
            return {f"adapters.{key}": value for key, value in tuned.adapters.items()}
        assert isinstance(tuned.encoder, nn.Module)
        tensors = {f"unet.{key}": value for key, value in tuned.unet.state_dict().items()}
        tensors |= {f"encoder.{key}": value for key, value in tuned.encoder.state_dict().items()}
        # An encoder reduced by `for_inference` cannot encode the image again.
        tensors["folded"] = tuned.encoded_image
        return {key: value.detach().cpu() for key, value in tensors.items()}

    def tuned(self, model: TextToImageModel, pretrained: DomainWeights) -> TunedModel | None:
        """Return the tuned model from the stored weights, or None if there are none.

        Raises:
            IntegrityError: another base, other domain weights, or tensors that do not fit.
        """
        if not self.weights:
            return None
        self.check(model, pretrained)
        adapters = self._part("adapters")
        unet: UNet2DConditionModel
        encoder: Any  # an nn.Module that is an Encoder: there are no intersection types
        try:
            if adapters:
                unet, encoder = merge_lora(
                    model.unet, pretrained.offsets, pretrained.encoder, adapters, dtype=model.tuned_dtype
                )
            else:
                # torch's `to`: diffusers' logs a warning about casts that are intended.
                unet = copy.deepcopy(model.unet)
                nn.Module.to(unet, model.tuned_dtype)
                encoder = copy.deepcopy(pretrained.encoder.for_inference())
                unet.load_state_dict(self._part("unet"))
                encoder.load_state_dict(self._part("encoder"))
        except (RuntimeError, ValueError) as error:
            raise IntegrityError(f"the concept's weights do not fit its base: {error}") from error
        encoder.to(model.device).requires_grad_(False)
        token = model.descriptor_id(self.descriptor)
        encoded_image = self.weights.get("folded")
        if encoded_image is None:  # of adapters, or of a file from before `for_inference`
            with torch.no_grad():
                encoded_image = encoder.encode_image(self.image_features[None].to(model.device))
        return TunedModel(
            unet=unet, encoder=encoder.for_inference(), encoded_image=encoded_image.to(model.device),
            e_domain=model.word_embedding(token), descriptor_id=token,
            scale=pretrained.embedding_scale, adapters=adapters,
        )  # fmt: skip

    def _part(self, part: str) -> dict[str, Tensor]:
        """Return one part's tensors from the stored weights."""
        prefix = f"{part}."
        return {key.removeprefix(prefix): value for key, value in self.weights.items() if key.startswith(prefix)}

    def save(self, path: str | Path, *, overwrite: bool = True) -> None:
        """Write the concept to one file; raises FileExistsError if it exists and may not be overwritten."""
        features = self.image_features.float().cpu()
        if torch.equal(features.half().float(), features):
            features = features.half()
        tensors = {"image_features": features}
        for number, photo in enumerate(self.photos):
            suffix = f".{number}" if number else ""
            tensors[f"image{suffix}"] = torch.from_numpy(numpy.array(photo.image))
            if photo.mask is not None:
                tensors[f"mask{suffix}"] = torch.from_numpy(numpy.array(photo.mask))
        tensors |= {f"weights.{key}": value for key, value in self.weights.items()}
        header = {
            "schema": SCHEMA_OF_SEVERAL if self.others else SCHEMA,
            **{key: getattr(self, _FIELDS.get(key, key)) for key in _REQUIRED},
            **{key: getattr(self, key) for key in _OPTIONAL if getattr(self, key)},
            **({"others_sha256": list(self.others_sha256)} if self.others else {}),
            **({"addons": [one.as_dict() for one in self.addons]} if self.addons else {}),
            "recipe": self.config.as_dict(),
        }
        data = save({k: v.contiguous() for k, v in tensors.items()}, {"e4t": json.dumps(header)})
        write_atomically(path, data, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a concept; raises UsageError, InputError or IntegrityError if there is none, it is none, or damaged."""
        path = Path(path)
        if not os.path.isfile(path):
            raise UsageError(f"there is no concept {printable(str(path))}", hint="make one: e4t personalize … --save")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["e4t"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return cls._from_file(header, tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError, RuntimeError) as error:
            raise _unusable(path, error) from error

    @classmethod
    def _from_file(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        if not isinstance(header, dict):
            raise ValueError("its header is no table")
        schema = header.pop("schema", None)
        if type(schema) is not int or schema not in (SCHEMA, SCHEMA_OF_SEVERAL):
            raise ValueError("its schema is unknown; a newer e4t may read it")
        config = TuningConfig.from_dict(header.pop("recipe"))
        addons = tuple(Addon.from_dict(one) for one in header.pop("addons", ()))
        digests = header.pop("others_sha256") if schema == SCHEMA_OF_SEVERAL else []
        listed = isinstance(digests, list) and all(isinstance(one, str) for one in digests)
        if not listed or bool(digests) != (schema == SCHEMA_OF_SEVERAL):
            raise ValueError("its photos are not listed as they should be")
        if set(header) - set(_OPTIONAL) != set(_REQUIRED):
            raise ValueError("its header has other entries than a concept's")
        check_name(header["domain"])
        for key, value in header.items():
            if type(value) is not (int if key == "seed" else str):
                raise ValueError(f"its {key} is of the wrong kind")
        if not 0 <= header["seed"] < 1 << 32:
            raise ValueError("its seed is out of range")
        for key, values in tensors.items():
            if values.is_floating_point() and not values.isfinite().all():
                raise ValueError(f"{key} has numbers that are not finite")
        prepared, *others = (_photo(tensors, f".{number}" if number else "") for number in range(1 + len(digests)))
        features = tensors.pop("image_features").float()
        if features.dim() != 2 or any(not key.startswith("weights.") for key in tensors):
            raise ValueError("it holds other tensors than a concept")
        weights = {key.removeprefix("weights."): value for key, value in tensors.items()}
        fields = {_FIELDS.get(key, key): value for key, value in header.items()}
        return cls(
            prepared=prepared, others=tuple(others), others_sha256=tuple(digests), image_features=features,
            config=config, weights=weights, addons=addons, **fields,
        )  # fmt: skip


def _photo(tensors: dict[str, Tensor], suffix: str) -> PreparedImage:
    """Take one photo and its mask out of a file's tensors."""
    mask = Image.fromarray(tensors.pop(f"mask{suffix}").numpy()) if f"mask{suffix}" in tensors else None
    return PreparedImage(image=Image.fromarray(tensors.pop(f"image{suffix}").numpy()), mask=mask)


def _unusable(path: Path, error: Exception) -> E4TError:
    """Return the error for a file that is another than a concept (InputError), or is a damaged one."""
    kind = IntegrityError if path.suffix == ".e4t" else InputError  # a concept by its name
    shown, hint = printable(str(path)), "make a concept: e4t personalize … --save me.e4t"
    try:
        found = recognize(path)
    except InputError as other:
        return kind(other.message, hint=hint)
    except IntegrityError as other:
        if isinstance(error, SafetensorError):
            return other
    else:
        if found.type != "concept":
            return kind(f"{shown} is no concept: its type is {found.type!r}", hint=hint)
    return IntegrityError(f"{shown} is not a usable concept: {printable(str(error))}")
