"""Converts a checkpoint's tensors into a domain folder; runs in the child process.

Its offset networks have the same four linear layers as ours, under other names and in transposed order. With
p = linear1(v) (N), q = linear2(v) (M), C, c of linear_column and R, r of linear_row,

    X = p qᵀ (N × M);   X ← (Xᵀ Cᵀ + 1 cᵀ)ᵀ;   X ← X Rᵀ + 1 rᵀ;   ΔW = Xᵀ (M × N)

and as linear layers on an outer product act on its two vectors,

    ΔW = (R q)(C p)ᵀ + (R 1) cᵀ + r 1ᵀ  =  [R q, R 1, r] (M × 3) · [C p; c; 1ᵀ] (3 × N)

which is exact: the 573 MB of Stable Diffusion 1.4's 96 networks are 1.8 MB of factors in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from e4t_cli.errors import IntegrityError, printable
from e4t_cli.files import write_atomically
from e4t_cli.formats.e4t_diffusion.checkpoint import ENCODER, MERGED_UNET, UNET, ConversionRequest, ConversionResult
from e4t_cli.models.domain_folder import DomainImageTower, empty_tower
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.nn.patch_encoder import PatchEncoder, PatchEncoderConfig
from e4t_cli.nn.weight_offsets import Factors

TOWER = "tower.safetensors"
_TOWER_PREFIX, _FIRST, _JOINT = "clip_vision.", "first_linears.", "feature_linear"
_PARTS = ("weight", "bias")
_RENAMED = {
    "unet_feature_embedder.0": "embed_unet.0", "unet_feature_embedder.2": "embed_unet.2", "final_linear": "final",
}  # fmt: skip
_OFFSET = re.compile(r"(.+\.attn[12])\.wo_([qkv])\.(.+)")

# Reads a file of the checkpoint, which must have that SHA-256 if it is not "".
TensorReader = Callable[[Path, str], tuple[dict[str, Tensor], str]]


def split_networks(state: Mapping[str, Tensor], file: str) -> dict[str, dict[str, Tensor]]:
    """Return path of a projection -> its network's tensors, checked.

    Raises:
        IntegrityError: a tensor is of something else, missing, of another shape, or not finite.
    """
    networks: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        found = _OFFSET.fullmatch(key)
        if found is None:
            raise IntegrityError(f"{file} has an unexpected tensor {printable(key, limit=200)}")
        networks.setdefault(f"{found[1]}.to_{found[2]}", {})[found[3]] = value
    if not networks:
        raise IntegrityError(f"{file} holds no weight offsets")
    for path, network in networks.items():
        shown = f"{file}: the offset of {printable(path)}"
        sizes = (network[key].numel() if key in network else 0 for key in ("v", "linear1.bias", "linear2.bias"))
        width, columns, rows = sizes  # width is 1 in all known checkpoints
        shapes: dict[str, tuple[int, ...]] = {"v": (width,)}
        ends = {"1": (columns, width), "2": (rows, width), "_column": (columns, columns), "_row": (rows, rows)}
        for layer, shape in ends.items():
            shapes |= {f"linear{layer}.weight": shape, f"linear{layer}.bias": shape[:1]}
        _check_shapes(network, shapes, shown)
        for key, value in network.items():
            if not value.isfinite().all():
                raise IntegrityError(f"{shown}: {key} has numbers that are not finite")
    return networks


def _check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], owner: str) -> None:
    for key in sorted(set(shapes) ^ set(state)):
        has = "lacks the" if key in shapes else "has an unexpected"
        raise IntegrityError(f"{owner} {has} tensor {printable(key, limit=200)}")
    for key, shape in shapes.items():
        if (found := tuple(state[key].shape)) != shape:
            raise IntegrityError(f"{owner}: {printable(key, limit=200)} has shape {found}, not {shape}")


def _vectors(network: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return a network's tensors in float64, p (N,) and q (M,)."""
    w = {key: value.double() for key, value in network.items()}
    p, q = (w[f"{layer}.weight"] @ w["v"] + w[f"{layer}.bias"] for layer in ("linear1", "linear2"))
    return w, p, q


