"""The server's certificate, and whose clients' certificates it takes. Both may be replaced while it runs."""

from pathlib import Path

import grpc

from ormo_runtime.tls import CredentialsError, WatchedFiles, check_certificates, check_pair, read_bytes


def server_credentials(certificate: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """What to open a port with. The files are looked at for every connection.

    Args:
        certificate: PEM, the server's, with those between it and its authority.
        key: PEM, of the certificate.
        client_ca: PEM, authorities that clients' certificates must be signed by; None to ask clients for none.

    Raises:
        CredentialsError: a file can't be used.
    """

    def read() -> grpc.ServerCertificateConfiguration:
        check_pair(certificate, key)
        if client_ca is not None:
            check_certificates(client_ca)
        authorities = None if client_ca is None else read_bytes(client_ca)
        return grpc.ssl_server_certificate_configuration([(read_bytes(key), read_bytes(certificate))], authorities)

    paths = [path for path in (certificate, key, client_ca) if path is not None]
    files = WatchedFiles(paths, read, CredentialsError)
    used = files.version

    def newer() -> grpc.ServerCertificateConfiguration | None:
        # gRPC asks at each handshake, and takes nothing for "as before".
        nonlocal used
        if files.version == used:
            return None
        used = files.version
        return files.value

    return grpc.dynamic_ssl_server_credentials(
        files.value,
        newer,  # type: ignore[arg-type] # the stubs do not know of None
        require_client_authentication=client_ca is not None,
    )
