"""What users add to a base: LoRAs, textual inversions, another VAE. Which files, and what is recorded of them.

Only headers are read here and torch is not imported: a wrong file is refused before a base is loaded or fetched.
`formats.addons` applies them. A1111's web UI writes hashes of such files into its images; its source says how:
of a LoRA SHA-256 of what follows the header (so that a changed description is no other LoRA), of a textual inversion
that of the whole file, both cut to 12 digits, and of a VAE 10.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from e4t_cli.errors import IntegrityError, UsageError, printable
from e4t_cli.hub.addon_files import (
    OPTIONS,
    EmbeddingFile,
    LoraFile,
    check_lora,
    hash_of,
    is_repository,
    not_downloaded,
    vae_file,
    word_of,
)
from e4t_cli.hub.single_file import SUFFIXES

_NAMES = {"lora": "LoRA", "embedding": "embedding", "vae": "VAE"}


@dataclass(frozen=True, kw_only=True)
class Addon:
    """What is recorded of one file: enough to tell it from another.

    Args:
        kind: "lora", "embedding" or "vae".
        name: of the file, without its folder; A1111's name of it.
        sha256: see above.
        scale: of a LoRA.
        word: of a textual inversion, in prompts.
        source: "owner/name@commit" of a VAE that was fetched from the hub.
    """

    kind: str
    name: str
    sha256: str
    scale: float = 1.0
    word: str = ""
    source: str = ""

    def __str__(self) -> str:
        of = f":{self.scale:g}" if self.kind == "lora" else f" ({self.word})" if self.word else ""
        return printable(f"the {_NAMES[self.kind]} {self.name[:60]}{of} [{self.sha256[:12]}]")

    @property
    def option(self) -> str:
        """What adds it, on the command line."""
        if self.source:
            return f"{OPTIONS[self.kind]} {shlex.quote(printable(self.source))}"
        file = self.name[:60] + ("" if self.kind == "vae" else ".safetensors")
        of = f":{self.scale:g}" if self.kind == "lora" else f":{self.word}" if self.word else ""
        return f"{OPTIONS[self.kind]} {shlex.quote(printable(file + of))}"

    @property
    def identity(self) -> tuple[str, str, float, str]:
        """What it does to a base, whatever its file is called."""
        return self.kind, self.sha256, self.scale, self.word

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        values: dict[str, Any] = {"kind": self.kind, "name": self.name, "sha256": self.sha256}
        values |= {"source": self.source} if self.source else {}
        return values | ({"scale": self.scale} if self.kind == "lora" else {"word": self.word} if self.word else {})

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return what `as_dict` wrote; raises ValueError if it is something else."""
        kinds: dict[str, Any] = {
            "kind": str,
            "name": str,
            "sha256": str,
            "scale": (int, float),
            "word": str,
            "source": str,
        }
        if not isinstance(values, Mapping) or not {"kind", "name", "sha256"} <= set(values) <= set(kinds):
            raise ValueError("an add-on has other entries than e4t writes")
        if not all(isinstance(value, kinds[key]) for key, value in values.items()) or values["kind"] not in OPTIONS:
            raise ValueError("an add-on has an entry of another kind than e4t writes")
        return cls(**values)


def check_same(recorded: Iterable[Addon], given: Iterable[Addon], what: str) -> None:
    """Raise IntegrityError unless the LoRAs and the VAE are the same; `what` begins the message.

    Words are not compared: no prompt of tuning has one (`Session.load`), so that a concept is the same with any.
    """
    then, now = ([one for one in some if one.kind != "embedding"] for some in (recorded, given))
    missing = [one for one in then if one.identity not in {other.identity for other in now}]
    extra = [one for one in now if one.identity not in {other.identity for other in then}]
    if missing:
        instead = f", not with {' and '.join(map(str, extra))}" if extra else ", which is not given"
        message = f"{what} was made with {' and '.join(map(str, missing))}{instead}"
        raise IntegrityError(message, hint=f"add {' '.join(one.option for one in missing)}")
    if extra:
        flags = " and ".join(dict.fromkeys(OPTIONS[one.kind] for one in extra))
        message = f"{what} was made without {' and '.join(map(str, extra))}"
        raise IntegrityError(message, hint=f"leave {flags} out, or personalize the picture again with it")


