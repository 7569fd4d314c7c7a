"""The library: names and paths in, results out. Nothing here prints, and nothing exits.

`personalize` is prepare + tune + generate; `generate` draws a saved concept again, `export` makes
a plain Stable Diffusion of it; `pretrain` makes a domain from pictures, and `rehearse` says what
that would cost. What can be wrong with a
request is found before torch is imported, and what can be wrong with the files before any picture
is drawn.
"""

from e4t_cli.api.choices import find_pack
from e4t_cli.api.concepts import generate, personalize
from e4t_cli.api.domains import pretrain
from e4t_cli.api.exports import export
from e4t_cli.api.plans import plan
from e4t_cli.api.rehearsals import rehearse
from e4t_cli.api.subjects import prepare

__all__ = [
    "export",
    "find_pack",
    "generate",
    "personalize",
    "plan",
    "prepare",
    "pretrain",
    "rehearse",
]

# Their address is this module; how it is divided inside is nobody's business.
for _public in (export, find_pack, generate, personalize, plan, prepare, pretrain, rehearse):
    _public.__module__ = __name__
