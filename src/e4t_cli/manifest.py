"""domain.toml: what a pack says about itself, read with suspicion.

A pack (the weights of one domain for one base) is a folder: domain.toml beside the files that its
[files] table names, each with its sha256.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator

from .domain import PretrainingRecipe, TuningRecipe, check_name
from .errors import IntegrityError, printable

SCHEMA = 1
MOST_BYTES = 1_000_000

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
"""A plain name inside the pack's own folder: no separator, no drive, no leading dot."""


class Manifest(BaseModel):
    """The contents of a domain.toml; a key that is not here is an error, not a surprise."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Annotated[int, Field(alias="schema", ge=SCHEMA, le=SCHEMA)]
    name: str
    descriptor: Annotated[str, Field(min_length=1, max_length=100)]
    base: str
    base_fingerprint: Annotated[str, Field(max_length=200)]
    tuning: Annotated[TuningRecipe, PlainValidator(TuningRecipe.from_dict)]
    pretraining: Annotated[PretrainingRecipe, PlainValidator(PretrainingRecipe.from_dict)]
    files: dict[FileName, Sha256] = {}
    encoder: dict[str, Any] = {}
    templates: list[str] = []
    images: Annotated[int, Field(ge=0)] = 0
    licence: str = ""
    notes: str = ""

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


def read_manifest(path: Path) -> Manifest:
    """Read and check a domain.toml.

    Raises:
        IntegrityError: it is too large, not TOML, of a newer schema, or says something unknown.
    """
    shown = printable(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise IntegrityError(f"{shown} is larger than a manifest can be")
        table: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise IntegrityError(f"{shown} cannot be read: {error.strerror}") from error
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
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise IntegrityError(
            f"{shown} cannot be used: {printable(where)}: {printable(first['msg'])}"
        ) from error
