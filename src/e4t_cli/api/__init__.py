"""The library: names and paths in, results out. Nothing here prints, and nothing exits.

`personalize` is prepare + tune + generate; `generate` draws a saved concept again; `pretrain`
makes a domain from a folder of pictures. What can be wrong with a request is found before torch
is imported, and what can be wrong with the files before any picture is drawn.
"""

from e4t_cli.api.choices import find_pack
from e4t_cli.api.concepts import generate, personalize, plan
from e4t_cli.api.domains import pretrain

__all__ = ["find_pack", "generate", "personalize", "plan", "pretrain"]

# Their address is this module; how it is divided inside is nobody's business.
for _public in (find_pack, generate, personalize, plan, pretrain):
    _public.__module__ = __name__
