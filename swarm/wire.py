"""The file protocol ``/paris-swarm/files/3``, sans I/O: bytes in, requests or responses out; no socket, no clock.

All integers are big-endian. Either side opens with a hello and one greeting (greeting.py says what is in it) and sends
nothing before them (R-WIRE-3). The server MUST NOT send its own before it has judged the client's; the client MUST NOT
send a request before it has judged the server's.

    hello     8 bytes   "PSWF" | version u16 = 3 | reserved u16 = 0
    greeting  8 bytes   verdict u8 (0 welcome, 1 not admitted) | reserved u8 = 0, u16 = 0 | length u32, then the payload
    request  48 bytes   kind u8 (1 blob, 2 chunk) | reserved u8 = 0 | file u16 | chunk u32 | offset u32 | length u32 |
                        digest 32 bytes
    response 12 bytes   status u8 | encoding u8 (0 to 3) | reserved u16 = 0 | length u32 | payload u32, payload

  R-WIRE-4  a blob request names a blob by its digest (plan.json by plan id, a manifest by its root); file = chunk = 0
  R-WIRE-5  a chunk request names (root or plan id, index of the file in its manifest or plan, index of the chunk)
  R-WIRE-6  responses come in the order of the requests; a response nobody asked for is an error
  R-WIRE-7  status 0 ok, 1 not held, 2 busy, 3 damaged (the server's own copy fails its digest); all but 0 carry nothing
  R-WIRE-8  length is what the payload stands for, at most what the request can ask for; raw: payload = length;
      encoding 1: one zstd frame that states its content size = length, payload < length; 2 and 3: the same over the
      byte planes of elements of 2 and 4 bytes (encoding.py). Nothing longer is ever allocated
  R-WIRE-2  the digest decides: a receiver MUST hash what it got before using it
  R-WIRE-9  a greeting has at most 128 KiB; after a verdict other than welcome its sender sends nothing more and closes
  R-WIRE-10 a request asks for ``length`` bytes of the blob or chunk from ``offset`` on, as far as it goes: the whole or
      a part where streams end early. offset: a multiple of PART; length: PART to one chunk

An error is final: a reader that raised BadFrame raises it again for everything after.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum, auto

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.greeting import MAX_GREETING
from paris_swarm.swarm.encoding import best_width, pack, unpack

VERSION = 3
MAGIC = b"PSWF"
MAX_PAYLOAD = CHUNK
"""Largest payload of any response, bytes: one chunk. Plans and manifests (at most 1 MiB) fit."""
PART = 16 * 1024
"""The least that a request asks for, bytes, and what its offset is a multiple of: a server reads and hashes a whole
chunk for it (R-WIRE-10).
"""

_HELLO = struct.Struct(">4sHH")
_GREETING = struct.Struct(">BBHI")
_REQUEST = struct.Struct(">BBHIII32s")
_RESPONSE = struct.Struct(">BBHII")

HELLO = _HELLO.pack(MAGIC, VERSION, 0)
REQUEST_SIZE = _REQUEST.size


class BadFrame(RecordError):
    """The other end does not speak the file protocol as it should: it was disconnected."""

    rule = "R-WIRE-1"


class RequestKind(IntEnum):
    """What a request asks for."""

    BLOB = 1
    CHUNK = 2


class Status(IntEnum):
    """What a server says about one request."""

    OK = 0
    NOT_HELD = 1
    BUSY = 2
    DAMAGED = 3


class Verdict(IntEnum):
    """What the sender of a greeting makes of the other end."""

    WELCOME = 0
    NOT_ADMITTED = 1


class Encoding(IntEnum):
    """How a payload is written."""

    RAW = 0
    ZSTD = 1
    PLANES_2 = 2
    PLANES_4 = 3


@dataclass(frozen=True)
class GreetingFrame:
    """The one greeting of either side. payload: canonical JSON, or empty when there is nothing to say."""

    payload: bytes = b""
    verdict: Verdict = Verdict.WELCOME

    def to_bytes(self) -> bytes:
        """Hello and greeting as they open a stream. Raises ValueError for a payload above MAX_GREETING."""
        if len(self.payload) > MAX_GREETING:
            raise ValueError(f"a greeting of {len(self.payload)} bytes; the most is {MAX_GREETING}")
        return HELLO + _GREETING.pack(self.verdict, 0, 0, len(self.payload)) + self.payload


OPENING = GreetingFrame().to_bytes()
"""Hello and an empty greeting."""


_WIDTHS = {Encoding.ZSTD: 1, Encoding.PLANES_2: 2, Encoding.PLANES_4: 4}


@dataclass(frozen=True)
class Request:
    """One request. digest: 64 lower-case hex digits; file and chunk are 0 for a blob.

    offset, length: which bytes of the blob or chunk, clipped to what there is; as they are: all of them.
    """

    kind: RequestKind
    digest: str
    file: int = 0
    chunk: int = 0
    offset: int = 0
    length: int = MAX_PAYLOAD

    def to_bytes(self) -> bytes:
        """The 48 bytes on the wire. Raises ValueError for a field out of range."""
        digest = bytes.fromhex(self.digest)
        place_fits = 0 <= self.file < 1 << 16 and 0 <= self.chunk < 1 << 32
        if len(digest) != 32 or not place_fits or not _is_part(self.offset, self.length):
            raise ValueError(f"no such request on the wire: {self}")
        return _REQUEST.pack(self.kind, 0, self.file, self.chunk, self.offset, self.length, digest)


@dataclass(frozen=True)
class Response:
    """One response. length: bytes the payload stands for once decoded."""

    status: Status
    encoding: Encoding = Encoding.RAW
    length: int = 0
    payload: bytes | memoryview = b""

    def header(self) -> bytes:
        """The 12 bytes before the payload."""
        return _RESPONSE.pack(self.status, self.encoding, 0, self.length, len(self.payload))


class _Opening(Enum):
    """How far the opening of a stream has come."""

    HELLO = auto()
    GREETING_HEAD = auto()
    GREETING = auto()
    DONE = auto()


class _Reader(ABC):
    """Gathers exactly the bytes of the next piece. ``wants`` is how many are still missing (0: nothing is due)."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._room: memoryview | None = None
        self._gathered = 0
        self._opening = _Opening.HELLO
        self._greeting_head = (Verdict.WELCOME, 0)
        self._greeting: GreetingFrame | None = None
        self._failed: BadFrame | None = None

    @abstractmethod
    def _next_size(self) -> int:
        """Bytes of the piece due next; 0 when nothing is due."""

    @property
    def wants(self) -> int:
        """How many bytes to read before anything can come out; never more than one payload."""
        return max(0, self._due() - self._gathered)

    @property
    def greeting(self) -> GreetingFrame | None:
        """What the other end said of itself; None until all of it has come."""
        return self._greeting

    def _due(self) -> int:
        match self._opening:
            case _Opening.HELLO:
                return _HELLO.size
            case _Opening.GREETING_HEAD:
                return _GREETING.size
            case _Opening.GREETING:
                return self._greeting_head[1]
            case _Opening.DONE:
                return self._next_size()

    def _take(self, data: bytes | memoryview) -> None:
        """Cut incoming bytes into pieces; each piece may change the size of the next one."""
        if self._failed is not None:
            raise self._failed
        view = memoryview(data)
        try:
            while len(view):
                missing = self.wants
                if missing == 0:
                    raise BadFrame(f"{len(view)} bytes came that nobody asked for")
                taken = view[:missing]
                if self._room is not None:
                    self._room[self._gathered : self._gathered + len(taken)] = taken
                else:
                    self._pieces.append(bytes(taken))
                view = view[missing:]
                self._came(len(taken))
        except BadFrame as error:
            self._failed = error
            raise

    def _came(self, size: int) -> None:
        """So many more bytes of the piece are here; take it when it is whole."""
        self._gathered += size
        if self.wants:
            return
        room, pieces = self._room, self._pieces
        self._room, self._pieces, self._gathered = None, [], 0
        if room is not None:
            self._piece(room)
        elif self._opening is _Opening.DONE:
            self._piece(b"".join(pieces))
        else:
            self._open(b"".join(pieces))

    def _open(self, piece: bytes) -> None:
        """Hello, head of the greeting, greeting."""
        if self._opening is _Opening.HELLO:
            _check_hello(piece)
            self._opening = _Opening.GREETING_HEAD
            return
        if self._opening is _Opening.GREETING_HEAD:
            verdict, reserved, reserved_too, length = _GREETING.unpack(piece)
            if verdict not in iter(Verdict) or reserved or reserved_too:
                raise BadFrame(f"a greeting of unknown verdict {verdict} (reserved {reserved}, {reserved_too})")
            if length > MAX_GREETING:
                raise BadFrame(f"a greeting of {length} bytes; the most is {MAX_GREETING}")
            self._greeting_head = (Verdict(verdict), length)
            self._opening = _Opening.GREETING
            if length > 0:
                return
            piece = b""
        self._greeting = GreetingFrame(piece, self._greeting_head[0])
        self._opening = _Opening.DONE

    @abstractmethod
    def _piece(self, piece: bytes | memoryview) -> None:
        """Take one whole piece. Raises BadFrame."""


