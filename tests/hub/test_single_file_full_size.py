"""One file with the names and shapes of Stable Diffusion 1.4, in float16 (2 GB): converted in little memory.

python -m pytest -m slow tests/hub/test_single_file_full_size.py -s
"""

import subprocess
import sys
import time

import pytest
import torch

from e4t_cli.formats.stable_diffusion import compvis_state_dict
from e4t_cli.hub.bases import find_base
from e4t_cli.models.fingerprints import part_fingerprints
from e4t_cli.models.loading import load_part
from e4t_cli.models.single_file import KINDS, write_tensors
from tests.hub.full_size import write_stable_diffusion

CONVERT = """
import re, sys
from pathlib import Path
from e4t_cli.hub.single_file import recognize_file
from e4t_cli.models.single_file import convert_file
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()  # not ru_maxrss, which a new process has from the one that started it
convert_file(recognize_file(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_published_size(tmp_path, monkeypatch):
    monkeypatch.setenv("E4T_CACHE_DIR", str(tmp_path / "cache"))
    write_stable_diffusion(tmp_path / "sd14")
    parts = [load_part(kind, tmp_path / "sd14" / part, "cpu", torch.float16) for part, kind in KINDS.items()]
    file = tmp_path / "noise.safetensors"
    state = dict(compvis_state_dict(*parts))
    write_tensors({key: value for key, value in state.items() if value.is_floating_point()}, file)
    assert file.stat().st_size == pytest.approx(2.13e9, rel=0.01)
    del parts, state
    begun = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", CONVERT, str(file)], capture_output=True, text=True, check=True)
    grown = int(ended.stdout) * 1024
    print(f"{time.perf_counter() - begun:.0f} s, {grown / 1e9:.2f} GB more than the imports")
    assert grown < 2.5e9  # the file itself, as mapped pages, and one tensor
    base = find_base(file)
    own, other = part_fingerprints(base.folder), part_fingerprints(tmp_path / "sd14")
    assert base.resolution == 512
    assert {part for part in own if own[part] != other.get(part)} == {"tokenizer"}  # the test hub's is another