@dataclass(frozen=True, kw_only=True)
class BaseAddons:
    """What is added to a base after it was loaded; false if that is nothing.

    Args:
        loras: merged into the U-Net and the text encoder, all of them.
        embeddings: words that prompts may have.
        vae: a file or a folder, instead of the base's.
        vae_source: "owner/name[@revision]" of the hub; `hub.vae.fetch_addons` fetches it and sets `vae`.
    """

    loras: tuple[LoraFile, ...] = ()
    embeddings: tuple[EmbeddingFile, ...] = ()
    vae: Path | None = None
    vae_source: str = ""

    def __bool__(self) -> bool:
        return bool(self.loras or self.embeddings or self.vae or self.vae_source)

    @classmethod
    def parse(
        cls, *, loras: Iterable[str] = (), embeddings: Iterable[str] = (), vae: str | os.PathLike[str] | None = None
    ) -> Self:
        """Return the add-ons of the command line: "FILE[:SCALE]", "FILE[:WORD]"; a file, a folder or a repository.

        Raises:
            UsageError: a scale is no number, a name is empty or an address.
        """
        loras, embeddings = list(loras), list(embeddings)
        named = {"lora": loras, "embedding": embeddings, "vae": [] if vae is None else [os.fspath(vae)]}
        for kind, given in named.items():
            for one in given:
                _check_name(one, OPTIONS[kind])
        source = os.fspath(vae) if vae is not None and is_repository(os.fspath(vae)) else ""
        return cls(
            loras=tuple(_parse_lora(one) for one in loras),
            embeddings=tuple(EmbeddingFile(Path(file), word) for file, word in map(_divided, embeddings)),
            vae=None if vae is None or source else Path(vae),
            vae_source=source,
        )

    def sorted_loras(self) -> list[LoraFile]:
        """Return the LoRAs in the order that they are applied in, checked; errors of `check`.

        Sums of floats depend on their order, and whoever gives the same files again may give them in another.
        """
        return sorted(self.loras, key=lambda one: (hash_of(check_lora(one.path), skip=True), one.scale))

    def check(self) -> tuple[Addon, ...]:
        """Return what is recorded of the files, in the order that they are applied in.

        Raises:
            UsageError: a file is missing, or two have the same word.
            IntegrityError: one is damaged, a pickle, or of another kind or for another model than needed.
        """
        found = [
            Addon(kind="lora", name=one.path.stem, sha256=hash_of(one.path, skip=True), scale=one.scale)
            for one in self.sorted_loras()
        ]
        words: set[str] = set()
        for file in self.embeddings:
            word = word_of(file)
            if word.lower() in words:
                hint = "give one of them another: --embedding FILE:WORD"
                raise UsageError(f"two embeddings have the word {printable(word)!r}", hint=hint)
            words.add(word.lower())
            found.append(Addon(kind="embedding", name=file.path.stem, sha256=hash_of(file.path), word=word))
        if self.vae is not None:
            path, repository = vae_file(self.vae), self.vae_source.partition("@")[0]
            name = repository.rpartition("/")[2] or self.vae.name or path.name
            found.append(Addon(kind="vae", name=name, sha256=hash_of(path), source=self.vae_source))
        elif self.vae_source:
            hint = "e4t_cli.hub.vae.fetch_addons(addons, HubAccess()) fetches it"
            raise UsageError(f"the VAE {printable(self.vae_source)} was not fetched", hint=hint)
        return tuple(found)


def _check_name(given: str, option: str) -> None:
    """Raise UsageError for the name of no file, and for the address of one."""
    if not given:
        raise UsageError(f"{option} has an empty name", hint="a variable of the shell may be unset")
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", given):
        shown = printable(given)
        page = re.fullmatch(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)/?", given, re.ASCII)
        hint = f"download it first: curl -L -o FILE.safetensors {shlex.quote(shown)}, then {option} FILE.safetensors"
        if page:
            hint = f"--vae {page[1]}" if option == OPTIONS["vae"] else f"hf download {page[1]} FILE.safetensors"
        raise UsageError(f"{option} takes no address: {shown}", hint=hint)


def _divided(given: str) -> tuple[str, str]:
    """Return a file and what is behind its colon, if anything is."""
    file, colon, rest = given.rpartition(":")
    return (
        (given, "") if os.path.exists(given) or not colon or not file or "/" in rest or "\\" in rest else (file, rest)
    )


def _parse_lora(given: str) -> LoraFile:
    file, text = _divided(given)
    try:
        scale = float(text or 1)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale) and text.lower().endswith(SUFFIXES) and is_repository(file):
        raise not_downloaded(file, text, OPTIONS["lora"])
    if not math.isfinite(scale):
        message = f"{printable(text)!r} is no scale of a LoRA: it has to be a number"
        raise UsageError(message, hint=f"--lora {printable(file)}:0.8")
    return LoraFile(Path(file), scale)
