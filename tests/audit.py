"""What a stranger's files must never make a process do, watched by an audit hook of Python."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUNNING = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn"}
CONNECTING = {"socket.connect", "urllib.Request"}
CHANGING = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CANARY = "canary_of_a_stranger"
"""Stands in every text of a stranger's that would be code: none that holds it may be compiled."""

WATCHED: list[tuple[str, Any]] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHED is None or (event == "subprocess.Popen" and "print(json.dumps(sys.path))" in str(arguments[1])):
        return  # (the parser asks another Python for its path, to find the types of built-in functions)
    if event in RUNNING | CONNECTING or (event == "compile" and CANARY in str(arguments[0])):
        WATCHED.append((event, arguments[:2]))
    elif event in CHANGING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
        WATCHED.extend((event, path) for path in arguments[:2] if isinstance(path, str | bytes | Path))


sys.addaudithook(_watch)  # there is no way to take it away again, so it idles where nothing is watched


@contextmanager
def nothing_run_or_written_outside(*folders: Path) -> Iterator[None]:
    """Fail if a program or a text with the canary is run, an address asked, or anything changed outside of folders."""
    global WATCHED
    WATCHED = []
    try:
        yield
        seen = WATCHED
    finally:
        WATCHED = None
    outside = [
        (event, found)
        for event, found in seen
        if event in RUNNING | CONNECTING | {"compile"} or not kept(os.fsdecode(found), (*folders, Path("/dev")))
    ]
    assert not outside, outside


def kept(path: str, folders: tuple[Path, ...]) -> bool:
    """Whether a file lies in a folder, or is what Python keeps for itself."""
    inside = any(Path(path).resolve().is_relative_to(folder.resolve()) for folder in folders)
    return inside or "__pycache__" in path
