"""What p2pd says when it cannot do something, as errors of the transport."""

from __future__ import annotations

from paris_swarm.swarm.transport import NotHeld, PeerNotFound, TransportError, Unreachable


def stream_error(peer_id: str, error: Exception) -> TransportError:
    """Why no stream to a peer was opened: NotHeld, PeerNotFound or Unreachable."""
    if "protocols not supported" in str(error):
        return NotHeld(f"peer {peer_id} serves no files")
    if "routing: not found" in str(error) or "failed to find any peer" in str(error):
        return PeerNotFound(f"nobody we are connected to knows an address of peer {peer_id}")
    return Unreachable(f"peer {peer_id} does not answer: {one_line(error)}")


def one_line(error: Exception) -> str:
    """Its message on one line: what it tried, without its indentation."""
    return "; ".join(part.strip(" *") for part in str(error).splitlines() if part.strip())[:400]
