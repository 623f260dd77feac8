"""Reading files that someone else has written, and writing files that someone else may be reading."""

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any
from uuid import uuid4

from diopt_lightning.errors import ConfigurationError, one_line

# Many times the largest official task. A file of holes takes no disk, and would be read into memory all the same.
LARGEST_FILE = 2**30
QUOTED = 80


def read_bytes(path: Path, root: Path | None = None) -> bytes:
    """Read a regular file.

    Args:
        path: The file.
        root: The folder that it must lie in once all links are followed. The folder itself may be a link, which its
            user has made; a link below it comes with the data, and must not lead to the user's other files. That holds
            for ``tasks`` and ``splits`` as a whole too, as they are unpacked from the same archive.

    Raises:
        OSError: If it cannot be read, is no regular file (reading a pipe would wait forever), is too large or lies
            elsewhere.
    """
    status = os.stat(path)  # an endless loop of links fails here
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "It is no regular file")
    if status.st_size > LARGEST_FILE:
        raise OSError(errno.EFBIG, f"It has {status.st_size:,} bytes, more than {LARGEST_FILE:,}")
    if root is not None and not path.resolve().is_relative_to(root.resolve()):
        raise OSError(errno.EPERM, f"It is a link to a file outside {root}")
    return path.read_bytes()


def load_pretrained(auto_class: Any, name: str, what: str, **options: Any) -> Any:
    """Load a model or a tokenizer of transformers, and run no code that comes with it.

    Args:
        auto_class: The class of transformers that loads it, e.g. ``AutoTokenizer``.
        name: Its folder, or name on the hub.
        what: What it should be, for messages.
        options: Further ones of ``from_pretrained``.

    Raises:
        ConfigurationError: If it cannot be loaded.
    """
    refuse_address(name)
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # what files are broken in decides which kind it is
        if "trust_remote_code" in str(error):
            why = "it comes with code of its own, which is never run: give one whose code transformers has itself"
        elif not os.path.isdir(name):
            why = f"it is neither a folder with one nor a name on the hub that can be reached ({one_line(error, 200)})"
        elif kind := re.search(r"Unrecognized configuration class <class '.*\.(\w+)Config'>", str(error)):
            why = f"it is one of another kind, {kind[1]}: give another one, or what loads that kind"
        elif pointers := [path.name for path in Path(name).iterdir() if is_lfs_pointer(path)]:
            why = f"its file {pointers[0]} is a Git LFS pointer: fetch the content with `git lfs pull`"
        else:
            why = f"its files are not whole, or of something else ({one_line(error, 200)}): copy or download it again"
        raise ConfigurationError(f"Cannot load `{name}` as {what}: {why}.") from error


def remote(path: Any) -> bool:
    """Whether a path is an address.

    Example:
        >>> [remote(path) for path in ("s3://a/b", Path("http://a"), "a/http.ckpt", None)]
        [True, True, False, False]
    """
    return "://" in str(path) or str(path).startswith(("http:", "https:"))


def refuse_address(path: Any) -> None:
    """Refuse to read from elsewhere: a file from there may be anything, and another one the next time.

    Raises:
        ConfigurationError: If the path is an address.
    """
    if remote(path):
        raise ConfigurationError(
            f"{path} is an address, and everything is read from files: download it first, and give its path."
        )


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file says where Git LFS has its content, which has not been fetched."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs.github.com/spec/")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside and give it its name, or leave one that is the same, so that nobody reads a part of it."""
    content = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == content:
        return
    aside = path.with_name(f".{uuid4().hex}.part")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def quoted(value: Any) -> str:
    r"""A value as JSON, cut to a part of a line and without characters that a terminal would not show.

    Example:
        >>> print(quoted(["é", "\u202e"]), len(quoted("a" * 1_000_000)))
        ["é", "\u202e"] 80
    """
    text = ""
    # Piece by piece: the whole may be too long, or too deep for a recursion.
    for piece in json.JSONEncoder(ensure_ascii=False, default=lambda value: "?").iterencode(value):
        text += "".join(c if c.isprintable() else ascii(c)[1:-1] for c in piece[: QUOTED + 1])
        if len(text) > QUOTED:
            return f"{text[: QUOTED - 3]}..."
    return text
