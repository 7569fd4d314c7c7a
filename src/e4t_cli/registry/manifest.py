"""domain.toml: what a pack says about itself, read with suspicion.

A pack (the weights of one domain for one base) is a folder: domain.toml beside the files that its
[files] table names, each with its sha256.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from e4t_cli.errors import IntegrityError, printable
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import check_file_name, check_name

SCHEMA = 1
MAX_BYTES = 1_000_000

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(max_length=100), AfterValidator(check_file_name)]
"""A plain name inside the pack's own folder, of a kind that cannot hold code."""
Text = Annotated[str, Field(max_length=2000)]


class Manifest(BaseModel):
    """The contents of a domain.toml; a key that is not here is an error, not a surprise.

    What has a default may be missing: the first packs were written without it.

    Args:
        base_revision: of the base, as its base.toml or its hub commit says.
        base_config_hash: of the configs of U-Net, text encoder and tower; see `bases.config_hash`.
        image_tower: which CLIP tower the encoder reads, for people.
        files, sizes: of each file its sha256, and its length in bytes.
        limits: what the domain cannot do, for people.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Annotated[int, Field(alias="schema", ge=SCHEMA, le=SCHEMA)]
    name: str
    descriptor: Annotated[str, Field(min_length=1, max_length=100)]
    base: str
    base_fingerprint: Annotated[str, Field(max_length=200)]
    base_revision: Annotated[str, Field(max_length=200)] = ""
    base_config_hash: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    image_tower: Annotated[str, Field(max_length=200)] = ""
    tuning: Annotated[TuningConfig, PlainValidator(TuningConfig.from_dict)]
    pretraining: Annotated[PretrainingConfig, PlainValidator(PretrainingConfig.from_dict)]
    files: dict[FileName, Sha256] = {}
    sizes: dict[FileName, Annotated[int, Field(ge=0)]] = {}
    encoder: dict[str, Any] = {}
    templates: list[str] = []
    images: Annotated[int, Field(ge=0)] = 0
    licence: Text = ""
    limits: Text = ""
    notes: Text = ""

    @field_validator("name", "base")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        return check_name(value, "name")

    @field_validator("templates")
    @classmethod
    def _hold_one_place(cls, value: list[str]) -> list[str]:
        for template in value:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} must contain '{{}}' exactly once")
        return value

    @model_validator(mode="after")
    def _sizes_are_of_files(self) -> Manifest:
        stray = sorted(set(self.sizes) - set(self.files))
        if stray:
            raise ValueError(f"sizes names {stray[0]!r}, which files does not")
        return self


def read_manifest(path: Path) -> Manifest:
    """Read and check a domain.toml.

    Raises:
        IntegrityError: it is too large, not TOML, of a newer schema, or says something unknown.
    """
    shown = printable(str(path))
    try:
        with path.open("rb") as file:
            return parse_manifest(file.read(MAX_BYTES + 1), shown)
    except OSError as error:
        raise IntegrityError(f"{shown} cannot be read: {error.strerror}") from error


def parse_manifest(data: bytes, shown: str) -> Manifest:
    """Check the content of a domain.toml.

    Args:
        data: of which no more than `MOST_BYTES` + 1 bytes need to have been read.
        shown: what to call it in a message.

    Raises:
        IntegrityError: as `read_manifest`.
    """
    if len(data) > MAX_BYTES:
        raise IntegrityError(f"{shown} is larger than a manifest can be")
    try:
        table: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise IntegrityError(f"{shown} is not TOML: {printable(str(error))}") from error
    schema = table.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise IntegrityError(
            f"{shown} was written by a newer e4t (schema {schema}; this one reads {SCHEMA})",
            hint="pip install --upgrade e4t",
        )
    try:
        return Manifest.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "its contents"
        raise IntegrityError(
            f"{shown} cannot be used: {printable(where)}: {printable(first['msg'])}"
        ) from error


def toml_text(card: Mapping[str, Any]) -> str:
    """Return TOML for a flat mapping and one level of tables below it."""

    def line(key: str, value: Any) -> str:
        # JSON's strings, numbers, booleans and arrays of them are TOML's too, but for two things:
        # TOML has no escapes in pairs, and no bare DEL.
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return f"{json.dumps(key) if '.' in key else key} = {text}"

    plain = [line(key, value) for key, value in card.items() if not isinstance(value, Mapping)]
    for name, table in card.items():
        if isinstance(table, Mapping):
            plain += ["", f"[{name}]", *(line(key, value) for key, value in table.items())]
    return "\n".join(plain) + "\n"
