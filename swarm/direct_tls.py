"""TLS 1.3 over a plain socket, for bytes that need not pass through p2pd: one channel, either end.

Neither end uses a certificate authority. The server's certificate is made anew at every start, for a key that lives in
this process only; the client knows its SHA-256 beforehand, from a channel that proved the server's peer id
(direct.py), and compares. The peer's own key signs nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import os
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

from paris_swarm.swarm.socket_stream import BareSocket
from paris_swarm.swarm.transport import StreamClosed, Unreachable

_BUFFER = 256 * 1024
"""Bytes encrypted or decrypted in one go on the event loop: 0.1 ms of it."""
CLOSE_S = 1.0
"""How long a close waits for TLS's own goodbye to leave, seconds."""


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate and its key. digest: SHA-256 of the certificate, 32 bytes."""

    certificate_pem: bytes
    key_pem: bytes
    digest: bytes

    def __repr__(self) -> str:
        return f"Certificate(digest={self.digest.hex()})"


def ephemeral_certificate() -> Certificate:
    """A fresh P-256 key and a certificate that says nothing about its owner."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    nobody = x509.Name([])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(nobody)
        .issuer_name(nobody)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Valid whatever the clocks say: what ends it is the end of this process.
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31))
        .sign(key, hashes.SHA256())
    )
    return Certificate(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest(),
    )


def server_context(certificate: Certificate) -> ssl.SSLContext:
    """TLS 1.3 only, no session to resume. The key touches the disk in a private folder, for the moment of loading."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    with tempfile.TemporaryDirectory(prefix="paris-swarm-") as folder:
        path = Path(folder) / "certificate.pem"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(certificate.key_pem + certificate.certificate_pem)
        context.load_cert_chain(path)
    return context


def client_context() -> ssl.SSLContext:
    """TLS 1.3 only. No chain is checked: ``TlsChannel.connect`` compares the certificate itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class TlsChannel:
    """The bytes inside a TLS connection; made by ``connect`` or ``accept``, which shake hands first."""

    def __init__(self, bare: BareSocket, context: ssl.SSLContext, *, server: bool) -> None:
        self._bare = bare
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._buffer = memoryview(bytearray(_BUFFER))
        self._writing = asyncio.Lock()
        self._closed = False

    @classmethod
    async def connect(cls, bare: BareSocket, context: ssl.SSLContext, digest: bytes) -> TlsChannel:
        """Shake hands with the owner of the certificate that has this SHA-256.

        Raises:
            Unreachable: somebody else answered. Nothing but a handshake was sent to them.
            StreamClosed: the handshake failed.
        """
        channel = cls(bare, context, server=False)
        await channel._shake_hands()
        shown = channel._tls.getpeercert(binary_form=True)
        if shown is None or hashlib.sha256(shown).digest() != digest:
            channel.abort()
            raise Unreachable(f"{bare.name} shows another certificate than the one that was agreed on")
        return channel

    @classmethod
    async def accept(cls, bare: BareSocket, context: ssl.SSLContext) -> TlsChannel:
        """Shake hands as the server. Raises StreamClosed."""
        channel = cls(bare, context, server=True)
        await channel._shake_hands()
        return channel

    async def receive(self, view: memoryview) -> int:
        """Read 1 to len(view) bytes; 0 when the other end said goodbye. Raises StreamClosed for a connection cut."""
        while True:
            got = 0
            try:
                while got < len(view):
                    size: int = self._tls.read(len(view) - got, view[got:])  # type: ignore[assignment]
                    if size == 0:  # the other end said goodbye
                        break
                    got += size
                return got
            except ssl.SSLWantReadError:
                if got:
                    return got
            except ssl.SSLError as error:
                if got:
                    return got  # the same error comes again at the next read
                raise StreamClosed(f"the connection with {self._bare.name} was cut: {error.reason}") from error
            if self._outgoing.pending:
                await self._flush()
            await self._fill()

    async def send(self, data: bytes | memoryview) -> None:
        """Encrypt and hand over all of ``data``. Raises StreamClosed."""
        view = memoryview(data)
        async with self._writing:
            while len(view):
                try:
                    size = self._tls.write(view[:_BUFFER])
                except ssl.SSLError as error:
                    raise StreamClosed(f"the connection with {self._bare.name} is closed: {error.reason}") from error
                view = view[size:]
                await self._bare.send(self._outgoing.read())

    async def close(self) -> None:
        """Say goodbye, so that the other end can tell an end from a cut; never raises."""
        if self._closed:
            return
        self._closed = True
        if not self._writing.locked():
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            with contextlib.suppress(StreamClosed, TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._flush()
        self.abort()

    def abort(self) -> None:
        """Let go at once."""
        self._closed = True
        self._bare.abort()

    async def _shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError as error:
                self.abort()
                raise StreamClosed(f"no TLS with {self._bare.name}: {error.reason}") from error
        await self._flush()

    async def _flush(self) -> None:
        async with self._writing:
            if self._outgoing.pending:
                await self._bare.send(self._outgoing.read())

    async def _fill(self) -> None:
        size = await self._bare.receive(self._buffer)
        if size:
            self._incoming.write(self._buffer[:size])
        else:
            self._incoming.write_eof()