def factor(network: Mapping[str, Tensor]) -> Factors:
    """Return left (M, 3) and right (3, N) of one network, in float64."""
    w, p, q = _vectors(network)
    over_rows, over_columns = w["linear_row.weight"], w["linear_column.weight"]
    left = torch.stack((over_rows @ q, over_rows.sum(dim=1), w["linear_row.bias"]), dim=1)
    column_bias = w["linear_column.bias"]
    right = torch.stack((over_columns @ p, column_bias, torch.ones_like(column_bias)))
    return left, right


def evaluate(network: Mapping[str, Tensor]) -> Tensor:
    """Return ΔW (M, N) layer by layer, as the network itself computes it, in float64."""
    w, p, q = _vectors(network)
    columns = torch.outer(q, p) @ w["linear_column.weight"].T + w["linear_column.bias"]  # (M, N)
    rows = columns.T @ w["linear_row.weight"].T + w["linear_row.bias"]  # (N, M)
    return rows.T


def convert_to_domain_folder(
    request: ConversionRequest, target: Path, read: TensorReader, on_progress: Callable[[int], None] = lambda _: None
) -> ConversionResult:
    """Convert a checkpoint.

    Args:
        target: an existing folder for the domain's files, and for a tuned U-Net, offsets merged, if `keep_unet`.
        on_progress: called with the percentage of work done.

    Raises:
        IntegrityError: the checkpoint is not what it claims to be.
    """
    folder, known, hashes = Path(request.folder), request.sha256, {}
    state, hashes[request.weights] = read(folder / request.weights, known.get(request.weights, ""))
    on_progress(5)
    unet: dict[str, Tensor] = {}
    if request.weights == UNET:
        unet = {key: value for key, value in state.items() if ".wo_" not in key}
        state = {key: value for key, value in state.items() if ".wo_" in key}
    networks = split_networks(state, request.weights)
    factors, error, size = _factors(networks, lambda share: on_progress(5 + int(50 * share)))
    if unet and request.keep_unet:
        _write(target / MERGED_UNET, _merged(unet, factors))
    offset_parameters = sum(value.numel() for value in state.values())
    del unet, state, networks
    on_progress(60)
    state, hashes[ENCODER] = read(folder / ENCODER, known.get(ENCODER, ""))
    on_progress(75)
    if not any(key.startswith(_TOWER_PREFIX) for key in state):
        raise IntegrityError(f"{ENCODER} has no image tower: it was trained with a frozen one, which is not in it")
    config = encoder_config(state, request.tower)
    _check_shapes(state, expected_shapes(config), ENCODER)
    tower = {key.removeprefix(_TOWER_PREFIX): v for key, v in state.items() if key.startswith(_TOWER_PREFIX)}
    _write(target / TOWER, tower)  # in half precision: images are encoded in the base's own precision anyway
    on_progress(85)
    files = "; ".join(f"{name} sha256 {digest}" for name, digest in sorted(hashes.items()))
    DomainWeights(
        name=request.name, descriptor=request.descriptor, base_name=request.base,
        base_fingerprint="",  # the checkpoint does not state which weights it was trained on
        encoder=_encoder(state, config), offsets=factors,
        tuning=request.tuning, pretraining=request.pretraining, templates=request.templates,
        tower=DomainImageTower(path=target / TOWER, config=config),
        licence=request.licence, image_tower=request.image_tower,
        notes=f"{request.notes} Converted from a checkpoint of e4t-diffusion ({files}). Largest error of a ΔW: "
        f"{error:.1e}.".strip(),
    ).save(target, dtype=torch.float16, offsets_dtype=torch.float32)  # fmt: skip
    on_progress(100)
    offset_bytes = sum(4 * one.numel() for pair in factors.values() for one in pair)
    return ConversionResult(
        offset_parameters=offset_parameters, offset_bytes=offset_bytes, offset_error=error, offset_size=size
    )


