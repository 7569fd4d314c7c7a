"""Packages that the command line makes lazy: what works without them, and that they are whole once they are used."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

# In a process of its own: modules belong to the process.
CODE = """
import json, sys
from e4t_cli.cli.lazy_packages import PACKAGES, install
install()
import e4t_cli.sampling, e4t_cli.training.tuning, open_clip.transformer
lazy = [name for name in PACKAGES if "_e4t_loader" in vars(sys.modules[name])]
flux = "diffusers.models.transformers.transformer_flux"
heavy = ("timm", "open_clip.factory", "scipy.optimize._optimize", "scipy.stats._stats_py", "scipy.linalg", flux)
early = [name for name in heavy if name in sys.modules]
from diffusers.models.transformers.transformer_2d import Transformer2DModel as before
import diffusers, open_clip
missing = [hasattr(open_clip, name) for name in ("nothing", "__wrapped__")]
from open_clip import create_model_and_transforms
import diffusers.models.transformers as package
import scipy.integrate, scipy.stats
from transformers.loss.loss_for_object_detection import linear_sum_assignment as named
rows, columns = named([[1, 0], [0, 1]])
import scipy.optimize
print(json.dumps({
    "packages": list(PACKAGES),
    "lazy": lazy, "early": early, "missing": missing, "version": open_clip.__version__, "file": open_clip.__file__,
    "factory": create_model_and_transforms.__module__, "models": len(open_clip.list_models()),
    "assigned": columns.tolist(), "whole": scipy.optimize.linear_sum_assignment is not named,
    "numbers": [scipy.integrate.quad(float, 0, 1)[0], scipy.stats.beta.ppf(0.5, 1, 1)],
    "flux": package.FluxTransformer2DModel.__module__,
    "one": diffusers.FluxTransformer2DModel is package.FluxTransformer2DModel,
    "same": package.Transformer2DModel is before,
    "left": [name for name in PACKAGES if "_e4t_loader" in vars(sys.modules[name])],
}))
"""


def test_packages_are_lazy_and_whole_once_they_are_used() -> None:
    output = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    found = json.loads(output)
    # The method imports neither package's other modules …
    assert found["lazy"] == found["packages"] and len(found["lazy"]) == 5 and found["early"] == []
    # … a name of either loads it …
    assert found["factory"] == "open_clip.factory" and found["models"] > 50
    assert found["flux"] == "diffusers.models.transformers.transformer_flux" and found["left"] == []
    # … a function of scipy that was imported before it works, …
    assert found["assigned"] == [1, 0] and found["whole"] and found["numbers"] == [pytest.approx(0.5)] * 2
    # … as the one package that everybody else imports …
    assert found["one"] and found["same"] and found["file"].endswith("__init__.py") and found["version"][0].isdigit()
    # … and what it does not have is an attribute error.
    assert found["missing"] == [False, False]


@pytest.mark.parametrize("accelerator", [False, True])
def test_triton_is_hidden_where_nothing_can_run_it(accelerator: bool) -> None:
    code = f"""
import sys
from e4t_cli.cli import lazy_packages
lazy_packages.likely_accelerator = lambda: {accelerator}
lazy_packages.install()
from torch.utils._triton import has_triton_package
import torch._dynamo
print("triton" in sys.modules and sys.modules["triton"] is None, has_triton_package())
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    has_it = accelerator and find_spec("triton") is not None
    assert output.split() == [str(not accelerator), str(has_it)]
