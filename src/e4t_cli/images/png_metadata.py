"""Writes and reads how an image was generated, as metadata of its PNG.

`parameters` is the text of AUTOMATIC1111's web UI, which many programs read; `e4t` is JSON, enough to generate the
image again; the XMP packet with IPTC's mark of generated images is always written. Neither the photo nor any path or
user name is stored.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from e4t_cli import __version__
from e4t_cli.errors import InputError

SCHEMA = 1
AI_MARK = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_XMP_KEYWORD = "XML:com.adobe.xmp"
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    ' xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' xmp:CreatorTool="e4t {__version__}" Iptc4xmpExt:DigitalSourceType="{AI_MARK}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
# Keys of the JSON since version 0.1, which stay as they are.
KEYS_IN_FILES = {"concept_scale": "strength", "weights_fingerprint": "pack_fingerprint"}


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that an image's pixels depend on."""
    versions = {"e4t": __version__}
    for package in ("torch", "diffusers", "transformers", "open_clip_torch"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """How one image was generated."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    scheduler: str
    width: int  # in pixels, as the height
    height: int
    negative_prompt: str = ""
    concept_scale: float = 1.0
    placeholder: str = "S*"  # the spelling of the concept in the prompt
    domain: str = ""
    base: str = ""
    base_fingerprint: str = ""
    weights_fingerprint: str = ""
    photo_sha256: str = ""  # of the photo's bytes; the photo itself is not stored
    tuning: Mapping[str, Any] = field(default_factory=dict)  # `TuningConfig.as_dict()`, and the seed
    versions: Mapping[str, str] = field(default_factory=package_versions)

    def as_dict(self, *, include_prompts: bool = True) -> dict[str, Any]:
        """Return plain values under the keys of the file, with or without the prompts."""
        values = {KEYS_IN_FILES.get(name, name): value for name, value in asdict(self).items()}
        if not include_prompts:
            del values["prompt"], values["negative_prompt"]
        return {"schema": SCHEMA, **values}

    def parameters(self) -> str:
        """Return the web UI's text."""
        pairs = {
            "Steps": self.steps,
            "Sampler": self.scheduler,
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.base_fingerprint[:10],
            "Model": "+".join(part for part in (self.base, self.domain) if part),
            "Concept strength": f"{self.concept_scale:g}" if self.concept_scale != 1 else "",
            "Version": f"e4t {__version__}",
        }
        negative = f"Negative prompt: {self.negative_prompt}\n" if self.negative_prompt else ""
        settings = ", ".join(f"{k}: {_quoted(v)}" for k, v in pairs.items() if v != "")
        return f"{self.prompt}\n{negative}{settings}"


@dataclass(frozen=True)
class ImageMetadata:
    """The metadata of a PNG; None where it has none."""

    parameters: str | None  # the web UI's text
    details: dict[str, Any] | None  # e4t's JSON; a contact sheet's has the list `pictures`
    ai_generated: bool  # whether the mark of generated images is there


def png_bytes(
    image: Image.Image, record: GenerationRecord | Sequence[GenerationRecord], *, include_prompts: bool = True
) -> bytes:
    """Encode an image, or a contact sheet with a record for each of its images."""
    info = PngInfo()
    if isinstance(record, GenerationRecord):
        details = record.as_dict(include_prompts=include_prompts)
        if include_prompts:
            info.add_text("parameters", record.parameters())
    else:
        details = {"schema": SCHEMA, "pictures": [one.as_dict(include_prompts=include_prompts) for one in record]}
    info.add_text("e4t", json.dumps(details, sort_keys=True))
    # Pillow ignores `xmp=` for PNG; readers look for exactly this keyword, uncompressed.
    info.add_itxt(_XMP_KEYWORD, _XMP, zip=False)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_metadata(png: bytes) -> ImageMetadata:
    """Read what `png_bytes` wrote.

    Raises:
        InputError: it is not a PNG, or its JSON is invalid.
    """
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            assert isinstance(image, PngImageFile)
            image.load()  # text may follow the pixels
            text: dict[str, str] = dict(image.text)
    except Exception as error:  # hostile bytes make the decoder raise any exception
        raise InputError("this is not a readable PNG") from error
    try:
        details = json.loads(text.get("e4t", "null"))
    except (ValueError, RecursionError) as error:
        raise InputError("the e4t text in this PNG is damaged") from error
    details = details if isinstance(details, dict) else None
    return ImageMetadata(text.get("parameters"), details, ai_generated=AI_MARK in text.get(_XMP_KEYWORD, ""))


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text
