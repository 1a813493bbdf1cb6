"""The greeting that opens a stream: which swarm this is about, why its sender may take part, and the news.

The first message of either side (swarm/wire.py frames it). Everything in it is verified before it is used; a greeting
is bound to its sender by the channel, which proves the peer id at the other end.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from paris_swarm.dht_schemas.canonical import canonical_json, parse_json
from paris_swarm.dht_schemas.errors import MalformedRecord, RecordTooLarge
from paris_swarm.dht_schemas.fields import Digest, Model, Token, array, read_model
from paris_swarm.dht_schemas.notice import MAX_NOTICE
from paris_swarm.dht_schemas.records import MAX_RECORD

MAX_GREETING = 128 * 1024
"""Bytes of a greeting."""
MAX_PROOFS = 4
"""Proofs of equivocation in one greeting."""

EnvelopeText = Annotated[str, Field(max_length=MAX_RECORD)]


class Greeting(Model):
    """What one side of a stream says of itself. Every field may be absent."""

    plan: Digest | None = None
    token: Token | None = None
    """Admission token of the sender, or of the peer that ``delegation`` speaks for."""
    delegation: EnvelopeText | None = None
    """An observer's: the envelope by which a peer lets this throw-away key read in its name."""
    notice: Annotated[str, Field(max_length=MAX_NOTICE)] | None = None
    """The organiser's newest notice that the sender knows, verbatim."""
    proofs: Annotated[
        tuple[Annotated[tuple[EnvelopeText, EnvelopeText], Field(strict=False)], ...], *array(MAX_PROOFS)
    ] = ()
    """Proofs of equivocation: pairs of envelopes, verbatim."""

    def to_bytes(self) -> bytes:
        """Canonical JSON; nothing at all for a greeting that says nothing. Raises ValueError above MAX_GREETING."""
        said = {name: value for name, value in self.model_dump().items() if value not in (None, ())}
        data = canonical_json(said) if said else b""
        if len(data) > MAX_GREETING:
            raise ValueError(f"this greeting would have {len(data)} bytes, at most {MAX_GREETING} are allowed")
        return data

    @classmethod
    def of_bytes(cls, data: bytes) -> Greeting:
        """Read a greeting. Raises RecordTooLarge (R-GRT-1), MalformedRecord (R-GRT-2)."""
        if len(data) > MAX_GREETING:
            raise RecordTooLarge(f"a greeting of {len(data)} bytes, at most {MAX_GREETING} are allowed", rule="R-GRT-1")
        if not data:
            return cls()
        greeting = read_model(cls, data, rule="R-GRT-2")
        if canonical_json(parse_json(data)) != data:
            raise MalformedRecord("a greeting that is not canonical JSON", rule="R-GRT-2")
        return greeting
