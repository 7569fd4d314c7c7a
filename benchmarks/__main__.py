"""`make bench`: without arguments one process on this device, with --against two checkouts side by side.

python -m benchmarks                  Stable Diffusion 1.4 on a GPU, else a small model: benchmarks.in_process
python -m benchmarks --against REV    whole commands of this checkout and of another commit: benchmarks.against
"""

from __future__ import annotations

import sys


def main() -> int:
    if any(word.split("=")[0] == "--against" for word in sys.argv[1:]):
        # Nothing heavy is imported: what a process has used at its start counts as used by the processes it starts.
        from benchmarks.against import main as compare

        return compare()
    from benchmarks.in_process import main as measure

    measure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
