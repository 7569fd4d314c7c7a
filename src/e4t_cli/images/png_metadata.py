"""Writes and reads how an image was generated, as metadata of its PNG.

`parameters` is the text of AUTOMATIC1111's web UI, which many programs read; `e4t` is JSON, enough to generate the
image again; the XMP packet with IPTC's mark of generated images is always written. Neither the photo nor any path or
user name is stored, nor the name of any file but those of add-ons to the base, by which other programs know them.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from e4t_cli import __version__
from e4t_cli.errors import InputError

SCHEMA = 1
AI_MARK = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_XMP_KEYWORD = "XML:com.adobe.xmp"
_SOFTWARE = f"e4t {__version__}"
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    ' xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' xmp:CreatorTool="{_SOFTWARE}" Iptc4xmpExt:DigitalSourceType="{AI_MARK}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
# Keys of the JSON since version 0.1, which stay as they are.
KEYS_IN_FILES = {"concept_scale": "strength", "weights_fingerprint": "pack_fingerprint"}
# Scheduler -> the web UI's sampler and its schedule, those with the nearest noise levels at 20 steps; docs/commands.md
# has the differences. None: the schedule with the scheduler's time steps, "": that sampler has none. The web UI has no
# DDPM, and would take any other name for "DPM++ 2M".
WEB_UI_SAMPLERS: dict[str, tuple[str, str | None]] = {
    "dpm++": ("DPM++ 2M", "Simple"),
    "dpm++-karras": ("DPM++ 2M", "Karras"),
    "ddim": ("DDIM", ""),
    "ddpm": ("", ""),
    "euler": ("Euler", None),
    "euler-a": ("Euler a", None),
    "heun": ("Heun", None),
    "pndm": ("PLMS", ""),
    "unipc": ("UniPC", ""),
}
_WEB_UI_SCHEDULES = {"leading": "DDIM", "linspace": "Uniform", "trailing": "Simple"}


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
    prompt_weights: bool = False  # whether brackets in both prompts are weights of words
    placeholder: str = "S*"  # the spelling of the concept in the prompt
    timestep_spacing: str = "leading"  # diffusers' word for how the scheduler distributes its steps
    domain: str = ""
    domain_base: str = ""  # that the domain weights were trained for, where it is another than `base`
    base: str = ""
    base_fingerprint: str = ""
    weights_fingerprint: str = ""
    photo_sha256: str = ""  # of the photo's bytes; the photo itself is not stored
    other_photos_sha256: Sequence[str] = ()  # of further photos of the same subject
    addons: Sequence[Mapping[str, Any]] = ()  # LoRAs, words and a VAE beside the base: `hub.addons.Addon.as_dict()`
    tuning: Mapping[str, Any] = field(default_factory=dict)  # `TuningConfig.as_dict()`, and the seed
    versions: Mapping[str, str] = field(default_factory=package_versions)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values under the keys of the file."""
        found = asdict(self)
        # Of earlier pictures' records they are no part.
        for name in ("domain_base", "addons", "prompt_weights", "other_photos_sha256"):
            if not found[name]:
                del found[name]
        values = {KEYS_IN_FILES.get(name, name): value for name, value in found.items()}
        return {"schema": SCHEMA, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that `as_dict` wrote; keys of a newer version are left out.

        Raises:
            InputError: an entry is missing or of another type.
        """
        if values.get("schema") != SCHEMA:
            raise InputError("the record in this picture is of a newer e4t", hint="upgrade e4t")
        found = {}
        for one in fields(cls):
            key = KEYS_IN_FILES.get(one.name, one.name)
            if key in values:
                kinds = _KINDS[str(one.type).partition("[")[0]]
                if not isinstance(values[key], kinds) or isinstance(values[key], bool) != (kinds is bool):
                    raise InputError(f"the record in this picture is damaged: its {key} is of the wrong type")
                found[one.name] = values[key]
            elif one.default is MISSING and one.default_factory is MISSING:
                raise InputError(f"the record in this picture is damaged: it has no {key}")
        return cls(**found)

    def parameters(self) -> str:
        """Return the web UI's text; brackets that are no weights are escaped, or they would be weights there."""
        sampler, schedule = WEB_UI_SAMPLERS.get(self.scheduler, (self.scheduler, ""))
        pairs = {
            "Steps": self.steps,
            "Sampler": sampler,
            "Schedule type": _WEB_UI_SCHEDULES.get(self.timestep_spacing, "") if schedule is None else schedule,
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.base_fingerprint[:10],
            "Model": "+".join(part for part in (self.base, self.domain) if part),
            "VAE hash": "".join(one["sha256"][:10] for one in self.addons if one["kind"] == "vae"),
            "VAE": "".join(one["name"] for one in self.addons if one["kind"] == "vae"),
            "Lora hashes": self._hashes("lora"),
            "TI hashes": self._hashes("embedding"),
            "Concept strength": f"{self.concept_scale:g}" if self.concept_scale != 1 else "",
            "Version": _SOFTWARE,
        }
        prompt, negative = self.prompt, self.negative_prompt
        if not self.prompt_weights:
            prompt, negative = (re.sub(r"[\\()\[\]]", r"\\\g<0>", text) for text in (prompt, negative))
        negative = f"Negative prompt: {negative}\n" if negative else ""
        settings = ", ".join(f"{k}: {_quoted(v)}" for k, v in pairs.items() if v != "")
        loras = "".join(f" <lora:{_plain(one)}:{one['scale']:g}>" for one in self.addons if one["kind"] == "lora")
        return f"{prompt}{loras}\n{negative}{settings}"

    def _hashes(self, kind: str) -> str:
        return ", ".join(f"{_plain(one)}: {one['sha256'][:12]}" for one in self.addons if one["kind"] == kind)


def _plain(addon: Mapping[str, Any]) -> str:
    """Return the name of an add-on as the web UI lists it, without what ends a name there."""
    return re.sub(r"[:,<>\n]", "", str(addon.get("word") or addon["name"]))


_KINDS: dict[str, Any] = {
    "str": str,
    "bool": bool,
    "int": int,
    "float": int | float,
    "Mapping": dict,
    "Sequence": list,
}  # of the fields in JSON


@dataclass(frozen=True)
class ImageMetadata:
    """The metadata of a PNG; None where it has none."""

    parameters: str | None  # the web UI's text
    details: dict[str, Any] | None  # e4t's JSON; a contact sheet's has the list `pictures`
    ai_generated: bool  # whether the mark of generated images is there
    by_e4t: bool = False  # whether e4t wrote the file


def png_bytes(
    image: Image.Image, record: GenerationRecord | Sequence[GenerationRecord] | None, *, metadata: bool = True
) -> bytes:
    """Encode an image as PNG.

    Args:
        record: of a generated image, or of each image of a contact sheet; None for a picture that is not generated.
        metadata: False writes no record, only the AI mark.
    """
    info = PngInfo()
    if record is None:
        info.add_text("Software", _SOFTWARE)
    else:
        if metadata and isinstance(record, GenerationRecord):
            info.add_text("parameters", record.parameters())
            info.add_text("e4t", json.dumps(record.as_dict(), sort_keys=True))
        elif metadata and not isinstance(record, GenerationRecord):
            records = {"schema": SCHEMA, "pictures": [one.as_dict() for one in record]}
            info.add_text("e4t", json.dumps(records, sort_keys=True))
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
    xmp = text.get(_XMP_KEYWORD, "")
    own = text.get("Software", "").startswith("e4t ") or 'xmp:CreatorTool="e4t ' in xmp
    return ImageMetadata(text.get("parameters"), details, ai_generated=AI_MARK in xmp, by_e4t=own)


def read_records(png: bytes) -> list[GenerationRecord]:
    """Return the record of a generated image, or those of all images of a contact sheet.

    Raises:
        InputError: there is none, or it is damaged.
    """
    found = read_metadata(png)
    if found.details is None:
        hint = "give the prompt, --seed and the other options themselves"
        if found.by_e4t and found.ai_generated:
            raise InputError("this picture was saved with --no-metadata: it does not say how it was made", hint=hint)
        raise InputError("this picture has no record of e4t: it does not say how to draw it again", hint=hint)
    several = found.details.get("pictures")
    records = several if isinstance(several, list) else [found.details]
    if not all(isinstance(one, dict) for one in records):
        raise InputError("the record in this picture is damaged")
    if not all("prompt" in one for one in records):  # of --no-metadata up to version 0.2
        raise InputError("this picture was saved without its prompt", hint="give the prompt, and --seed")
    return [GenerationRecord.from_dict(one) for one in records]


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text