class RequestReader(_Reader):
    """The server's ear: hello, greeting, then requests."""

    def __init__(self) -> None:
        super().__init__()
        self._requests: list[Request] = []

    def _next_size(self) -> int:
        return _REQUEST.size

    def _piece(self, piece: bytes | memoryview) -> None:
        kind, reserved, file, chunk, offset, length, digest = _REQUEST.unpack(piece)
        if kind not in iter(RequestKind) or reserved != 0:
            raise BadFrame(f"a request of unknown kind {kind} (reserved byte {reserved})")
        if kind == RequestKind.BLOB and (file or chunk):
            raise BadFrame(f"a blob request with file {file}, chunk {chunk}: both must be 0")
        if not _is_part(offset, length):
            raise BadFrame(f"a request for {length} bytes from {offset} on", rule="R-WIRE-10")
        self._requests.append(Request(RequestKind(kind), digest.hex(), file, chunk, offset, length))

    def receive(self, data: bytes | memoryview) -> list[Request]:
        """Requests that these bytes complete. Raises BadFrame."""
        self._take(data)
        done, self._requests = self._requests, []
        return done


class ResponseReader(_Reader):
    """The client's ear: hello, greeting, then one response for each expected one, in order.

    A payload has its memory from the moment its head was read, and may be read straight into it (``space``,
    ``filled``): between the socket and the digest it is not copied.

    Args:
        memory: gives memory of a payload's size, which goes out with the response.
    """

    def __init__(self, memory: Callable[[int], memoryview] = lambda size: memoryview(bytearray(size))) -> None:
        super().__init__()
        self._memory = memory
        self._limits: deque[tuple[int, int]] = deque()
        self._head: tuple[Status, Encoding, int, int] | None = None
        self._responses: list[Response] = []

    def expect(self, least: int, most: int) -> None:
        """One request was sent whose answer decodes to ``least`` to ``most`` bytes."""
        if not 0 <= least <= most <= MAX_PAYLOAD:
            raise ValueError(f"a response of {least} to {most} bytes cannot be expected; the most is {MAX_PAYLOAD}")
        self._limits.append((least, most))

    def _next_size(self) -> int:
        if self._head is not None:
            return self._head[3]
        return _RESPONSE.size if self._limits else 0

    def _piece(self, piece: bytes | memoryview) -> None:
        if self._head is None:
            self._head = self._parse_head(piece)
            if self._head[3] > 0:
                self._room = self._memory(self._head[3])
                return
            piece = b""
        status, encoding, length, _size = self._head
        self._head = None
        self._limits.popleft()
        self._responses.append(Response(status, encoding, length, piece))

    def _parse_head(self, piece: bytes | memoryview) -> tuple[Status, Encoding, int, int]:
        status, encoding, reserved, length, size = _RESPONSE.unpack(piece)
        least, most = self._limits[0]
        if status not in iter(Status) or encoding not in iter(Encoding) or reserved != 0:
            raise BadFrame(f"a response of unknown status {status} or encoding {encoding}")
        if status != Status.OK:
            if length or size or encoding:
                raise BadFrame(f"a response of status {Status(status).name} that carries {size} bytes")
        elif not least <= length <= most:
            raise BadFrame(f"a response of {length} bytes where {least} to {most} were asked for")
        elif size != length if encoding == Encoding.RAW else not 0 < size < length:
            raise BadFrame(f"a {Encoding(encoding).name} payload of {size} bytes for {length}")
        return Status(status), Encoding(encoding), length, size

    def receive(self, data: bytes | memoryview) -> list[Response]:
        """Responses that these bytes complete. Raises BadFrame."""
        self._take(data)
        return self._done()

    @property
    def space(self) -> memoryview:
        """Where the rest of the payload goes that is due; empty while something else is."""
        return memoryview(b"") if self._room is None else self._room[self._gathered :]

    def filled(self, size: int) -> list[Response]:
        """``size`` bytes were read into ``space``: the response that they complete."""
        if not 0 < size <= len(self.space):
            raise ValueError(f"{size} bytes cannot have come into a space of {len(self.space)}")
        self._came(size)
        return self._done()

    def _done(self) -> list[Response]:
        done, self._responses = self._responses, []
        return done


