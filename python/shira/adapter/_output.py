"""Where results are written: what may be overwritten is decided first, and a folder is replaced as a whole.

Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shira._text import AdapterError
from shira.adapter import _file

MARK = ".shira-merged.json"
"""A file in a merged folder that lists the files we wrote, so that we know the folder as ours and unchanged."""
MARK_KEY = "shira.merged"
"""A key in the metadata of a merged file, for the same reason."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _inside(path: str, folder: str) -> bool:
    return path != folder and os.path.commonpath([path, folder]) == folder


def _mounted(path: str) -> bool:
    """Whether something is mounted there, including a bind mount of a single file."""
    if os.path.ismount(path):
        return True
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            points = [line.split(" ")[4] for line in file]
    except (OSError, IndexError):
        return False
    # Spaces in names are written as \040 there.
    return path in (re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point) for point in points)


def _files(source: str) -> Iterator[str]:
    """An input and, if it is a folder, the files in it."""
    yield source
    if os.path.isdir(source):
        paths = (os.path.join(source, name) for name in os.listdir(source))
        yield from (path for path in paths if not os.path.isdir(path))


def destination(
    out: str | os.PathLike[str],
    overwrite: bool,
    inputs: Iterable[str | os.PathLike[str]],
    foreign: Callable[[str], str | None],
    how: str,
) -> Path:
    """The real path of ``out``, with links resolved. Refuses what must not be overwritten, before anything is written.

    Args:
        inputs: files and folders that are read. Neither they, under whatever name, nor a folder that holds one are
            ever overwritten.
        foreign: says why what is there is not an earlier result of the same kind; None if it is one.
        how: how the user allows overwriting, for the message.
    """
    given, path = os.fspath(out), os.path.realpath(os.path.abspath(out))
    if not given:
        raise ValueError("the result needs a name, got an empty one")
    if given == "-":
        raise ValueError("the result is a file, and - would be the standard output; ./- is a file of that name")
    if os.path.islink(path):
        raise FileExistsError(f"{given} is a link that leads in a circle; remove it, or give another name")
    for source in (os.fspath(one) for one in inputs):
        if not os.path.exists(source):
            continue  # its reader will say so
        if os.path.exists(path) and any(os.path.exists(one) and os.path.samefile(one, path) for one in _files(source)):
            what = f"{source} itself" if os.path.samefile(source, path) else f"a part of {source}"
            raise AdapterError(f"{given} is {what}, which is read; write the result elsewhere")
        if any(_inside(os.path.realpath(one), path) for one in _files(source)):
            raise AdapterError(
                f"{given} is the folder that contains {source}, which is read; write the result elsewhere"
            )
    if not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(
            f"the folder {os.path.dirname(path)!r} to write {os.path.basename(path)!r} into does not exist"
        )
    if not os.path.lexists(path):
        return Path(path)
    if not overwrite:
        raise FileExistsError(f"{given} is there already; give another name, or {how}")
    with contextlib.suppress(FileNotFoundError):  # the working directory was deleted
        here = os.path.realpath(os.getcwd())
        if here == path or _inside(here, path):
            raise FileExistsError(f"{given} is the folder you are in, which cannot be replaced; give another name")
    if not stat.S_ISDIR(os.stat(path).st_mode) and not stat.S_ISREG(os.stat(path).st_mode):
        raise FileExistsError(f"{given} is a pipe or a device, not a file; give another name")
    if _mounted(path):
        raise FileExistsError(f"{given} is a mount point, which nothing can take the place of; give another name")
    reason = foreign(path)
    if reason is not None:
        raise FileExistsError(f"{given} {reason}, so it is not overwritten; remove it yourself, or give another name")
    return Path(path)


def no_adapter(path: str) -> str | None:
    """Why what is there is not an adapter file, or None."""
    if os.path.isdir(path):
        return "is a folder, and the result is a file"
    try:
        metadata, _ = _file.read_layout(path)
    except AdapterError:
        metadata = {}
    return None if _file.VERSION_KEY in metadata else "is not an adapter file"


def no_merged_file(path: str) -> str | None:
    """Why what is there is not a merged checkpoint of one file, or None."""
    if os.path.isdir(path):
        return "is a folder, and the merged checkpoint is a file"
    try:
        metadata, _ = _file.read_layout(path)
    except AdapterError:
        metadata = {}
    return None if MARK_KEY in metadata else "is not a merged checkpoint that was written here"


def no_merged_folder(path: str) -> str | None:
    """Why what is there is not a merged checkpoint's folder with nothing else in it, or None."""
    if not os.path.isdir(path):
        return "is a file, and the merged checkpoint is a folder"
    folder = Path(path)
    present = {str(one.relative_to(folder)): one for one in folder.rglob("*")}
    if not present:
        return None
    try:
        with open(folder / MARK, encoding="utf-8") as file:
            ours = {str(name) for name in json.load(file)["files"]} | {MARK}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "is not a merged checkpoint that was written here"
    others = sorted(name for name, one in present.items() if name not in ours or one.is_symlink())
    return f"holds what was not written with it ({', '.join(map(repr, others[:5]))})" if others else None


def no_peft_folder(path: str) -> str | None:
    """Why what is there is not a folder of PEFT's SHiRA, or an empty one, or None. Its other files stay as they are."""
    if not os.path.isdir(path):
        return "is a file, and PEFT's adapter is a folder"
    if not os.listdir(path):
        return None
    try:
        with open(os.path.join(path, "adapter_config.json"), encoding="utf-8") as file:
            kind = json.load(file)["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        kind = None
    return None if kind == "SHIRA" else "holds something else than an adapter of PEFT's SHiRA"


def _exchange(one: Path, two: Path) -> bool:
    """Exchange two names in one file system in a single step. Returns False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE)
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        return False  # this kernel or file system cannot do it
    raise OSError(number, os.strerror(number), str(two))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of writing, such as a full disk, name the result instead of the temporary file."""
    try:
        yield
    except OSError as error:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
        if error.errno is not None and (not names or any(f".{path.name}." in name for name in names)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def replacing_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder beside ``target``. On success it replaces ``target``, synced to disk; on failure it is
    deleted.

    The old folder is deleted last: if the process is killed at any moment, there is either the old folder or the new
    one. Something else that has appeared at ``target`` meanwhile is refused, as `destination` refuses it.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    old = temporary.with_suffix(".old")
    _file.sweep(target)
    try:
        with named(target):
            temporary.mkdir()
            yield temporary
            for path in (temporary, *temporary.rglob("*")):
                if path.is_dir():
                    _file.sync_folder(path)
                else:
                    _file.fsync(path, os.O_RDONLY)
            if os.path.lexists(target):
                reason = no_merged_folder(str(target)) if overwrite else "has come there meanwhile"
                if reason is not None:
                    raise FileExistsError(f"{target} {reason}, so it is not overwritten; give another name")
            if not os.path.lexists(target):
                os.rename(temporary, target)
            elif not _exchange(temporary, target):
                os.rename(target, old)
                os.rename(temporary, target)
            _file.sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.lexists(old):
            if os.path.lexists(target):
                shutil.rmtree(old, ignore_errors=True)
            else:  # the last step failed: put back what was there
                os.rename(old, target)
