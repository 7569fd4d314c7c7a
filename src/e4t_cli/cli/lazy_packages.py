"""Postpones the imports of packages that libraries import and this program seldom uses.

diffusers' U-Net needs one module of `diffusers.models.transformers`, whose `__init__` imports some forty models, and
the image tower needs one of `open_clip`, whose `__init__` imports timm and all else it has. transformers and diffusers
import 490 modules of scipy, 59 MB, for a loss and for two schedulers. `install` makes those packages lazy:
their `__init__` runs at the first use of a name that no submodule is called. Where there is no accelerator it hides
triton, of which `torch._dynamo` reads one name, 75 MB. Only the command line does so, because modules belong to the
process. `torch._dynamo` would be worth more, but torchvision imports its parts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock
from types import ModuleType
from typing import Any

from e4t_cli.devices import likely_accelerator

# Package -> its functions that are imported by name, and may never be called.
PACKAGES: dict[str, tuple[str, ...]] = {
    "diffusers.models.transformers": (),
    "open_clip": (),
    "scipy.integrate": (),
    "scipy.optimize": ("linear_sum_assignment",),
    "scipy.stats": (),
}


class _LazyPackage(ModuleType):
    """A package whose `__init__` runs when a name is looked up that neither it nor a submodule has set yet."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in PACKAGES[self.__name__] and "_e4t_loader" in self.__dict__:
            return _postponed(self, name)
        _load(self)
        try:
            return self.__dict__[name]
        except KeyError:
            pass
        found = self.__dict__.get("__getattr__")
        if found is not None:
            return found(name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


_lock = RLock()


def _load(package: ModuleType) -> None:
    """Run the package's `__init__`, once; another thread waits for it."""
    with _lock:
        loader = package.__dict__.pop("_e4t_loader", None)
        if loader is not None:
            loader.exec_module(package)


def _postponed(package: ModuleType, name: str) -> Callable[..., Any]:
    """Return a function that loads the package when it is called, and calls the package's function."""

    def call(*args: Any, **kwargs: Any) -> Any:
        _load(package)
        return package.__dict__[name](*args, **kwargs)

    return call


class _LazyLoader(Loader):
    """Creates a package without running it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _LazyPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_e4t_loader"] = self.loader

    def __getattr__(self, name: str) -> Any:
        # pkgutil and importlib.resources ask a loader for more.
        return getattr(self.loader, name)


class _Finder(MetaPathFinder):
    """Finds the packages of `PACKAGES` where Python finds them, with a lazy loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in PACKAGES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None and spec.submodule_search_locations is not None:
            spec.loader = _LazyLoader(spec.loader)
        return spec


def install() -> None:
    """Make the packages lazy that are not imported yet, and hide triton where nothing can run its kernels."""
    if not likely_accelerator():
        sys.modules.setdefault("triton", None)  # type: ignore[arg-type]
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
