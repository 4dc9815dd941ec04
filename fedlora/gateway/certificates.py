"""Keys and certificates of the connection: the server's TLS, a site's node key, the local secrets.

They say who may connect. Who may read and who is believed is decided by the identity keys of the sealed envelope.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.core.errors import ConfigError, FedLoRAError, KeyFileError
from fedlora.core.messages import check_site_name
from fedlora.formats.files import write_atomic
from fedlora.gateway.addresses import ascii_name

_SKEW = timedelta(hours=1)


def make_tls(directory: Path, hosts: Sequence[str], *, valid_days: int = 1825, now: datetime | None = None) -> None:
    """Writes ``ca.crt ca.key server.crt server.key``: EC P-256, keys 0600.

    An authority that is there already is kept, so that a new host name or a renewal changes nothing at the sites.

    Args:
        directory: created with 0700 if missing.
        hosts: DNS names and IP addresses by which sites reach the server; localhost and 127.0.0.1 are added.
        valid_days: of the server certificate; a new authority gets four times that.
        now: time zone aware; the clock by default.

    Raises:
        ConfigError: not a host name or address.
        KeyFileError: the authority that is there cannot be read.
    """
    names = [_general_name(h) for h in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    now = now or datetime.now(UTC)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (directory / "ca.key").exists():
        _make_ca(directory, valid_days=4 * valid_days, now=now)
    ca_key, ca = _load_ca(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _certificate("FedLoRA server", ca.subject, key, valid_days=valid_days, now=now)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    write_atomic(directory / "server.key", _pem(key))
    write_atomic(directory / "server.crt", builder.sign(ca_key, hashes.SHA256()).public_bytes(ser.Encoding.PEM), mode=0o644)


def _make_ca(directory: Path, *, valid_days: int, now: datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedLoRA authority")])
    builder = (
        _certificate("FedLoRA authority", name, key, valid_days=valid_days, now=now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    write_atomic(directory / "ca.crt", builder.sign(key, hashes.SHA256()).public_bytes(ser.Encoding.PEM), mode=0o644)
    write_atomic(directory / "ca.key", _pem(key))


def _load_ca(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = ser.load_pem_private_key((directory / "ca.key").read_bytes(), None)
        ca = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        raise KeyFileError(f"cannot use the authority in {directory}", hint="restore ca.key and ca.crt together") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise KeyFileError(f"ca.key and ca.crt in {directory} do not belong together")
    return key, ca


def _certificate(
    subject: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, valid_days: int, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=valid_days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(ascii_name(host))
    except ValueError:
        raise ConfigError(f"not a host name or IP address: {host[:120]!r}") from None


def authority_digest(ca: Path) -> str:
    """Names a federation by the authority that its sites pin: SHA-256 of the certificate (DER), hex.

    As TLS itself reads the file. With two certificates in it, a server could have the other one named that it has no key for.

    Raises:
        KeyFileError: not one certificate of an authority, and nothing else.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(str(ca))
    except (OSError, ssl.SSLError):
        raise KeyFileError(f"cannot use the authority {ca}", hint="ask the coordinator for ca.crt again") from None
    found = context.get_ca_certs(binary_form=True)
    if len(found) != 1 or context.cert_store_stats()["x509"] != 1:
        raise KeyFileError(f"{ca} does not hold one authority's certificate alone", hint="ask the coordinator for ca.crt again")
    return sha256(found[0]).hexdigest()


def certificate_hosts(certificate: Path) -> tuple[str, ...]:
    """The names and addresses that a certificate file is valid for, in its order: the first is the one named first.

    Raises:
        KeyFileError: not a readable certificate.
    """
    try:
        names = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except (OSError, ValueError, x509.ExtensionNotFound):
        raise KeyFileError(f"cannot use the certificate {certificate}") from None
    return tuple(str(n.value) for n in names.value)


def certificate_end(certificate: Path) -> datetime:
    """Until when a certificate file is valid.

    Raises:
        KeyFileError: not a readable certificate.
    """
    try:
        return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        raise KeyFileError(f"cannot use the certificate {certificate}") from None


