"""A checkpoint of the published size, filled with random values: 4 GB in, 1.7 GB out (minutes).

python -m pytest -m slow tests/e4t_diffusion/test_e4t_diffusion_full_size.py -s
"""

import pytest

from e4t_cli.api.importing import import_checkpoint
from tests.e4t_diffusion.full_size import write_full_size


@pytest.mark.slow
def test_the_published_size(tmp_path):
    folder = write_full_size(tmp_path / "theirs")
    assert (folder / "weight_offsets.pt").stat().st_size == pytest.approx(573e6, rel=0.001)
    assert (folder / "encoder.pt").stat().st_size == pytest.approx(3.45e9, rel=0.001)
    made = import_checkpoint(folder, name="people")
    print(made.summary)
    assert made.base == "sd14"
    assert made.summary.startswith("143,226,592 parameters")
    bytes_of = {path.name: path.stat().st_size for path in made.folder.iterdir()}
    print(bytes_of)
    assert bytes_of["offsets.safetensors"] < 2e6
    assert sum(bytes_of.values()) < 1.75e9
    error = float(made.summary.partition("largest error of a ΔW is ")[2].partition(",")[0])
    assert 0 < error < 1e-6
