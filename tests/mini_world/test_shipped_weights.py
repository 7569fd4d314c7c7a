"""The weights shipped in the package: complete, small, and in safetensors."""

import pytest
from safetensors import safe_open

from mini_world.stages import JUDGE, PACKAGED, PACKS
from tests.mini_world.conftest import ROOT

PLACES = (PACKAGED, PACKS, JUDGE.parent)
PARTS = ("unet", "vae", "text_encoder", "image_tower")
EXPECTED = (
    *(PACKAGED / part for part in PARTS),
    *(PACKS / name / "mini" for name in ("face", "cat", "art")),
    PACKS / "face" / "parser-mini",
    JUDGE.parent,
)
LIMIT = 40 * 10**6  # bytes


def files_of(place):
    """All files and folders in a place, but for the results of the next base, which are not shipped yet."""
    kept = ROOT / "mini_world" / "next" / "results"
    return [path for path in (ROOT / place).rglob("*") if kept not in (path, *path.parents)]


def shipped():
    return sorted(path for place in PLACES for path in files_of(place) if path.suffix == ".safetensors")


def test_they_are_small_enough_to_ship():
    assert 0 < sum(path.stat().st_size for path in shipped()) <= LIMIT


@pytest.mark.parametrize("folder", EXPECTED, ids=lambda folder: "/".join(folder.parts[-2:]))
def test_every_part_has_its_weights(folder):
    found = list((ROOT / folder).glob("*.safetensors"))
    assert found, f"there are no weights in {folder}"
    for path in found:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            assert names
            for name in names:
                tensor = file.get_tensor(name)
                if name.endswith("num_batches_tracked"):  # torch's own counter in batch norm
                    continue
                assert tensor.is_floating_point(), name
                assert tensor.isfinite().all(), f"{path.name}: {name}"


def test_nothing_else_holds_weights():
    """No pickles: whatever is large is safetensors, a word list or an image."""
    known = {".safetensors", ".json", ".txt", ".toml", ".py", ".md", ".pyc"}
    for place in PLACES:
        for path in files_of(place):
            if ".ruff_cache" in path.parts:
                continue
            assert path.is_dir() or path.suffix in known, path
            assert path.suffix == ".safetensors" or not path.is_file() or (path.stat().st_size < 1_000_000), path


def test_all_of_them_are_among_the_expected():
    assert {path.parent for path in shipped()} <= {ROOT / folder for folder in EXPECTED}
