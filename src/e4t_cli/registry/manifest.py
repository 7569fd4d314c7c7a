"""Reads, checks and writes domain.toml, the manifest of a domain folder.

A domain folder holds the weights of one domain for one base: domain.toml beside the files that its [files] table
lists, each with its SHA-256. Manifests come from strangers; nothing is trusted.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from e4t_cli.errors import IntegrityError, printable
from e4t_cli.files import holds_only
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import check_file_name, check_name, check_template

MANIFEST_NAME = "domain.toml"
SCHEMA = 1
MAX_BYTES = 65_536  # real ones have 2,000; tomllib takes minutes for a megabyte that is made for it
# More than any data set has, and than any disk has room for.
MAX_IMAGES, MAX_LENGTH, MAX_FILES = 10**10, 1 << 38, 64

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, AfterValidator(partial(check_name, what="name"))]
FileName = Annotated[str, Field(max_length=100), AfterValidator(check_file_name)]
Text = Annotated[str, Field(max_length=2000)]
ShortText = Annotated[str, Field(max_length=200)]


class Manifest(BaseModel):
    """The contents of a domain.toml; unknown keys are errors.

    Fields with a default may be missing: the first manifests were written without them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Annotated[int, Field(alias="schema", ge=SCHEMA, le=SCHEMA)]
    name: Name
    descriptor: Annotated[str, Field(min_length=1, max_length=100)]
    base: Name
    base_fingerprint: ShortText
    base_revision: ShortText = ""  # from its base.toml, or its hub commit
    # Of the configs of U-Net, text encoder and image encoder.
    base_config_hash: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    image_tower: ShortText = ""  # the CLIP image encoder that the features come from, for people
    tuning: Annotated[TuningConfig, PlainValidator(TuningConfig.from_dict)]
    pretraining: Annotated[PretrainingConfig, PlainValidator(PretrainingConfig.from_dict)]
    files: Annotated[dict[FileName, Sha256], Field(max_length=MAX_FILES)] = {}
    sizes: dict[FileName, Annotated[int, Field(ge=0, le=MAX_LENGTH)]] = {}  # bytes
    encoder: dict[str, Any] = {}
    templates: list[Annotated[str, AfterValidator(check_template)]] = []
    images: Annotated[int, Field(ge=0, le=MAX_IMAGES)] = 0
    licence: Text = ""
    limits: Text = ""  # what the domain cannot do, for people
    notes: Text = ""

    @model_validator(mode="after")
    def _check_sizes(self) -> Manifest:
        if stray := sorted(set(self.sizes) - set(self.files)):
            raise ValueError(f"sizes names {stray[0]!r}, which files does not")
        return self


def read_manifest(path: Path) -> Manifest:
    """Read and check a domain.toml; IntegrityError if it is too large, not TOML, or has invalid contents."""
    shown = printable(str(path))
    try:
        with path.open("rb") as file:
            return parse_manifest(file.read(MAX_BYTES + 1), shown)
    except OSError as error:
        raise IntegrityError(f"{shown} cannot be read: {error.strerror}") from error


def parse_manifest(data: bytes, shown: str) -> Manifest:
    """Check the content of a domain.toml, `shown` in messages, of which `MAX_BYTES` + 1 bytes at most were read."""
    if len(data) > MAX_BYTES:
        raise IntegrityError(f"{shown} is larger than a manifest can be")
    try:
        table: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise IntegrityError(f"{shown} is not TOML: {printable(str(error))}") from error
    schema = table.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        newer = f"{shown} was written by a newer e4t (schema {schema}; this one reads {SCHEMA})"
        raise IntegrityError(newer, hint="pip install --upgrade e4t")
    try:
        return Manifest.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "its contents"
        raise IntegrityError(f"{shown} cannot be used: {printable(where)}: {printable(first['msg'])}") from error


def is_domain_folder(folder: Path) -> bool:
    """Whether a folder is a domain's, with nothing else in it: weights, and the logs of their pre-training."""
    try:
        files = read_manifest(folder / MANIFEST_NAME).files
    except IntegrityError:
        return False
    return holds_only(folder, {MANIFEST_NAME, *files, "unet.safetensors", "training", "README.md"})


def toml_text(manifest: Mapping[str, Any]) -> str:
    """Return TOML for a flat mapping and one level of tables below it."""

    def line(key: str, value: Any) -> str:
        # JSON's strings, numbers, booleans and arrays of them are valid TOML with two exceptions: TOML has no
        # surrogate escapes, and no bare DEL.
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return f"{json.dumps(key) if '.' in key else key} = {text}"

    lines = [line(key, value) for key, value in manifest.items() if not isinstance(value, Mapping)]
    for name, table in manifest.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]", *(line(key, value) for key, value in table.items())]
    return "\n".join(lines) + "\n"
