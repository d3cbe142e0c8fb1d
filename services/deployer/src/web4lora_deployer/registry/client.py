"""The registry's API: is a blob there, upload it, put the manifest. What is there is never sent again."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit, urlunsplit

import httpx2
from web4lora_chassis.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidInput,
    ResourceExhausted,
    Unavailable,
    Web4Error,
)

from web4lora_deployer.registry.login import Credentials, Login, denied
from web4lora_deployer.registry.oci import Blob
from web4lora_deployer.registry.patience import BUSY, Patience, busy
from web4lora_deployer.registry.reference import Reference
from web4lora_deployer.registry.session import Session

log = logging.getLogger(__name__)

T = TypeVar("T")
Advance = Callable[[int], None]
Body = Callable[[], Iterator[bytes]]

CHUNK_BYTES = 16 << 20
_PIECE_BYTES = 1 << 18
_TIMEOUT = httpx2.Timeout(120.0, connect=10.0)
_DENIED = (401, 403)
_NO_CHUNKS = (400, 404, 405, 411, 413, 415, 501)
_OUT_OF_STEP = (404, 416)
_FULL = ("no space left", "disk quota exceeded")


class Registry:
    """One repository of a registry. Every call has a time limit and raises our errors.

    A large blob goes up in chunks. After a broken connection the registry is asked how far it got, and the
    upload goes on from there, also in a later call: the address of an unfinished upload is kept in a file. A
    registry that takes no chunks gets the blob in one piece.

    Args:
        place: The registry and the repository.
        credentials: Who we are there.
        unfinished: A folder for the addresses of unfinished uploads.
        plain_http: Speak without TLS also to a registry beyond this machine.
    """

    def __init__(
        self, place: Reference, credentials: Credentials, unfinished: Path, *, plain_http: bool = False
    ) -> None:
        self._place = place
        self._base = place.address(plain_http=plain_http)
        # Proxies and certificates of the environment are for the world outside, not for this machine.
        self._http = httpx2.Client(timeout=_TIMEOUT, trust_env=not place.loopback)
        self._login = Login(
            credentials, self._http, place.repository, plain_http=self._base.startswith("http:")
        )
        self._unfinished = unfinished
        self.sent_bytes = 0
        """Bytes of blobs sent so far, those sent twice counted twice."""

    def __enter__(self) -> Self:
        """Return the registry; leaving the block closes its connections."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self._http.close()

    def manifest_digest(self, tag: str, media_type: str) -> str:
        """Return the digest of what a tag stands for; empty when there is no such tag."""
        url = self._url(f"manifests/{tag}")
        answer = self._again(lambda: self._send("HEAD", url, headers={"Accept": media_type}))
        if answer.status_code == httpx2.codes.NOT_FOUND:
            return ""
        if answer.status_code != httpx2.codes.OK:
            raise self._refused("say what it has", answer)
        return str(answer.headers.get("Docker-Content-Digest", ""))

    def put_manifest(self, tag: str, manifest: bytes, media_type: str) -> None:
        """Put a manifest under a tag, which from then on means this one.

        Raises:
            DataLoss: The registry has another manifest than was sent.
        """
        url, headers = (
            self._url(f"manifests/{tag}"),
            {"Content-Type": media_type, "Content-Length": str(len(manifest))},
        )
        answer = self._again(lambda: self._send("PUT", url, lambda: iter([manifest]), headers))
        if not answer.is_success:
            raise self._refused("take the manifest", answer)
        wanted = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        found = self.manifest_digest(tag, media_type)
        if found != wanted:
            raise DataLoss(f"{self._place} is {found or 'nothing'} there, not {wanted}.", fix="Push again.")

    def has_blob(self, blob: Blob) -> bool:
        """Say whether a blob is there."""
        url = self._url(f"blobs/sha256:{blob.sha256}")
        answer = self._again(lambda: self._send("HEAD", url, follow=True))
        if answer.status_code in (httpx2.codes.OK, httpx2.codes.NOT_FOUND):
            return answer.status_code == httpx2.codes.OK
        raise self._refused("look for a blob", answer)

    def put_blob(self, blob: Blob, advance: Advance) -> None:
        """Upload a blob unless it is there.

        Args:
            blob: What to upload.
            advance: Called with the number of bytes that were just sent, or were there already.

        Raises:
            DataLoss: Other bytes arrived than were meant.
            ResourceExhausted: The registry is full.
            Unauthenticated: It does not let us push.
            Unavailable: It is out of reach; the next call goes on where this one ended.
        """
        progress = _Progress(advance)
        if not self.has_blob(blob):
            in_chunks = blob.size_bytes > CHUNK_BYTES and self._put_chunks(blob, progress)
            if not in_chunks:
                self._again(lambda: self._put_whole(blob, progress))
        progress.at(blob.size_bytes)

    def _put_whole(self, blob: Blob, progress: _Progress) -> None:
        """Send a blob in one piece."""
        address = self._begin()
        self._end(address, blob, self._part(blob, 0, blob.size_bytes, progress), blob.size_bytes)

    def _put_chunks(self, blob: Blob, progress: _Progress) -> bool:
        """Send a blob chunk by chunk, on from where an earlier upload ended; False if none are taken here."""
        session = Session(self._unfinished, self._place, blob.sha256)
        address, done = self._again(lambda: self._resume(session))
        patience = Patience()
        while done < blob.size_bytes:
            size = min(CHUNK_BYTES, blob.size_bytes - done)
            progress.at(done)
            try:
                answer = self._send_chunk(address, self._part(blob, done, size, progress), done, size)
            except Unavailable as error:
                patience.wait(error)
                address, done = self._again(lambda: self._resume(session))
                continue
            if answer is None:
                session.forget()
                return False
            address, done = self._location(answer, address), done + size
            session.keep(address)
            patience = Patience()
        self._end_chunks(address, blob)
        session.forget()
        return True

    def _end_chunks(self, address: str, blob: Blob) -> None:
        """End an upload whose chunks have all arrived."""
        patience = Patience()
        while True:
            try:
                self._end(address, blob, lambda: iter(()), 0)
            except Unavailable as error:
                patience.wait(error)
                if not self.has_blob(blob):
                    continue  # else the answer was lost, not the blob
            return

    def _send_chunk(self, address: str, part: Body, start: int, size: int) -> httpx2.Response | None:
        """Send one chunk; None when the registry takes none at all.

        Raises:
            Unavailable: Broken off, or out of step with the registry: ask it how far it got.
        """
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"{start}-{start + size - 1}",
            "Content-Length": str(size),
        }
        answer = self._send("PATCH", address, part, headers)
        if answer.status_code == httpx2.codes.ACCEPTED:
            return answer
        if start == 0 and answer.status_code in _NO_CHUNKS:
            log.info("%s takes no chunks: HTTP %d", self._place.host, answer.status_code)
            return None
        if answer.status_code in _OUT_OF_STEP:
            raise Unavailable(
                f"{self._place.host} lost the upload: {_said(answer)}",
                fix="Try again: it starts anew, or goes on where the registry is.",
                reason="REGISTRY_UNAVAILABLE",
            )
        raise self._refused("take the model's file", answer)

    def _resume(self, session: Session) -> tuple[str, int]:
        """Return the address of the upload and how much has arrived; a new one when none is unfinished."""
        address = session.address()
        if address:
            answer = self._send("GET", address)
            if answer.status_code == httpx2.codes.NO_CONTENT:
                arrived = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("Range", ""))
                last = int(arrived[1]) if arrived else 0
                return self._location(answer, address), last + 1 if last else 0
        address = self._begin()
        session.keep(address)
        return address, 0

    def _begin(self) -> str:
        """Open an upload; return its address."""
        url = self._url("blobs/uploads/")
        answer = self._send("POST", url, headers={"Content-Length": "0"})
        if answer.status_code != httpx2.codes.ACCEPTED:
            raise self._refused("begin an upload", answer)
        return self._location(answer, url)

    def _end(self, address: str, blob: Blob, body: Body, size_bytes: int) -> None:
        """End an upload by the digest, which the registry compares with what arrived."""
        parts = urlsplit(address)
        query = "&".join(filter(None, [parts.query, urlencode({"digest": f"sha256:{blob.sha256}"})]))
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size_bytes)}
        answer = self._send("PUT", urlunsplit(parts._replace(query=query)), body, headers)
        if not answer.is_success:
            raise self._refused("take the model's file", answer)

    def _part(self, blob: Blob, start: int, size_bytes: int, progress: _Progress) -> Body:
        """Return what yields a part of a blob, from its beginning each time it is called."""

        def pieces() -> Iterator[bytes]:
            done = start
            for piece in _read(blob, start, size_bytes):
                yield piece
                done += len(piece)
                self.sent_bytes += len(piece)
                progress.at(done)

        return pieces

    def _send(
        self,
        method: str,
        url: str,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        follow: bool = False,
    ) -> httpx2.Response:
        """Send a request, once more with a fresh login when the registry asks for one.

        Raises:
            Unauthenticated: It does not let us in.
            Unavailable: It is out of reach, or busy.
        """
        answer = self._once(method, url, body, headers, follow=follow)
        if answer.status_code in _DENIED and self._ours(url) and (challenges := self._challenges(answer)):
            self._login.answer(challenges, self._place.host)
            answer = self._once(method, url, body, headers, follow=follow)
        if answer.status_code in _DENIED:
            raise denied(self._place.host, _said(answer))
        if answer.status_code in BUSY:
            raise busy(self._place.host, answer, _said(answer))
        return answer

    def _challenges(self, answer: httpx2.Response) -> list[str]:
        """Return how a registry that refuses a request wants us to log in; some say so only at their door."""
        found = answer.headers.get_list("WWW-Authenticate")
        if not found and answer.status_code == httpx2.codes.FORBIDDEN:
            door = self._once("GET", f"{self._base}/v2/", None, None, follow=False, login=False)
            found = door.headers.get_list("WWW-Authenticate")
        return found

    def _once(
        self,
        method: str,
        url: str,
        body: Body | None,
        headers: Mapping[str, str] | None,
        *,
        follow: bool,
        login: bool = True,
    ) -> httpx2.Response:
        known = login and self._login.header and self._ours(url)
        shown = {"Authorization": self._login.header} if known else {}
        try:
            return self._http.request(
                method, url, content=body() if body else None, headers={**(headers or {}), **shown},
                follow_redirects=follow,
            )  # fmt: skip
        except httpx2.HTTPError as error:
            raise Unavailable(
                f"{self._place.host} is out of reach, or went away: {error or type(error).__name__}",
                fix="Try again: what has arrived is not sent again.",
                reason="REGISTRY_UNAVAILABLE",
                metadata={"registry": self._place.host},
            ) from error

    def _again(self, call: Callable[[], T]) -> T:
        """Call something that is safe to repeat, a few times while the registry is out of reach or busy."""
        patience = Patience()
        while True:
            try:
                return call()
            except Unavailable as error:
                patience.wait(error)

    def _ours(self, url: str) -> bool:
        """Say whether an address is the registry's own: an upload may be sent on to another host."""
        here, there = urlsplit(self._base), urlsplit(url)
        return (here.scheme, here.netloc) == (there.scheme, there.netloc)

    def _url(self, path: str) -> str:
        return f"{self._base}/v2/{self._place.repository}/{path}"

    def _location(self, answer: httpx2.Response, url: str) -> str:
        """Return the address at which an upload goes on."""
        location = urljoin(url, str(answer.headers.get("Location", "")))
        if self._base.startswith("https:") and urlsplit(location).scheme != "https":
            raise FailedPrecondition(
                f"{self._place.host} sends the upload on to {urlsplit(location).netloc}, without TLS.",
                fix="Its address for clients is set wrongly; ask whoever runs it.",
                reason="REGISTRY_FAILED",
            )
        return location

    def _refused(self, doing: str, answer: httpx2.Response) -> Web4Error:
        """Return the error for an answer that is neither yes nor busy."""
        said = _said(answer)
        text = f"{self._place.host} could not {doing}: {said}"
        if "DIGEST_INVALID" in said:
            return DataLoss(
                f"{self._place.host} got other bytes than were meant: {said}",
                fix="Push again; if it happens again, the disk or the memory is at fault.",
            )
        if any(sign in said.lower() for sign in _FULL) or answer.status_code == 507:
            return ResourceExhausted(
                text, fix="Free space in the registry, then push again.", reason="DISK_FULL"
            )
        if "NAME_INVALID" in said or "NAME_UNKNOWN" in said:
            return InvalidInput(
                text, fix=f"Is {self._place.repository} a repository of yours in {self._place.host}?"
            )
        return FailedPrecondition(text, fix="The registry's log may say more.", reason="REGISTRY_FAILED")


class _Progress:
    """Tells how far a blob is, never backwards when a part is sent twice."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._reported = 0

    def at(self, position: int) -> None:
        """Tell of a position in the blob."""
        if position > self._reported:
            self._advance(position - self._reported)
            self._reported = position


def _read(blob: Blob, start: int, size_bytes: int) -> Iterator[bytes]:
    """Yield a part of a blob in small pieces."""
    if isinstance(blob.source, bytes):
        yield blob.source[start : start + size_bytes]
        return
    with blob.source.open("rb") as file:
        file.seek(start)
        left = size_bytes
        while left and (piece := file.read(min(_PIECE_BYTES, left))):
            yield piece
            left -= len(piece)


def _said(answer: httpx2.Response) -> str:
    """Return what a registry says of an error: its codes and messages, else the text."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        errors = [
            " ".join(str(each[key]) for key in ("code", "message", "detail") if each.get(key))
            for each in answer.json()["errors"]
        ]
        if errors:
            return f"{'; '.join(errors)[:500]} (HTTP {answer.status_code})"
    return f"{answer.text.strip()[:300]} (HTTP {answer.status_code})".strip()
