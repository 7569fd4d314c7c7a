"""A checkpoint folder of e4t-diffusion: its description, and its conversion in a child process.

This process reads names and config.json alone. The child (`__main__`) opens the pickles, writes a domain folder and
answers in JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from e4t_cli.errors import E4TError, IntegrityError, ResourceError, UsageError, printable
from e4t_cli.files import put_in_place, staging_directory
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.system_memory import free_addresses
from e4t_cli.temporary import sweep

ENCODER, OFFSETS, UNET, PHOTO = "encoder.pt", "weight_offsets.pt", "unet.pt", "domain.png"
MERGED_UNET = "unet.safetensors"
MAX_CONFIG_BYTES = 1_000_000
_DEFAULT_TOWER = "ViT-H-14::laion2b_s32b_b79k"
# What describes a plain vision transformer; another key means another kind of tower.
_PLAIN_TOWER = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
_UNSTATED_QUICK_GELU = {"openai"}  # weights trained with the approximate GELU, which their configs do not state
_SECRETS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "PROXY", "SSH_AUTH")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder."""

    folder: Path  # with config.json, encoder.pt, and weight_offsets.pt or unet.pt
    weights: str  # the name of the latter
    base: str  # the model it was trained on, as written there: a hub id or somebody's path
    tower: str  # open_clip's name of the image tower, and of its initial weights
    descriptor: str  # the coarse word, "face"
    scale: float  # s of eq. 1
    tuned: bool  # on one image
    photo: Path | None = None  # that image, if the folder has it


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder's description without opening any weights.

    Raises:
        UsageError: there is no such folder.
        IntegrityError: it is not one of e4t-diffusion's, or its config.json is invalid.
    """
    shown = printable(str(folder))
    if not os.path.isdir(folder):
        raise UsageError(f"there is no folder {shown}")
    weights = UNET if os.path.isfile(folder / UNET) else OFFSETS
    for name in ("config.json", ENCODER, weights):
        if not os.path.isfile(folder / name):
            hint = "give the folder that its training wrote, or that its repository holds"
            raise IntegrityError(f"{shown} is not a checkpoint of e4t-diffusion: it has no {name}", hint=hint)
    try:
        config = _read_config(folder / "config.json")
        training = config.get("pretrained_args", config)
        if not isinstance(training, dict):
            raise ValueError("pretrained_args is no table")
        scale = config.get("domain_embed_scale", training.get("domain_embed_scale", 0.1))
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e3:
            raise ValueError(f"domain_embed_scale is {scale!r}")
        descriptor = _text(training, "domain_class_token").strip()
        if not descriptor:
            raise ValueError("domain_class_token is empty")
        return Checkpoint(
            folder=folder, weights=weights, descriptor=descriptor, scale=float(scale),
            base=_text(training, "pretrained_model_name_or_path"),
            tower=_text(training, "clip_model_name_or_path", _DEFAULT_TOWER),
            tuned="pretrained_args" in config or weights == UNET,
            photo=folder / PHOTO if os.path.isfile(folder / PHOTO) else None,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise IntegrityError(f"config.json in {shown} cannot be used: {printable(str(error))}") from error


def _read_config(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError("it is larger than a config can be")
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if not isinstance(table, dict):
        raise ValueError("it holds no table")
    return table


def _text(table: dict[str, Any], key: str, default: str | None = None) -> str:
    value = default if table.get(key) is None else table[key]  # written as null where it was not given
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError(f"{key} is {value!r}, not a text")
    return value


def tower_sizes(name: str, *, normalised_patches: bool = False) -> dict[str, Any]:
    """Return the fields of `PatchEncoderConfig` that describe an image tower.

    Args:
        name: "ViT-H-14::laion2b_s32b_b79k", or without its initial weights.
        normalised_patches: see `PatchTower`.

    Raises:
        IntegrityError: open_clip has no plain vision transformer of that name.
    """
    model, _, weights = name.partition("::")
    path = configs_folder() / f"{model}.json"
    known = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", model) and os.path.isfile(path)
    config = json.loads(path.read_text(encoding="utf-8")) if known else {}
    vision = config.get("vision_cfg", {})
    if not {"image_size", "layers", "width", "patch_size"} <= set(vision) <= _PLAIN_TOWER:
        shown = f"the checkpoint's image tower {printable(name)!r}"
        raise IntegrityError(f"{shown} is no plain vision transformer of open_clip")
    return {
        "tower_width": vision["width"],
        "tower_layers": vision["layers"],
        "tower_heads": vision["width"] // vision.get("head_width", 64),
        "tower_image_size": vision["image_size"],
        "tower_patch_size": vision["patch_size"],
        "tower_mlp_ratio": vision.get("mlp_ratio", 4.0),
        "tower_quick_gelu": bool(config.get("quick_gelu")) or weights in _UNSTATED_QUICK_GELU,
        "normalised_patches": normalised_patches,
    }


def configs_folder() -> Path:
    """Return the folder of open_clip's configs; importing open_clip would take seconds."""
    spec = find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model_configs"


