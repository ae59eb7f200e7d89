"""Certificates for TLS tests: one authority, a server and a client signed by it, and a stranger."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files; the server's certificate is for localhost and 127.0.0.1."""

    authority: Path
    server_certificate: Path
    server_key: Path
    client_certificate: Path
    client_key: Path
    other_authority: Path

    def contents(self) -> dict[str, bytes]:
        """File name to content, for servers that keep files in a directory of their own."""
        return {
            path.name: path.read_bytes()
            for path in (self.authority, self.server_certificate, self.server_key)
        }

    def client_context(self) -> ssl.SSLContext:
        """A context that trusts the authority and shows the client's certificate."""
        context = ssl.create_default_context(cafile=self.authority)
        context.load_cert_chain(self.client_certificate, self.client_key)
        return context


def write_tls_files(directory: Path, *, client_name: str = "relay") -> TlsFiles:
    """Make fresh certificates in `directory`; the client's common name is `client_name`."""
    authority = trustme.CA()
    server = authority.issue_cert("localhost", "127.0.0.1", common_name="localhost")
    client = authority.issue_cert(f"{client_name}@example.org", common_name=client_name)
    files = TlsFiles(
        authority=directory / "authority.pem",
        server_certificate=directory / "server.pem",
        server_key=directory / "server.key",
        client_certificate=directory / "client.pem",
        client_key=directory / "client.key",
        other_authority=directory / "other-authority.pem",
    )
    authority.cert_pem.write_to_path(files.authority)
    _write_chain(server, files.server_certificate)
    server.private_key_pem.write_to_path(files.server_key)
    _write_chain(client, files.client_certificate)
    client.private_key_pem.write_to_path(files.client_key)
    trustme.CA().cert_pem.write_to_path(files.other_authority)
    for key in (files.server_key, files.client_key):
        key.chmod(0o600)
    return files


def _write_chain(certificate: trustme.LeafCert, path: Path) -> None:
    path.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
