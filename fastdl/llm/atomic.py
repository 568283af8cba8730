"""Files that appear whole or not at all.

The bytes go to a temporary file in the destination's own folder (a rename across file systems is a copy), are flushed
to the disk, and only then take the final name. Whatever goes wrong (an exception, Ctrl-C, a full disk) removes the
temporary file; a process that is killed outright leaves it behind under a name that ends in ``.part``, never under the
final name.

Tests: ``pytest tests/test_convert.py -k atomic``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_destination(dst: str | os.PathLike[str], overwrite: bool) -> Path:
    """The real path behind ``dst``, after checking that a file may be written there.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError
        ``dst`` is empty, is a folder, its folder is missing, it exists and ``overwrite`` is False, or it is a device,
        a pipe or a socket (which a rename would replace by a file: root's /dev/null, say).
    """
    if not os.fspath(dst):
        raise FileNotFoundError("the destination's name is empty; give the name of the file to write")
    path = Path(os.path.realpath(dst))  # through a symbolic link: the link stays, its target is replaced
    if path.is_dir():
        raise IsADirectoryError(f"{dst}: is a folder; give the name of the file to write")
    if not path.parent.is_dir():
        raise NotADirectoryError(f"{dst}: the folder {path.parent} does not exist")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{dst}: is not a regular file; give the name of the file to write")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{dst}: exists already; pass overwrite=True (--force on the command line) to replace it")
    return path


@contextmanager
def atomic_file(dst: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Context manager: yields the path of an empty temporary file, which becomes ``dst`` when the block ends well.

    Parameters
    ----------
    dst: the final name.
    overwrite: whether an existing file may be replaced. It stays as it is until the new one is complete.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError
        see :func:`check_destination`; FileExistsError also when the file came into being meanwhile.
    OSError
        from the file system, for example ENOSPC.

    Example
    -------
    >>> import tempfile
    >>> from pathlib import Path
    >>> folder = Path(tempfile.mkdtemp())
    >>> with atomic_file(folder / "a.txt") as part:
    ...     _ = part.write_text("whole")
    >>> (folder / "a.txt").read_text(), len(list(folder.iterdir()))
    ('whole', 1)
    """
    path = check_destination(dst, overwrite)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    os.close(
        os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    )  # 0o666: the umask decides, as for any new file
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        if path.exists() and not overwrite:
            raise FileExistsError(f"{dst}: another program created it meanwhile; nothing was replaced")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable. Some file systems refuse to sync a folder; the file is whole all the same."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
