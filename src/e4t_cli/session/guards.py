"""What holds around heavy work: libraries keep quiet, and memory errors are one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from e4t_cli.devices import memory_ran_out
from e4t_cli.errors import ResourceError


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the progress bars of transformers and diffusers out of the user's terminal."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    loud = [
        library
        for library in (transformers_logging, diffusers_logging)
        if library.is_progress_bar_enabled()
    ]
    for library in loud:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in loud:
            library.enable_progress_bar()


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn whatever an allocator says into one sentence.

    Raises:
        ResourceError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if memory_ran_out(error):
            raise ResourceError(
                "memory ran out",
                hint="close other programs, or use another --device or a smaller --base",
            ) from error
        raise
