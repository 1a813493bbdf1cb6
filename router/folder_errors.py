"""Every way in which an assembled folder can be refused.

FolderError(RecordError)
├── NotAssembled     no lock.json: not an assembled folder
├── LockRefused      lock.json cannot be read, or its signature fails
├── MissingFile      locked, but not there
├── ExtraFile        there, but not locked, or with no place in an assembled folder
├── NotPlainFile     a link, a device or the like
├── ChangedFile      other bytes than were locked
├── FolderDamaged    several of the last four; `problems` has each
├── OtherPlan        another plan than the one that was asked for
├── RecordRefused    a plan, announcement, manifest, weights file or config that fails its own check
└── LockDisagrees    the lock says something else than the records in the folder
"""

from __future__ import annotations

from typing import Any

from paris_swarm.dht_schemas.errors import RecordError


class FolderError(RecordError):
    """The assembled folder was refused; assemble it again."""

    rule = "R-DIR-0"

    def __init__(self, detail: str, *, where: str = "", rule: str | None = None) -> None:
        super().__init__(f"{where}: {detail}" if where else detail, rule=rule)
        self.where = where
        """The path it is about, relative to the folder."""
        self.what = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.where, self.rule)


def _rebuild(kind: type[FolderError], what: str, where: str, rule: str) -> FolderError:
    return kind(what, where=where, rule=rule)


class NotAssembled(FolderError):
    """This is not an assembled folder; name one that `assemble` wrote."""

    rule = "R-DIR-1"


class LockRefused(FolderError):
    """The folder's lock is damaged or was not signed by its assembler, so nothing in the folder can be trusted;
    assemble it again.
    """

    rule = "R-DIR-2"


class MissingFile(FolderError):
    """A file that was locked is not in the folder; assemble it again."""

    rule = "R-DIR-3"


class ExtraFile(FolderError):
    """The folder holds something that does not belong to it; move it elsewhere."""

    rule = "R-DIR-4"


class NotPlainFile(FolderError):
    """The folder holds a link or a special file where only plain files belong; assemble it again."""

    rule = "R-DIR-5"


class ChangedFile(FolderError):
    """A file was changed after it was locked; assemble the folder again."""

    rule = "R-DIR-6"


class FolderDamaged(FolderError):
    """Several files of the folder are not as they were locked; assemble it again."""

    rule = "R-DIR-7"
    problems: tuple[FolderError, ...] = ()


class OtherPlan(FolderError):
    """The folder was assembled from another plan than the one you named."""

    rule = "R-DIR-8"


class RecordRefused(FolderError):
    """A record or a weights file in the folder fails its own check, although the folder is as its assembler locked it:
    do not trust this assembler; assemble it yourself.
    """

    rule = "R-DIR-9"


class LockDisagrees(FolderError):
    """The lock says something else than the records in the folder: do not trust this assembler; assemble it
    yourself.
    """

    rule = "R-DIR-10"
