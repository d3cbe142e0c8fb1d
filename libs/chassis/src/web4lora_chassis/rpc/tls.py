"""The certificate that a server shows, and whose it asks for; both are read anew when their files change."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc

from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.settings import Settings, read_pem

log = logging.getLogger(__name__)


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Return the credentials that the settings ask for; never plain text by half a setting.

    Raises:
        FailedPrecondition: TLS is set by halves.
        InvalidInput: A file can't be read.
    """
    certificate, key, authority = (
        settings.tls_certificate_file,
        settings.tls_key_file,
        settings.tls_authority_file,
    )
    if not (certificate or key or settings.tls_client_required):
        return None
    if not (certificate and key) or (settings.tls_client_required and not authority):
        raise FailedPrecondition(
            "TLS is set by halves.",
            fix="Set WEB4LORA_TLS_CERTIFICATE_FILE and WEB4LORA_TLS_KEY_FILE; with "
            "WEB4LORA_TLS_CLIENT_REQUIRED also WEB4LORA_TLS_AUTHORITY_FILE.",
            reason="TLS_INCOMPLETE",
        )
    files = _Files(certificate, key, authority)
    return grpc.dynamic_ssl_server_credentials(
        files.read(),
        files.changed,  # type: ignore[arg-type]  # None says "as before", in gRPC's documents too
        require_client_authentication=settings.tls_client_required,
    )


class _Files:
    """The files of a server's TLS, looked at whenever a client connects."""

    def __init__(self, certificate: Path, key: Path, authority: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._authority = authority
        self._seen = self._marks()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Read them.

        Raises:
            InvalidInput: One can't be read.
        """
        return grpc.ssl_server_certificate_configuration(
            [(read_pem(self._key), read_pem(self._certificate))],
            root_certificates=read_pem(self._authority) if self._authority else None,
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what they hold when that is new; what can't be read, half a renewal for one, is left alone.

        Certificate and key that do not belong together are refused by gRPC, which goes on with the last ones.
        """
        try:
            marks = self._marks()
            if marks == self._seen:
                return None
            made = self.read()
        except (InvalidInput, OSError) as error:
            log.warning("the last TLS certificate is kept: %s", error)
            return None
        self._seen = marks
        log.info("TLS: %s was read anew", self._certificate)
        return made

    def _marks(self) -> list[tuple[int, int, int]]:
        """Return what tells that a file was written anew; links, as ACME clients use them, are followed."""
        files = (self._certificate, self._key, self._authority)
        found = (path.stat() for path in files if path)
        return [(each.st_mtime_ns, each.st_size, each.st_ino) for each in found]
