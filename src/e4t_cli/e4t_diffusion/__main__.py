"""The process that reads a checkpoint: a wish on stdin, lines of JSON on stdout, files in a folder.

    python -m e4t_cli.e4t_diffusion TARGET < wish.json

Cut off first, imports second: by the time a byte of the checkpoint is read, there is no network.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from e4t_cli.e4t_diffusion.isolation import forbid, leave_the_network


def main() -> int:
    leave_the_network()  # before a library starts threads, after which the kernel refuses
    from e4t_cli.e4t_diffusion.conversion import write_pack
    from e4t_cli.e4t_diffusion.reading import read_tensors_of
    from e4t_cli.e4t_diffusion.wish import Wish
    from e4t_cli.errors import E4TError

    wish, target = Wish.from_json(sys.stdin.read()), Path(sys.argv[1])
    # Whatever a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    forbid()
    try:
        report = write_pack(
            wish, target, read_tensors_of, lambda percent: answer(done=percent, total=100)
        )
    except E4TError as error:
        answer(error={"message": error.message, "hint": error.hint, "exit": error.exit_code})
        return error.exit_code
    except MemoryError:
        answer(error={"message": "memory ran out", "hint": None, "exit": 6})
        return 6
    except OSError as error:
        answer(error={"message": f"{error.strerror or error}", "hint": None, "exit": 6})
        return 6
    answer(report=asdict(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
