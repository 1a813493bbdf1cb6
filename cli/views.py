"""Pure state -> renderable. Nothing here prints, waits or asks the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from paris_swarm.router.cluster_report import ClusterReport
    from paris_swarm.swarm.peer import LaneState
    from paris_swarm.swarm.status import SlotStatus, SwarmStatus

BAR = 8


def short(peer: str) -> str:
    """The last eight characters of a peer id: enough to tell peers apart at a glance."""
    return peer[-8:]


def bar(done: float) -> str:
    """A progress bar of BAR cells for a share between 0 and 1."""
    full = max(0, min(BAR, round(done * BAR)))
    return "█" * full + "░" * (BAR - full)


def steps(count: int) -> str:
    """A number of steps in at most five characters: 950, 9500, 123k."""
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"


def size(count: float) -> str:
    """Bytes for people: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def dashboard(status: SwarmStatus, *, lanes: Sequence[LaneState] = (), own: str = "") -> Group:
    """The swarm as one table (80 columns are enough), and below it what this peer, marked *, is doing.

    Claims and their progress are what peers say; a checkpoint counts as verified only where it was downloaded.
    """
    table = Table(
        title=Text(f"{status.name}  {status.plan[:12]}", style="table.title"),  # no markup is read in a plan's name
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
        show_edge=False,
    )
    for heading, justify in (
        ("slot", "left"),
        ("peer", "left"),
        ("progress", "left"),
        ("loss", "right"),
        ("img/s", "right"),
        ("lease", "right"),
        ("checkpoint", "left"),
        ("probe", "right"),
    ):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for slot in status.slots:
        for row in _slot_rows(slot, own):
            table.add_row(*row)
    lines: list[Any] = [table, *_news(status)]
    for lane in lanes:
        where = f" {lane.slot}" if lane.slot is not None and lane.slot != lane.lane else ""
        note = f"  {lane.note}" if lane.note else ""
        lines.append(Text(f"this peer, {lane.lane}{where}: {lane.phase}{note}"))
    return Group(*lines)


def _news(status: SwarmStatus) -> list[Text]:
    """What outranks the table: the organiser's last notice, and who was proven to equivocate."""
    lines: list[Text] = []
    notice = status.notice
    if notice is not None and (notice.state != "running" or notice.message or notice.revoked or notice.contradicted):
        said = f": {notice.message}" if notice.message else ""
        lines.append(Text(f"notice {notice.number}: the swarm is {notice.state}{said}"))
        if notice.revoked:
            lines.append(Text(f"revoked: {', '.join(short(peer) for peer in notice.revoked)}"))
        if notice.contradicted:
            lines.append(Text(f"the organiser signed two notices {notice.number}: both count where they are stricter"))
    for outlaw in status.outlaws:
        lines.append(Text(f"out: {short(outlaw.peer)} signed two {outlaw.kind}s {outlaw.seq} for slot {outlaw.slot}"))
    return lines


def _slot_rows(slot: SlotStatus, own: str) -> list[tuple[str, ...]]:
    held = slot.checkpoint
    last: tuple[str, ...] = ("-", "")
    if held is not None:
        copies = f" x{held.holders}" if held.holders > 1 else ""
        last = (f"{steps(held.step)} {held.root[:6]}{copies}", f"{held.probe_loss:.4f}")
    if not slot.claims:
        return [(slot.slot, "free" if held is None else short(held.author), "", "", "", "", *last)]
    rows: list[tuple[str, ...]] = []
    for index, claim in enumerate(slot.claims):
        share = "stale ".ljust(BAR) if claim.stale else bar(claim.step / max(1, claim.steps))
        rows.append(
            (
                slot.slot if index == 0 else "",
                short(claim.peer) + ("*" if claim.peer == own else ""),
                f"{share} {steps(claim.step)}/{steps(claim.steps)}",
                "" if claim.loss is None else f"{claim.loss:.4f}",
                f"{claim.images_per_s:.0f}",
                f"{max(0.0, claim.lease_left_s):.0f} s",
                *(last if index == 0 else ("", "")),
            )
        )
    return rows


def partition_table(report: ClusterReport) -> Table:
    """The cluster report of `init`."""
    table = Table(title="Clusters", title_justify="left", pad_edge=False)
    for heading in ("cluster", "rows", "share", "silhouette"):
        table.add_column(heading, justify="right")
    table.add_column("mostly", justify="left")
    for cluster, (rows, share) in enumerate(zip(report.sizes, report.shares, strict=True)):
        found = sorted((report.families or [{}] * len(report.sizes))[cluster].items(), key=lambda item: -item[1])
        mostly = ", ".join(f"{name} {count / rows:.0%}" for name, count in found[:3])
        table.add_row(str(cluster), str(rows), f"{share:.1%}", _score(report.silhouettes[cluster]), mostly)
    table.add_row("all", str(sum(report.sizes)), "100%", _score(report.silhouette), "")
    return table


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def picture(pixels: Any, *, columns: int | None = None) -> Text:
    """uint8 [H, W, 3] as half blocks: two pixels a character cell."""
    image = pixels
    if columns is not None and image.shape[1] > columns:
        stride = -(-image.shape[1] // columns)
        image = image[::stride, ::stride]
    text = Text()
    for y in range(0, image.shape[0] - 1, 2):
        for x in range(image.shape[1]):
            top, bottom = image[y, x], image[y + 1, x]
            text.append("▀", style=f"rgb({top[0]},{top[1]},{top[2]}) on rgb({bottom[0]},{bottom[1]},{bottom[2]})")
        text.append("\n")
    return text
