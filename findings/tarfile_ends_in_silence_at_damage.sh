#!/usr/bin/env bash
# Versions: the standard library of Python 3.11.
#
# Guess: iterating over a tar file that was cut, or whose middle is damaged, raises `tarfile.ReadError`.
#
# Behaviour: only a damaged FIRST header raises. Later in the file a header with a wrong checksum and a file that just ends between
# two members both end the iteration as the end mark (two blocks of zeros) of a sound archive does; a member whose data are cut raises
# on reading only. Nothing tells an archive without its end mark from a whole one.
#
# Output seen: see EXPECTED below.
#
# Why it matters: shards of training images are tar files that are copied and uploaded by the hundred. A shard that was copied incompletely
# trains in silence on the part that came before; readers built on tarfile (webdataset among them) inherit it.
# A `TarInfo` subclass whose `fromtarfile` notes `EOFHeaderError` can tell whether the end mark was seen.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"

cat > "$work/probe.py" <<'PROBE'
import io
import tarfile


def archive():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(4):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = 512
            tar.addfile(member, io.BytesIO(bytes([i]) * 512))
    return file.getvalue()


def read(data):
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
            return f"{sum(len(tar.extractfile(member).read()) == 512 for member in tar)} members, no error"
    except tarfile.ReadError as error:
        return f"ReadError: {error}"


whole = archive()  # a member takes 1024 bytes: its header and its data
damaged = bytearray(whole)
damaged[2 * 1024 + 3] ^= 1  # one bit in the third header
first = bytearray(whole)
first[3] ^= 1
for name, data in [
    ("whole", whole),
    ("no end mark", whole[: 4 * 1024]),
    ("cut between members", whole[: 2 * 1024]),
    ("cut after a header", whole[: 2 * 1024 + 512]),
    ("third header damaged", bytes(damaged)),
    ("first header damaged", bytes(first)),
]:
    print(f"{name:20} {read(data)}")
PROBE

cat > "$work/expected" <<'EXPECTED'
whole                4 members, no error
no end mark          4 members, no error
cut between members  2 members, no error
cut after a header   ReadError: unexpected end of data
third header damaged 2 members, no error
first header damaged ReadError: bad checksum
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