def check_tls(directory: Path) -> None:
    """Looks whether ``ca.crt``, ``server.crt`` and ``server.key`` are whole and belong together.

    Raises:
        KeyFileError: names the file that is not.
    """
    found = {}
    for name in ("ca.crt", "server.crt", "server.key"):
        try:
            blob = (directory / name).read_bytes()
            if name == "server.key":
                key = ser.load_pem_private_key(blob, None)
                found[name] = key.public_key()
            else:
                certificate = x509.load_pem_x509_certificate(blob)
                found[name] = certificate.public_key()
                certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes()))
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
            raise KeyFileError(f"{directory / name} is damaged, or of another authority", hint=_RESTORE) from None
    if found["server.key"] != found["server.crt"]:
        raise KeyFileError(f"{directory / 'server.key'} is not the key of server.crt beside it", hint=_RESTORE)


_RESTORE = "restore the directory from a backup: sites trust this authority"


def make_node_key(path: Path) -> str:
    """Writes a site's private key for the connection, 0600, and returns the line of its public half.

    EC P-384 in OpenSSH's format: Flower accepts no other type (Ed25519 is refused).

    Returns:
        ``ecdsa-sha2-nistp384 AAAA...``, without a newline.

    Raises:
        KeyFileError: the file exists already, or cannot be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    _write_new(path, key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.OpenSSH, ser.NoEncryption()))
    return key.public_key().public_bytes(ser.Encoding.OpenSSH, ser.PublicFormat.OpenSSH).decode()


def node_key_pem(line: str) -> bytes:
    """A public node key as Flower stores it: PEM, SubjectPublicKeyInfo.

    Raises:
        KeyFileError: not an EC P-384 key in OpenSSH's form.
    """
    try:
        key = ser.load_ssh_public_key(line.strip().encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise KeyFileError("not an 'ecdsa-sha2-nistp384 AAAA...' line", hint="the second line of the site's .pub file")
    return key.public_bytes(ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo)


def node_key_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """A site's private node key.

    Raises:
        KeyFileError: not a private EC P-384 key in OpenSSH's form without a password.
    """
    try:
        key = ser.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise KeyFileError(f"{path} is not a private node key", hint="`fedlora keygen site` makes keys")
    return key


def node_key_public(path: Path) -> bytes:
    """The public half of a site's private node key, as Flower stores it: PEM, SubjectPublicKeyInfo.

    Raises:
        KeyFileError: see :func:`node_key_private`.
    """
    return node_key_private(path).public_key().public_bytes(ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo)


def load_node_keys(sites: Path, *, left_out: Callable[[str, FedLoRAError], None] | None = None) -> dict[str, bytes]:
    """Public node keys of the enrolled sites, from the second lines of ``NAME.pub``.

    Args:
        left_out: told the name of each file that cannot be used, without its ending, and why; None: the first one raises.

    Returns:
        Site name to PEM, sorted by name.

    Raises:
        ConfigError: a file is not named after a site.
        KeyFileError: a file is malformed, or two sites have the same key.
    """
    keys: dict[str, bytes] = {}
    for path in sorted(sites.glob("*.pub")):
        try:
            name, pem = check_site_name(path.stem), _node_key_in(path)
            if pem in keys.values():
                raise KeyFileError(f"{path} repeats another site's node key")
        except FedLoRAError as e:
            if left_out is None:
                raise
            left_out(path.stem, e)
        else:
            keys[name] = pem
    return keys


def _node_key_in(path: Path) -> bytes:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise KeyFileError(f"cannot read {path}: {e.strerror}", hint="ask the site for its .pub file again") from None
    if len(lines) < 2:
        raise KeyFileError(f"{path} has no second line with the node's public key", hint="ask the site for its .pub file again")
    try:
        return node_key_pem(lines[1])
    except KeyFileError as e:
        raise KeyFileError(f"{path}: {e}", hint="ask the site for its .pub file again") from None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption())


def _write_new(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    except FileExistsError:
        raise KeyFileError(f"{path} exists already", hint="a key is made once; move the old one away first") from None
    except OSError as e:
        raise KeyFileError(f"cannot write {path}: {e.strerror}") from None
