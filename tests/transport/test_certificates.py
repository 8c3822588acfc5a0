"""TLS files that change under a watch: whole pairs are taken, broken ones are logged once and change nothing."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trustme

from sluice_server.transport import ListenError
from sluice_server.transport.certificates import CertificateWatch, check_tls
from sluice_server.transport.options import TlsFiles

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    made = TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "roots.pem")
    write_pair(made)
    trustme.CA().cert_pem.write_to_path(tmp_path / "roots.pem")
    return made


def write_pair(files: TlsFiles) -> None:
    """Replace both files, as a certificate manager does: each by a rename."""
    leaf = trustme.CA().issue_cert("localhost")
    replace_file(files.certificate, leaf.cert_chain_pems[0].bytes())
    replace_file(files.key, leaf.private_key_pem.bytes())


def replace_file(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)


def test_files_that_did_not_change_are_not_read_again(files):
    watch = CertificateWatch(files)
    before = watch.contents
    assert watch.changed() is None
    assert watch.contents is before


def test_a_changed_pair_is_taken_once(files):
    watch = CertificateWatch(files)
    write_pair(files)
    contents = watch.changed()
    assert contents is not None
    assert (contents.certificate, contents.key) == (files.certificate.read_bytes(), files.key.read_bytes())
    assert watch.contents is contents
    assert watch.changed() is None


def test_changed_roots_are_taken(files):
    watch = CertificateWatch(files)
    replace_file(files.client_roots, trustme.CA().cert_pem.bytes())
    contents = watch.changed()
    assert contents is not None
    assert contents.client_roots == files.client_roots.read_bytes()


def test_a_certificate_whose_key_has_not_come_yet_is_logged_once_and_taken_with_its_key(files, caplog):
    watch = CertificateWatch(files)
    before = watch.contents
    leaf = trustme.CA().issue_cert("localhost")
    replace_file(files.certificate, leaf.cert_chain_pems[0].bytes())
    assert [watch.changed(), watch.changed()] == [None, None]
    assert watch.contents is before
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert str(files.certificate) in warning.reason
    replace_file(files.key, leaf.private_key_pem.bytes())
    assert watch.changed() is not None


@pytest.mark.parametrize("spoil", [os.unlink, lambda path: path.write_bytes(b"junk")], ids=["missing", "junk"])
def test_a_file_that_is_gone_or_junk_leaves_the_old_contents_in_use(spoil, files, caplog):
    watch = CertificateWatch(files)
    before = watch.contents
    spoil(files.key)
    assert [watch.changed(), watch.changed()] == [None, None]
    assert watch.contents is before
    assert len(caplog.records) == 1


def test_the_error_names_the_file(files, tmp_path):
    check_tls(files)
    with pytest.raises(ListenError, match=r"cannot read .*gone.pem for TLS: No such file or directory"):
        check_tls(replace(files, client_roots=tmp_path / "gone.pem"))
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(ListenError, match=r"junk.pem has no certificates in PEM"):
        check_tls(replace(files, client_roots=tmp_path / "junk.pem"))
    with pytest.raises(ListenError, match=r"junk.pem and .*key.pem are no certificate and its key"):
        CertificateWatch(replace(files, certificate=tmp_path / "junk.pem"))
