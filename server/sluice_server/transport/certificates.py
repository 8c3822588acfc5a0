"""The PEM files of a TLS listener: checked before anything listens, and read again when they have changed."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice_server.transport.call import ListenError

if TYPE_CHECKING:
    from pathlib import Path

    from sluice_server.transport.options import TlsFiles

logger = logging.getLogger(__name__)

Signature = tuple[tuple[int, int, int], ...]
"""What tells a changed file: its number on the disk, its size and its time, of each of the files."""


@dataclass(frozen=True, slots=True)
class TlsContents:
    """What was in the files, in PEM."""

    certificate: bytes
    key: bytes
    client_roots: bytes | None


def check_tls(files: TlsFiles) -> None:
    """Raise `ListenError` for files that are missing, or that TLS libraries would refuse without saying which."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        for path in _paths(files):
            path.read_bytes()  # ssl does not say which file it could not read
        # An empty password, so that an encrypted key is refused and not asked for at the terminal.
        context.load_cert_chain(files.certificate, files.key, password=b"")
    except ssl.SSLError as error:
        pair = f"{files.certificate} and {files.key}"
        raise ListenError(f"{pair} are no certificate and its key in PEM: {error.reason}") from error
    except OSError as error:
        raise ListenError(f"cannot read {error.filename} for TLS: {error.strerror}") from error
    if files.client_roots is not None:
        try:
            context.load_verify_locations(files.client_roots)
        except ssl.SSLError as error:
            raise ListenError(f"{files.client_roots} has no certificates in PEM: {error.reason}") from error


class CertificateWatch:
    """Tells when the files have other contents that can be used; asked by many threads. Broken ones are logged once."""

    def __init__(self, files: TlsFiles) -> None:
        """`ListenError` when they cannot be used now."""
        self._files = files
        self._lock = threading.Lock()  # guards _seen and the look at the files
        self._seen = self._signature()
        check_tls(files)
        self.contents = _read(files)

    def changed(self) -> TlsContents | None:
        """The new contents when the files were changed and fit together; None otherwise, and the old ones stay."""
        with self._lock:
            signature = self._signature()
            if signature == self._seen:
                return None
            # Taken before reading: a change that comes in between is seen the next time.
            self._seen = signature
            try:
                check_tls(self._files)
                contents = _read(self._files)
            except (ListenError, OSError) as error:
                logger.warning("changed TLS files cannot be used, the old ones stay", extra={"reason": str(error)})
                return None
            self.contents = contents
            logger.info("changed TLS files are in use", extra={"certificate": str(self._files.certificate)})
            return contents

    def _signature(self) -> Signature | None:
        """None while a file is missing, as in the middle of a change."""
        try:
            found = [path.stat() for path in _paths(self._files)]
        except OSError:
            return None
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found)


def _paths(files: TlsFiles) -> list[Path]:
    return [path for path in (files.certificate, files.key, files.client_roots) if path is not None]


def _read(files: TlsFiles) -> TlsContents:
    roots = files.client_roots
    return TlsContents(
        files.certificate.read_bytes(), files.key.read_bytes(), None if roots is None else roots.read_bytes()
    )
