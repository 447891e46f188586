"""Is the model of two nodes the same? What its directory holds, in a few words that can be compared.

Names, sizes, the whole of small files, the headers of safetensors files (names, shapes and types of tensors), and a few
samples of every large file: headers alone are the same for any two trainings of one architecture. Reads a few KiB of
each file, never the weights whole: a file that was changed between the samples passes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from gms_launch.cohort.records import ModelStamp

#: Files that an engine reads. Others (licences, pictures, caches) may differ between copies of one model.
READ = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
)
#: A file of up to so many bytes is read whole.
SMALL = 64 * 1024
#: A safetensors header that claims more bytes than this is none.
HEADER_MAX = 100 * 1024 * 1024
SAMPLES, SAMPLE = 4, 4096


class _Tensor(msgspec.Struct):
    """What a header says of a tensor; `__metadata__` has none of it."""

    data_offsets: tuple[int, int] = (0, 0)


def problem(model: Path) -> str:
    """Why no engine could read the model in this directory; empty when nothing shows. Blocking; reads headers only.

    Raises nothing: what cannot be read is the problem.
    """
    config = model / "config.json"
    try:
        msgspec.json.decode(config.read_bytes(), type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError as exc:
        return f"{config} is no JSON object ({exc})"
    except OSError as exc:
        return f"{config} cannot be read: {exc.strerror}"
    return next(filter(None, map(_broken, sorted(model.glob("*.safetensors")))), "")


def _broken(path: Path) -> str:
    """What is wrong with a safetensors file, by its header and its size; empty when nothing is."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return f"{path} is no regular file"
        with open(path, "rb") as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(8)
            if start == b"version ":
                return f"{path} is a pointer of Git LFS and not the weights; `git lfs pull` fetches them"
            length = int.from_bytes(start, "little")
            if size < 8 or length > HEADER_MAX:
                return f"{path} is no safetensors file: {size} bytes, and no header"
            header = msgspec.json.decode(file.read(length), type=dict[str, _Tensor])
    except msgspec.MsgspecError as exc:
        if size < 8 + length:
            return f"{path} is cut off: {size} bytes, and its header alone takes {8 + length}"
        return f"{path}: its header cannot be read ({exc})"
    except OSError as exc:
        return f"{path} cannot be read: {exc.strerror}"
    wanted = 8 + length + max((t.data_offsets[1] for t in header.values()), default=0)
    if size != wanted:
        return f"{path} is {'cut off' if size < wanted else 'too long'}: {size} bytes, and by its header {wanted}"
    return ""


def weights(model: Path) -> int:
    """The bytes of the tensors in a directory's safetensors files."""
    found = 0
    for path in model.glob("*.safetensors"):
        with contextlib.suppress(OSError):
            found += _tensors(path, path.stat().st_size)
    return found


def stamp(model: str) -> ModelStamp:
    """The stamp of a model directory; an empty one for a model that is no directory here, as a name in a hub.

    Blocking. What cannot be read counts as different from what can.
    """
    root = Path(model)
    if not model or not root.is_dir():
        return ModelStamp()
    digest, count, total, tensors = hashlib.sha256(), 0, 0, 0
    for path in _files(root):
        size, content = _look(path)
        digest.update(f"{path.relative_to(root)}\0{size}\0{content}\n".encode())
        count, total = count + 1, total + max(0, size)
        tensors += _tensors(path, size)
    return ModelStamp(count, total, digest.hexdigest()[:32], tensors)


def _files(root: Path) -> Iterator[Path]:
    for directory, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix in READ and not name.startswith("."):
                yield Path(directory, name)


def _tensors(path: Path, size: int) -> int:
    """The bytes of the tensors in a safetensors file: what comes after its header."""
    if path.suffix != ".safetensors" or size < 8:
        return 0
    try:
        with open(path, "rb") as file:
            return max(0, size - 8 - int.from_bytes(file.read(8), "little"))
    except OSError:
        return 0


def _look(path: Path) -> tuple[int, str]:
    """Size in bytes (-1 when it cannot be read) and a digest of what is looked at."""
    digest = hashlib.sha256()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return -1, "no regular file"  # a pipe would keep whoever opens it waiting
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= SMALL:
                digest.update(file.read())
                return size, digest.hexdigest()
            begin = 0
            if path.suffix == ".safetensors":
                length = int.from_bytes(file.read(8), "little")
                begin = 8 + min(length, HEADER_MAX, size - 8)
                digest.update(file.read(begin - 8))
            for k in range(SAMPLES):
                file.seek(begin + max(0, size - begin - SAMPLE) * k // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    except OSError as exc:
        return -1, f"unreadable: {exc.strerror}"
    return size, digest.hexdigest()
