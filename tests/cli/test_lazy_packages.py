"""Packages that the command line makes lazy: what works without them, and that they are whole once they are used."""

from __future__ import annotations

import json
import subprocess
import sys

# In a process of its own: modules belong to the process.
CODE = """
import json, sys
from e4t_cli.cli.lazy_packages import PACKAGES, install
install()
import e4t_cli.sampling, e4t_cli.training.tuning, open_clip.transformer
lazy = [name for name in PACKAGES if "_e4t_loader" in vars(sys.modules[name])]
flux = "diffusers.models.transformers.transformer_flux"
early = [name for name in ("timm", "open_clip.factory", flux) if name in sys.modules]
from diffusers.models.transformers.transformer_2d import Transformer2DModel as before
import diffusers, open_clip
missing = [hasattr(open_clip, name) for name in ("nothing", "__wrapped__")]
from open_clip import create_model_and_transforms
import diffusers.models.transformers as package
print(json.dumps({
    "lazy": lazy, "early": early, "missing": missing, "version": open_clip.__version__, "file": open_clip.__file__,
    "factory": create_model_and_transforms.__module__, "models": len(open_clip.list_models()),
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
    assert found["lazy"] == ["diffusers.models.transformers", "open_clip"] and found["early"] == []
    # … a name of either loads it …
    assert found["factory"] == "open_clip.factory" and found["models"] > 50
    assert found["flux"] == "diffusers.models.transformers.transformer_flux" and found["left"] == []
    # … as the one package that everybody else imports …
    assert found["one"] and found["same"] and found["file"].endswith("__init__.py") and found["version"][0].isdigit()
    # … and what it does not have is an attribute error.
    assert found["missing"] == [False, False]