def _is_part(offset: int, length: int) -> bool:
    """Whether a request may name these bytes (R-WIRE-10)."""
    return 0 <= offset < MAX_PAYLOAD and offset % PART == 0 and PART <= length <= MAX_PAYLOAD


def _check_hello(piece: bytes) -> None:
    magic, version, reserved = _HELLO.unpack(piece)
    if magic != MAGIC:
        raise BadFrame(f"the stream opens with {piece!r}, not with the hello of the file protocol")
    if version != VERSION or reserved != 0:
        raise BadFrame(f"the peer speaks version {version} of the file protocol, this node speaks {VERSION}")


def encode_payload(data: bytes, *, compress: bool = True) -> Response:
    """The response for ``data``: packed when that makes it at least a twentieth smaller, else (or unless ``compress``)
    raw.
    """
    if len(data) > MAX_PAYLOAD:
        raise ValueError(f"{len(data)} bytes do not fit one response; the most is {MAX_PAYLOAD}")
    width = best_width(data) if compress and data else None
    if width is not None:
        packed = pack(data, width)
        if len(packed) < len(data):
            encoding = next(encoding for encoding, of in _WIDTHS.items() if of == width)
            return Response(Status.OK, encoding, len(data), packed)
    return Response(Status.OK, Encoding.RAW, len(data), data)


def decode_payload(response: Response) -> bytes | memoryview:
    """The bytes an OK response stands for, exactly ``length`` of them. Raises BadFrame (R-WIRE-8)."""
    if response.encoding == Encoding.RAW:
        return response.payload
    try:
        return unpack(response.payload, _WIDTHS[response.encoding], response.length)
    except ValueError as error:
        raise BadFrame(str(error)) from error