@dataclass(frozen=True, kw_only=True)
class ConversionRequest:
    """A checkpoint to read and a domain folder to write; fields without a comment are for its manifest."""

    folder: str  # of the checkpoint
    weights: str  # its second file, beside encoder.pt
    tower: Mapping[str, Any]  # sizes as fields of `PatchEncoderConfig`; its widths follow from the checkpoint
    name: str
    descriptor: str
    base: str
    tuning: TuningConfig
    pretraining: PretrainingConfig
    templates: tuple[str, ...]
    licence: str = ""
    image_tower: str = ""
    notes: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)  # file -> what it must be, as far as it was declared
    keep_unet: bool = False  # write the merged weights of a tuned U-Net, too (`MERGED_UNET`)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        fields["tuning"] = TuningConfig(**fields["tuning"])
        fields["pretraining"] = PretrainingConfig(**fields["pretraining"])
        return cls(**{**fields, "templates": tuple(fields["templates"])})


@dataclass(frozen=True, kw_only=True)
class ConversionResult:
    """Measurements of a conversion."""

    offset_parameters: int  # in the checkpoint
    offset_bytes: int  # of the offsets' factors, without the file's header
    offset_error: float  # largest difference of any ΔW from what its network computes layer by layer
    offset_size: float  # largest |ΔW|, for comparison

    def summary(self) -> str:
        """Return a sentence for the user."""
        became = f"{self.offset_parameters:,} parameters of weight offsets became {self.offset_bytes / 1e6:.2f} MB"
        error = f"the largest error of a ΔW is {self.offset_error:.1e}, where the largest ΔW is {self.offset_size:.2g}"
        return f"{became} of factors; {error}"


@contextlib.contextmanager
def converting(
    request: ConversionRequest, target: Path, on_progress: ProgressCallback | None = None
) -> Iterator[tuple[Path, ConversionResult]]:
    """Convert a checkpoint in a child process without a network; yields a temporary domain folder, to be renamed.

    Args:
        target: its later place, which lies beside it.

    Raises:
        IntegrityError: the checkpoint is hostile, damaged, or of another kind.
        UsageError, ResourceError: there is no room for the result or it cannot be written, or memory ran out.
    """
    sweep(target)
    # Half precision takes half the bytes; the offsets, next to nothing.
    needed = sum(path.stat().st_size for path in Path(request.folder).glob("*.pt")) // 2
    with staging_directory(target, needed) as staging:
        # Two levels down, where no listing of domain folders looks for manifests.
        made = staging / "domain"
        made.mkdir()
        yield made, _run_child(request, made, on_progress)


def convert(request: ConversionRequest, target: Path, on_progress: ProgressCallback | None = None) -> ConversionResult:
    """Convert a checkpoint into a folder of the cache, which appears whole, or not at all; errors as of `converting`.

    One that another process makes meanwhile from the same files is kept.
    """
    with converting(request, target, on_progress) as (made, result):
        try:
            put_in_place(made, target)
        except FileExistsError:
            if not os.path.isfile(target / "domain.toml"):
                raise
    return result


def _run_child(request: ConversionRequest, folder: Path, on_progress: ProgressCallback | None) -> ConversionResult:
    command = [sys.executable, "-m", "e4t_cli.formats.e4t_diffusion", str(folder)]
    stderr = None if os.environ.get("E4T_DEBUG") == "1" else subprocess.DEVNULL
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile() as stdin, contextlib.ExitStack() as stack:
        stdin.write(request.to_json().encode())
        stdin.seek(0)
        child = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, env=clean_environment())
        stack.enter_context(child)
        stack.callback(child.kill)  # an interrupt here must not leave it running
        assert child.stdout is not None
        for line in child.stdout:
            with contextlib.suppress(ValueError):
                if isinstance(parsed := json.loads(line), dict):
                    answer = parsed
            if on_progress and "done" in answer:
                on_progress(Progress(stage="convert", done=answer["done"], total=answer["total"]))
        code = child.wait()
    if code == 0 and "result" in answer:
        return ConversionResult(**answer["result"])
    if "error" in answer:
        exit_code, message, hint = answer["error"]
        kinds: list[type[E4TError]] = [E4TError, *E4TError.__subclasses__()]
        kind = next((one for one in kinds if one.exit_code == exit_code), IntegrityError)
        raise kind(printable(str(message)), hint=None if hint is None else printable(str(hint)))
    if code == -9 or free_addresses() is not None:  # `ulimit -v`: libraries crash where it is too small
        hint = "close other programs: it needs about as much memory as its largest file"
        raise ResourceError(f"the conversion ended with code {code}, probably because memory ran out", hint=hint)
    message = f"{printable(request.folder)} could not be converted: reading it ended with code {code}"
    raise IntegrityError(message, hint="E4T_DEBUG=1 shows what that process printed")


def clean_environment() -> dict[str, str]:
    """Return the environment of the child: without tokens, and offline."""
    kept = {name: value for name, value in os.environ.items() if not any(word in name.upper() for word in _SECRETS)}
    return {**kept, "HF_HUB_OFFLINE": "1", "E4T_OFFLINE": "1", "NO_PROXY": "*"}