def encoder_config(state: Mapping[str, Tensor], tower: Mapping[str, int | float | bool]) -> PatchEncoderConfig:
    """Return the encoder's sizes: widths from the shapes, the rest from the tower's description."""
    try:
        widths = {
            "unet_width": state["unet_feature_embedder.0.weight"].shape[1],
            "hidden_width": state["feature_linear.weight"].shape[0],
            "embedding_width": state["final_linear.weight"].shape[0],
        }
        return PatchEncoderConfig.from_dict({**tower, **widths})
    except KeyError as error:
        raise IntegrityError(f"{ENCODER} lacks the tensor {error.args[0]}") from error
    except (IndexError, TypeError, ValueError) as error:
        raise IntegrityError(f"{ENCODER} is of no usable size: {error}") from error


def expected_shapes(config: PatchEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor in an encoder.pt of those sizes."""
    with torch.device("meta"):
        encoder = PatchEncoder(config)
    own = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    shapes = {f"{theirs}.{part}": own[f"{ours}.{part}"] for theirs, ours in _RENAMED.items() for part in _PARTS}
    shapes[f"{_JOINT}.weight"] = (config.hidden_width, config.tower_width + config.hidden_width)
    shapes[f"{_JOINT}.bias"] = (config.hidden_width,)
    for index in range(config.vectors):
        shapes[f"{_FIRST}{index}.weight"] = own["first_weights"][1:]
        shapes[f"{_FIRST}{index}.bias"] = own["first_biases"][1:]
    visual = empty_tower(config).state_dict()
    return shapes | {f"{_TOWER_PREFIX}{key}": tuple(value.shape) for key, value in visual.items()}


def _encoder(state: Mapping[str, Tensor], config: PatchEncoderConfig) -> PatchEncoder:
    halves = {key: _half(key, value, ENCODER) for key, value in state.items() if not key.startswith(_TOWER_PREFIX)}
    tensors = {f"{ours}.{part}": halves[f"{theirs}.{part}"] for theirs, ours in _RENAMED.items() for part in _PARTS}
    joint = halves[f"{_JOINT}.weight"]
    tensors["join_picture.weight"] = joint[:, : config.tower_width].contiguous()
    tensors["join_picture.bias"] = halves[f"{_JOINT}.bias"]
    tensors["join_unet.weight"] = joint[:, config.tower_width :].contiguous()
    for ours, part in zip(("first_weights", "first_biases"), _PARTS, strict=True):
        tensors[ours] = torch.stack([halves[f"{_FIRST}{index}.{part}"] for index in range(config.vectors)])
    with torch.device("meta"):
        encoder = PatchEncoder(config)
    encoder.load_state_dict(tensors, assign=True)
    return encoder


def _factors(
    networks: Mapping[str, Mapping[str, Tensor]], on_share: Callable[[float], None]
) -> tuple[dict[str, Factors], float, float]:
    """Return every offset's factors in float32, the largest error and the largest ΔW."""
    found: dict[str, Factors] = {}
    error = size = 0.0
    for path, network in sorted(networks.items()):
        left, right = (one.float() for one in factor(network))
        exact = evaluate(network)
        error = max(error, float((left.double() @ right.double() - exact).abs().max()))
        size = max(size, float(exact.abs().max()))
        found[path] = left, right
        on_share(len(found) / len(networks))
    return found, error, size


def _merged(unet: Mapping[str, Tensor], factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return W · (1 + ΔW) for every modulated weight, and the others as they are."""
    merged = dict(unet)
    for path, (left, right) in factors.items():
        if f"{path}.weight" not in unet:
            raise IntegrityError(f"{UNET} has an offset and no weight of {printable(path)}")
        weight = unet[f"{path}.weight"].float()
        if weight.shape != (len(left), right.shape[1]):
            raise IntegrityError(f"{UNET}: the offset of {printable(path)} has another shape")
        merged[f"{path}.weight"] = weight * (1 + left @ right)
    return merged


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    halves = {key: _half(key, value, path.name).contiguous() for key, value in tensors.items()}
    write_atomically(path, save(halves))


def _half(key: str, value: Tensor, file: str) -> Tensor:
    half = value.half()
    if not half.isfinite().all():
        raise IntegrityError(f"{file}: {printable(key, limit=200)} has numbers that are not finite")
    return half
