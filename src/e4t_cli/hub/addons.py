"""What users add to a base: LoRAs, textual inversions, another VAE. Which files, and what is recorded of them.

Only headers are read here and torch is not imported: a wrong file is refused before a base is loaded or fetched.
`formats.addons` applies them. A1111's web UI writes hashes of such files into its images; its source says how:
of a LoRA SHA-256 of what follows the header (so that a changed description is no other LoRA), of a textual inversion
that of the whole file, both cut to 12 digits, and of a VAE 10.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from e4t_cli.errors import InputError, IntegrityError, UsageError, printable
from e4t_cli.files import file_error
from e4t_cli.hub.bases import weight_files
from e4t_cli.hub.paths import REPOSITORY
from e4t_cli.hub.single_file import NO_WEIGHTS, SUFFIXES
from e4t_cli.prompts import plain_text

OPTIONS = {"lora": "--lora", "embedding": "--embedding", "vae": "--vae"}
_NAMES = {"lora": "LoRA", "embedding": "embedding", "vae": "VAE"}
MAX_WORD = 100  # characters
REVISION = re.compile(r"[\w][\w./-]{0,199}", re.ASCII)
_BLOCK = 1 << 20

# What is no product of two matrices, by the last parts of its keys.
_VARIANTS = {
    "LoHa": r"\.hada_", "LoKr": r"\.lokr_", "OFT": r"[._]oft_", "DoRA": r"\.dora_scale$|\.lora_magnitude_vector",
    "LoCon with a Tucker decomposition (lora_mid)": r"\.lora_mid\.", "GLoRA": r"\.[ab][12]\.weight$",
    "IA3": r"\.on_input$|\.ia3_", "LyCORIS with whole differences": r"\.diff(_b)?$|\.[wb]_norm$",
    "LoRA with biases": r"\.lora_(B|up)(\.\w+)?\.bias$",
}  # fmt: skip
_LORA_KEY = re.compile(r"[._](lora_(down|up|A|B)|lora(_linear_layer)?\.(down|up))(\.\w+)?\.weight$")
# Other models' names of blocks.
_OTHER_MODELS = {
    "SDXL": r"^lora_te[12]_|^text_encoder_2\.|transformer_blocks[._][1-9]\d*[._]",
    "Flux": r"double_blocks|single_(transformer_)?blocks",
    "Stable Diffusion 3": r"joint_blocks|^transformer\.transformer_blocks",
}


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


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, and by how much its change is multiplied."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class EmbeddingFile:
    """A textual inversion, and what prompts call it: "" is the word in the file, else the file's name."""

    path: Path
    word: str = ""


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
        source = os.fspath(vae) if vae is not None and _is_repository(os.fspath(vae)) else ""
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
        return sorted(self.loras, key=lambda one: (_hash(check_lora(one.path), skip=True), one.scale))

    def check(self) -> tuple[Addon, ...]:
        """Return what is recorded of the files, in the order that they are applied in.

        Raises:
            UsageError: a file is missing, or two have the same word.
            IntegrityError: one is damaged, a pickle, or of another kind or for another model than needed.
        """
        found = [
            Addon(kind="lora", name=one.path.stem, sha256=_hash(one.path, skip=True), scale=one.scale)
            for one in self.sorted_loras()
        ]
        words: set[str] = set()
        for file in self.embeddings:
            word = word_of(file)
            if word.lower() in words:
                hint = "give one of them another: --embedding FILE:WORD"
                raise UsageError(f"two embeddings have the word {printable(word)!r}", hint=hint)
            words.add(word.lower())
            found.append(Addon(kind="embedding", name=file.path.stem, sha256=_hash(file.path), word=word))
        if self.vae is not None:
            path, repository = vae_file(self.vae), self.vae_source.partition("@")[0]
            name = repository.rpartition("/")[2] or self.vae.name or path.name
            found.append(Addon(kind="vae", name=name, sha256=_hash(path), source=self.vae_source))
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


def _is_repository(given: str) -> bool:
    """Whether this is "owner/name[@revision]"; what exists, or is called like a file, never is."""
    repository, at, revision = given.partition("@")
    named = REPOSITORY.fullmatch(repository) and not repository.lower().endswith(SUFFIXES)
    return bool(named and (REVISION.fullmatch(revision) or not at) and not os.path.lexists(given))


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
    if not math.isfinite(scale) and text.lower().endswith(SUFFIXES) and _is_repository(file):
        raise _not_downloaded(file, text, OPTIONS["lora"])
    if not math.isfinite(scale):
        message = f"{printable(text)!r} is no scale of a LoRA: it has to be a number"
        raise UsageError(message, hint=f"--lora {printable(file)}:0.8")
    return LoraFile(Path(file), scale)


def _not_downloaded(repository: str, file: str, option: str) -> UsageError:
    """Return the error for a repository of the hub in place of a file."""
    name = shlex.quote(printable(file))
    hint = f"of the hub: hf download {printable(repository)} {name} --local-dir ., then {option} {name}"
    return UsageError(f"there is no file {printable(repository)}", hint=hint)


# ── headers ──


