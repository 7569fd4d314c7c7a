"""Which domains there are on this machine, and where their weights lie."""

from .finding import (
    GROUP,
    OURS,
    Listing,
    claimed_names,
    find_domain,
    find_listing,
    installed_domains,
    installed_packages,
    own_names,
)
from .own_domains import USER, user_domain, user_domains_folder
from .weights import weights_folder

__all__ = [
    "GROUP",
    "OURS",
    "USER",
    "Listing",
    "claimed_names",
    "find_domain",
    "find_listing",
    "installed_domains",
    "installed_packages",
    "own_names",
    "user_domain",
    "user_domains_folder",
    "weights_folder",
]
