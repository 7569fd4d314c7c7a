"""What the library hands back: pictures that know how they were made, and never overwrite one."""

from .new_files import check_folder, write_new
from .pictures import GeneratedImage, Personalization, Timings
from .sheets import contact_sheet

__all__ = [
    "GeneratedImage",
    "Personalization",
    "Timings",
    "check_folder",
    "contact_sheet",
    "write_new",
]