def read_header(path: Path, option: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes of a safetensors file and what it says of itself.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is a pickle, or no complete safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    shown = printable(str(path))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{option} needs a file, and {shown} is a folder or a device")
        with path.open("rb") as file:
            begin = file.read(32)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and _is_repository(path.as_posix()):
            raise _not_downloaded(path.as_posix(), "FILE.safetensors", option) from error
        refused = file_error(error, path, reading=True)
        if isinstance(error, FileNotFoundError) and option == OPTIONS["vae"]:
            refused.hint = "--vae takes a file, a folder, or OWNER/NAME of the hub"
        raise refused from error
    is_safetensors = begin[8:9] == b"{"  # before it the header's length: any bytes, also those of another format
    found = next((about for magic, about in NO_WEIGHTS.items() if begin.lstrip().startswith(magic)), None)
    if found and not is_safetensors:
        raise IntegrityError(f"{shown} is {found[0]}", hint=found[1])
    is_pickle = not is_safetensors and begin[:2] in (b"PK", b"\x80\x02")
    if is_pickle or path.suffix.lower() in (".pt", ".bin", ".ckpt", ".pth", ".pkl"):
        message = f"{shown} is a pickle, which can run any program, and e4t opens none"
        raise IntegrityError(message, hint="look for it as .safetensors, or save its tensors as such a file")
    try:
        with safe_open(path, framework="np") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            return shapes, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{shown} is damaged, or no safetensors file") from error


def describe(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """Return what a safetensors file is, "" if nobody knows, and the option that takes it."""
    if any(key.startswith("model.diffusion_model.") for key in shapes):
        return "a whole model", "--base"
    if any(_LORA_KEY.search(key) for key in shapes):
        return "a LoRA", "--lora"
    if any(re.search(pattern, key) for key in shapes for pattern in _VARIANTS.values()):
        return "an adapter", "--lora"
    if any(key.startswith(("first_stage_model.", "decoder.mid", "decoder.up")) for key in shapes):
        return "a VAE", "--vae"
    if "emb_params" in shapes or {"clip_l", "clip_g"} & set(shapes) or _is_word(shapes):
        return "a textual inversion", "--embedding"
    return "", ""


def _is_word(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return len(shapes) == 1 and len(next(iter(shapes.values()))) in (1, 2)


def _other_kind(path: Path, shapes: Mapping[str, tuple[int, ...]], wanted: str) -> IntegrityError:
    what, option = describe(shapes)
    begin = ", ".join(printable(key, limit=60) for key in sorted(shapes)[:2]) or "nothing"
    message = f"{printable(str(path))} is {what}, not {wanted}" if what else f"no {wanted[2:]}: it has {begin}"
    if not what:
        message = f"{printable(str(path))} is {message}"
    return IntegrityError(message, hint=f"give it as {option}" if option and what[2:] != wanted[2:] else None)


def check_lora(path: Path) -> Path:
    """Return the path of a LoRA that may be one for Stable Diffusion 1 or 2; errors of `BaseAddons.check`."""
    shapes, _ = read_header(path, OPTIONS["lora"])
    shown = printable(str(path))
    for name, pattern in _VARIANTS.items():
        if key := next((key for key in shapes if re.search(pattern, key)), None):
            message = f"{shown} is no plain LoRA but {name} ({printable(key, limit=100)})"
            raise IntegrityError(message, hint="merge it into the base with the program that made it, then --base")
    if not any(_LORA_KEY.search(key) for key in shapes):
        raise _other_kind(path, shapes, "a LoRA")
    for model, pattern in _OTHER_MODELS.items():
        if any(re.search(pattern, key) for key in shapes):
            hint = "use one that was trained on Stable Diffusion 1 or 2, as the base is"
            raise IntegrityError(f"{shown} is a LoRA for {model}, which is another architecture", hint=hint)
    return path


def word_of(file: EmbeddingFile) -> str:
    """Return what prompts call a textual inversion, normalized; errors of `BaseAddons.check`."""
    shapes, _ = read_header(file.path, OPTIONS["embedding"])
    if {"clip_l", "clip_g"} & set(shapes):
        hint = "use one that was trained on Stable Diffusion 1 or 2, as the base is"
        raise IntegrityError(f"{printable(str(file.path))} is a textual inversion for SDXL", hint=hint)
    if describe(shapes)[1] != OPTIONS["embedding"] or not _is_word(shapes):
        raise _other_kind(file.path, shapes, "a textual inversion")
    key = next(iter(shapes))
    word = plain_text(file.word or (file.path.stem if key == "emb_params" else key), "the word of --embedding")
    if not 1 <= len(word) <= MAX_WORD:
        message = f"the word of {printable(str(file.path))} must have 1 to {MAX_WORD} characters"
        raise UsageError(message, hint="--embedding FILE:WORD")
    return word


def vae_file(path: Path) -> Path:
    """Return the file with a VAE's weights: itself, or the one of a folder in diffusers' layout."""
    folder = path / "vae" if os.path.isfile(path / "vae" / "config.json") else path
    if os.path.isdir(folder):
        files = weight_files([f"vae/{name}" for name in os.listdir(folder)], "vae", half=False)
        if not os.path.isfile(folder / "config.json") or len(files) != 1:
            hint = "it needs config.json and diffusion_pytorch_model.safetensors"
            raise IntegrityError(f"the folder {printable(str(path))} has no VAE", hint=hint)
        return folder / files[0].partition("/")[2]
    shapes, _ = read_header(path, OPTIONS["vae"])
    if describe(shapes)[1] not in (OPTIONS["vae"], "--base"):
        raise _other_kind(path, shapes, "a VAE")
    return path


def _hash(path: Path, *, skip: bool = False) -> str:
    about = path.stat()
    return _hash_of_file(path.resolve(), skip, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=64)  # a command asks several times
def _hash_of_file(path: Path, skip: bool, *stamp: int) -> str:
    """Return the SHA-256 of a file; `skip`: of what follows its safetensors header."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            if skip:
                file.seek(8 + int.from_bytes(file.read(8), "little"))
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{printable(str(path))} cannot be read") from error
    return digest.hexdigest()
