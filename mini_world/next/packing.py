"""Packs all results of a run into at most 8 files of 16 MiB, and restores them on another machine, where the run resumes.

Finished stages travel as their results, without drawings and latents, which are made again; unfinished stages travel as their
training states, in which the optimizer's moments and the average are rounded to bfloat16 if they would not fit otherwise. The
files are parts of one tar archive. Each begins with a line of JSON: the number of parts, the SHA-256 of this part and of the
whole. An archive is unpacked into a folder of its own, checked, and only then moved into the run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e4t_cli.files import write_atomically
from mini_world.next.state import join_state_files, state_files
from mini_world.next.workspace import RESULT, Workspace

PART = 16 * 2**20  # bytes
PARTS = 8
_LINE = 512  # bytes of the line of JSON at the beginning of a part, padded with spaces
_SHORT = "rounded"  # the folder of a state's exported files, beside its other files


class PackingError(Exception):
    """An archive cannot be made, or not be unpacked; nothing was changed."""


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=folder) as temporary:
        yield Path(temporary)


def _archive(work: Workspace, results: list[str], path: Path, *, exact: bool) -> None:
    """Write results and states as one tar archive."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry if entry.isfile() or entry.isdir() else None

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar, tempfile.TemporaryDirectory(dir=path.parent) as short:
        for stage in results:
            tar.add(work.results / stage, f"results/{stage}", filter=plain)
        states = work.folder / "states"
        for file in sorted(p for p in states.rglob("*") if p.is_file()) if states.is_dir() else []:
            name = file.relative_to(work.folder)
            # "encoded-face.safetensors" and the like hold no state, and are made again.
            if file.name.startswith(("encoded-", "partial-", ".")) or ".partial" in file.name or ".tmp" in file.name:
                continue
            # The states of `mini_world.next.loop` lie directly in the folder of their stage.
            if exact or file.suffix != ".safetensors" or len(name.parts) != 3:
                tar.add(file, name.as_posix(), filter=plain)
                continue
            target = Path(short) / name.parent.name / file.stem
            for part in state_files(file, target):
                tar.add(part, (name.parent / _SHORT / file.stem / part.name).as_posix(), filter=plain)


def pack(work: Workspace, results: list[str], target: Path) -> list[Path]:
    """Write all results and states of a run as files into `target`; return their paths.

    Args:
        results: the stages whose results are packed, where they are finished in this run's folder.
        target: files of an earlier archive in it are replaced.

    Raises:
        PackingError: it does not fit, or there is nothing to pack.
    """
    finished = [stage for stage in results if (work.results / stage / RESULT).is_file()]
    if not finished and not any(work.state("").rglob("*.safetensors")):
        raise PackingError(f"there is nothing to pack in {work.folder}; run: python -m mini_world.next")
    with _beside(work.folder) as temporary:
        whole = temporary / "whole.tar"
        room = PART - _LINE
        for exact in (True, False):
            _archive(work, finished, whole, exact=exact)
            size = whole.stat().st_size
            if size <= room * PARTS:
                break
        else:
            raise PackingError(f"the results are {size / 2**20:.0f} MiB, more than {PARTS} files of {PART // 2**20} MiB hold")
        content = whole.read_bytes()
    parts = [content[start : start + room] for start in range(0, len(content), room)]
    digest = hashlib.sha256(content).hexdigest()
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("mini-*-of-*.part"):
        old.unlink()
    paths = []
    for number, part in enumerate(parts, 1):
        facts = {"part": number, "of": len(parts), "sha256": hashlib.sha256(part).hexdigest(), "whole": digest}
        line = json.dumps(facts).encode()
        path = target / f"mini-{number}-of-{len(parts)}.part"
        write_atomically(path, line + b" " * (_LINE - 1 - len(line)) + b"\n" + part)
        paths.append(path)
    return paths


def read_parts(source: Path) -> bytes:
    """Return the archive in the files of a folder, verified.

    Raises:
        PackingError: a file is missing, damaged, or of another archive.
    """
    found: dict[int, bytes] = {}
    facts: dict[str, object] = {}
    for path in sorted(source.glob("mini-*-of-*.part")):
        content = path.read_bytes()
        line, part = content[:_LINE], content[_LINE:]
        try:
            facts = json.loads(line)
            number, digest = int(facts["part"]), facts["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise PackingError(f"{path} is damaged; copy it again") from error
        if hashlib.sha256(part).hexdigest() != digest:
            raise PackingError(f"{path} is damaged; copy it again")
        found[number] = part
    if not found:
        raise PackingError(f"there are no files mini-1-of-N.part in {source}")
    missing = sorted(set(range(1, int(str(facts["of"])) + 1)) - set(found))
    if missing:
        raise PackingError(f"part {missing[0]} of {facts['of']} is missing in {source}; copy it there")
    content = b"".join(found[number] for number in sorted(found))
    if hashlib.sha256(content).hexdigest() != facts["whole"]:
        raise PackingError(f"the files in {source} are of different archives; copy all files of one")
    return content


def unpack(work: Workspace, source: Path) -> list[str]:
    """Restore what `pack` wrote; return the names of the results and states, "results/vae" and so on.

    What is in the run's folder already stays as it is: the same result is left out, anything else is an error.

    Raises:
        PackingError: the files are not whole, or a result or a state of the run would be overwritten.
    """
    content = read_parts(source)
    with _beside(work.folder) as temporary:
        archive = temporary / "whole.tar"
        archive.write_bytes(content)
        with tarfile.open(archive) as tar:
            tar.extractall(temporary / "found", filter="data")
        moves = []
        for one in sorted((temporary / "found").glob("*/*")):
            target = work.folder / one.relative_to(temporary / "found")
            if target.exists():
                if one.parent.name == "results" and (target / RESULT).read_bytes() == (one / RESULT).read_bytes():
                    continue
                raise PackingError(f"{target} exists and is another; remove it, or give another --folder")
            for exported in sorted(one.glob(f"{_SHORT}/*")):
                join_state_files(sorted(exported.glob("*.safetensors")), one / f"{exported.name}.safetensors")
            shutil.rmtree(one / _SHORT, ignore_errors=True)
            moves.append((one, target))
        for one, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            one.replace(target)
        return [target.relative_to(work.folder).as_posix() for _, target in moves]
