"""Repositories for the fake hub: a handful of files, or a whole tiny Stable Diffusion."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.hub.fake_hub import FakeHub


def write_files(folder: Path, **contents: bytes) -> Path:
    """Write files; a double underscore in a name is a folder, one before the last word a dot."""
    for name, data in contents.items():
        path = folder / name.replace("__", "/")
        path = path.with_name(".".join(path.name.rsplit("_", 1)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def safetensors_of(size: int, seed: int = 0) -> bytes:
    """Return a valid safetensors file of about that size."""
    data = random.Random(seed).randbytes(size)
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    return len(header).to_bytes(8, "little") + header.encode() + data


def publish_stable_diffusion(
    hub: FakeHub, folder: Path, name: str = "owner/tiny", *, half: bool = True, **settings: str
) -> str:
    """Publish a base as a diffusers repository, with what real ones have beside it.

    Args:
        folder: a new folder for the files.
        half: also in float16, as separate files.

    Returns:
        The commit.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from tests.conftest import write_base

    write_base(folder)
    if half:
        for path in [*folder.glob("*/*.safetensors")]:
            if path.parent.name != "image_tower":
                tensors = {key: value.half() for key, value in load_file(path).items()}
                save_file(tensors, path.with_name(f"{path.stem}.fp16.safetensors"))
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "v1-pruned.ckpt").write_bytes(b"a pickle that nobody wants")
    (folder / "pipeline.py").write_text("raise SystemExit('code of a repository was run')")
    return hub.add(name, folder, **settings)
