"""The cache of tuned concepts: the same tuning is not computed twice, and what it gave comes back bit for bit.

    <cache>/tuned/<what>-<how>.safetensors      the tensors of `Concept.weights_of`, with a checksum

Both names are hashes. <what>: the concept (photos, masks, features, recipe, seed, domain weights, base) and the
programs that compute it here (versions, processor, number of threads). <how>: what only a loaded base tells (its
files, dtypes, the memory plan). All of that changes last bits, so that another value of it is another entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy
import torch
import transformers
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from e4t_cli import __version__
from e4t_cli.errors import IntegrityError
from e4t_cli.formats.concept import Concept
from e4t_cli.hub.tuned_files import refusal, remember_use, tuned_files, tuned_folder, write_tuned_file
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.loading import weight_paths
from e4t_cli.models.text_to_image import TextToImageModel

FORMAT = "1"
# What of this package tuning runs: its version stays the same while somebody works on it.
_CODE = ("formats/concept.py", "formats/tuned_cache.py", "models/*.py", "nn/*.py", "prompts.py", "training/*.py")
# Environment variables by which the libraries choose other kernels.
_VARIABLES = ("ATEN_", "CUBLAS_", "CUDNN_", "DNNL_", "E4T_CUDA_GRAPHS", "MKL_", "NVIDIA_TF32", "ONEDNN_", "TORCH_")


def is_tuned(concept: Concept) -> bool:
    """Whether there is an entry of a concept; that of another dtype or memory plan cannot be told from the right one.

    For `--dry-run`, which loads no base.
    """
    return _can_be_kept(concept) and bool(tuned_files(f"{_what(concept)}-*"))


def _can_be_kept(concept: Concept) -> bool:
    # Domain weights without a digest were never saved; without a step there is nothing to spare.
    return bool(concept.weights_digest and concept.config.steps)


@dataclass(frozen=True)
class CacheEntry:
    """The file of one tuning, whether it exists or not."""

    path: Path

    @classmethod
    def of(cls, concept: Concept, model: TextToImageModel, how: Mapping[str, object]) -> Self | None:
        """Return the entry of a tuning, None if it cannot be kept.

        Args:
            model: the base as it was loaded from its folder, with its add-ons.
            how: what else it depends on, as plain values.
        """
        if not _can_be_kept(concept):
            return None
        try:
            base = _files(model)
        except (OSError, ValueError, IntegrityError):  # somebody removes the base, which is in memory by now
            return None
        addons = [one.identity for one in model.addons if one.kind != "embedding"]
        values = {"base": base, "addons": addons, **_device(model.device), "dtype": str(model.dtype), **how}
        return cls(tuned_folder() / f"{_what(concept)}-{_hash(values)}.safetensors")

    def load(self, concept: Concept, model: TextToImageModel, pretrained: DomainWeights) -> TunedModel | None:
        """Return what the tuning gave, None if that is not here or damaged."""
        weights = self._read()
        if not weights:
            return None
        try:
            tuned = replace(concept, weights=weights).tuned(model, pretrained)
        except IntegrityError:  # tensors of other shapes
            return None
        remember_use(self.path)
        return tuned

    def _read(self) -> dict[str, Tensor]:
        with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
            with safe_open(self.path, framework="pt") as file:
                about = json.loads(file.metadata()["e4t"])
                # Cloned: mapped tensors are not aligned as torch's own, on which last bits depend.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            if about == {"format": FORMAT, "crc32": _checksum(tensors)}:
                return tensors
        return {}

    def store(self, tuned: TunedModel) -> str:
        """Write what a tuning gave; returns why it was not, or ""."""
        if reason := refusal(_size(tuned)):
            return reason
        tensors = {key: value.contiguous() for key, value in Concept.weights_of(tuned).items()}
        about = json.dumps({"format": FORMAT, "crc32": _checksum(tensors)})
        return write_tuned_file(self.path, save(tensors, {"e4t": about}))


def _size(tuned: TunedModel) -> int:
    """Return the bytes of a tuned model's tensors, without copying them."""
    tensors = list(tuned.adapters.values())
    if not tensors:
        assert isinstance(tuned.encoder, nn.Module)
        tensors = [*tuned.unet.state_dict().values(), *tuned.encoder.state_dict().values()]
    return sum(value.nbytes for value in tensors)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return a CRC-32 of the names and values, which tells damage, not forgery."""
    checksum = 0
    for key in sorted(tensors):
        checksum = zlib.crc32(_bytes(tensors[key]), zlib.crc32(key.encode(), checksum))
    return checksum


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _hash(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _what(concept: Concept) -> str:
    """Return the hash of what is tuned, and of the programs that do it."""
    features = concept.image_features.float()
    return _hash(
        {
            "format": FORMAT,
            "photos": [[_pixels(one.image), _pixels(one.mask)] for one in concept.photos],
            "features": [list(features.shape), hashlib.sha256(_bytes(features)).hexdigest()],
            "recipe": concept.config.as_dict(),
            "seed": concept.seed,
            "descriptor": concept.descriptor,
            "weights": concept.weights_digest,
            "base": concept.base_fingerprint,
            "programs": _programs(),
        }
    )


def _pixels(image: Image | None) -> list[Any]:
    if image is None:
        return []
    return [image.mode, image.size, hashlib.sha256(numpy.asarray(image).tobytes()).hexdigest()]


def _programs() -> dict[str, Any]:
    """Return what decides on this machine, beside its devices, in which order numbers are added up."""
    return {
        "versions": [__version__, torch.__version__, diffusers.__version__, transformers.__version__],
        "code": _code(),
        "processor": [platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability()],
        "threads": torch.get_num_threads(),
        "torch": [
            torch.backends.mkldnn.enabled,
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        ],
        "environment": {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
    }


@cache
def _code() -> str:
    """Return a hash of the modules that tuning runs."""
    folder, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for pattern in _CODE for path in folder.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


@cache
def _processor() -> str:
    """Return the model of the processor: kernels are chosen by more than its instructions, as the sizes of caches."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": device.type}
    about = [torch.cuda.get_device_name(device), torch.version.cuda, torch.backends.cudnn.version()]  # type: ignore[no-untyped-call]
    return {"device": [device.type, *about, torch.backends.cuda.matmul.allow_tf32]}


def _files(model: TextToImageModel) -> list[Any]:
    """Return what identifies the weights of a base as they were read: a fingerprint is that of several dtypes."""
    folder, half = model.base.folder, model.base.half
    paths = [path for part in ("unet", "vae", "text_encoder") for path in weight_paths(folder / part, half)]
    stats = [(path.parent.name, path.name, path.stat()) for path in paths]
    return [model.fingerprint, [[part, name, one.st_size, one.st_mtime_ns] for part, name, one in stats]]
