"""Exit codes (docs/exit-codes.md) and the errors that lead to them."""

from __future__ import annotations

import errno

OK = 0
BUG = 1
USAGE = 2
UNREACHABLE = 3
UNVERIFIED = 4
INCOMPLETE = 5
DISK = 6
INTERRUPTED = 130

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}
_WRONG_PATHS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


class Incomplete(Exception):
    """The swarm lacks something that was asked for: the message names the missing slots."""


class Usage(Exception):
    """The command line asks for something impossible: the message says what to type instead."""


class ProcessFailed(Exception):
    """A process of the demo ended in error; the message shows its last words and names its log."""


class Unverified(Exception):
    """Something did not verify; the message names it."""


def words(error: BaseException) -> str:
    """The message of an error a person can meet; errors of the operating system get a way out.

    What a plan or a peer said may stand in it: a terminal gets none of it that it would act on.
    """
    return _shown(_words(error))


def _shown(text: str) -> str:
    from paris_swarm.dht_schemas.fields import is_printable

    if is_printable(text.replace("\n", "")):
        return text
    return "".join(
        each if each == "\n" or is_printable(each) else each.encode("unicode_escape").decode() for each in text
    )


def _words(error: BaseException) -> str:
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}{error.strerror}; choose a place that you may write to"
    if error.errno in _DISK_ERRORS:
        return f"{where}{error.strerror}; free some space, or choose another place, then run the same command again"
    return f"{where}{error.strerror}"


def exit_code(error: BaseException) -> int | None:
    """The documented code for an error a person can meet; None for a bug of ours.

    The error classes of the other rooms are looked up by name along the class tree, so that this stays importable
    without torch or hivemind (`--help` must be fast).
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, Incomplete) or "MissingExperts" in names:
        return INCOMPLETE
    if isinstance(error, Unverified) or names & {"RecordError", "FolderError"}:
        return UNVERIFIED
    if "TransportError" in names:
        return UNREACHABLE
    if "HomeError" in names:
        return DISK if isinstance(error.__cause__, OSError) and error.__cause__.errno in _DISK_ERRORS else USAGE
    if isinstance(error, OSError):
        return DISK if error.errno in _DISK_ERRORS else USAGE if error.errno in _WRONG_PATHS else None
    if isinstance(error, Usage | ValueError):
        return USAGE
    if isinstance(error, ProcessFailed):
        return BUG
    return None
