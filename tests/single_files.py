"""A Stable Diffusion of tiny sizes as a folder and as one file, whose sizes are accepted as those of version 1."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hub.full_size import write_stable_diffusion

WIDTH = 32  # of its text encoder


@dataclass(frozen=True)
class SmallFile:
    """The same weights twice, and the configs that stand for those of Stable Diffusion 1."""

    folder: Path
    file: Path
    configs: Path
    state: dict[str, torch.Tensor]

    def save(self, path: Path, *, without: str = "", **changes: torch.Tensor) -> Path:
        """Write it again without the keys that begin so, and with other tensors."""
        kept = {key: value for key, value in self.state.items() if not without or not key.startswith(without)}
        save_file({**kept, **changes}, path)
        return path

    def accept(self, monkeypatch) -> None:
        """Let its sizes be those of Stable Diffusion 1."""
        from e4t_cli.hub import single_file as names
        from e4t_cli.models import single_file

        monkeypatch.setitem(names.VERSIONS, WIDTH, "1")
        monkeypatch.setattr(single_file, "CONFIGS", self.configs)


def write_small_file(root: Path) -> SmallFile:
    """Write one."""
    from e4t_cli.formats.stable_diffusion import compvis_state_dict
    from e4t_cli.models.loading import load_part
    from e4t_cli.models.single_file import CONFIGS, KINDS, write_tokenizer

    folder, configs = root / "small", root / "configs" / "1"
    write_stable_diffusion(folder, small=True)
    shutil.rmtree(folder / "tokenizer")
    for part in ("safety_checker", "feature_extractor"):
        shutil.rmtree(folder / part)
    shutil.copytree(CONFIGS / "1" / "tokenizer", folder / "tokenizer")
    write_tokenizer(folder / "tokenizer")
    shutil.copy(CONFIGS / "1" / "model_index.json", folder)
    unet = folder / "unet" / "config.json"
    unet.write_text(json.dumps({**json.loads(unet.read_text()), "sample_size": 8}))
    (folder / "base.toml").write_text('schema = 1\nname = "small"\nresolution = 64\n')
    ignored = shutil.ignore_patterns("*.safetensors", "vocab.json", "merges.txt", "base.toml")
    shutil.copytree(folder, configs, ignore=ignored)
    parts = [load_part(KINDS[name], folder / name, "cpu", torch.float16, half=True) for name in KINDS]
    state = {key: value.contiguous() for key, value in compvis_state_dict(*parts)}
    save_file(state, root / "model.safetensors")
    return SmallFile(folder, root / "model.safetensors", configs.parent, state)
