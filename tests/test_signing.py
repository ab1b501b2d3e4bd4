"""C2PA signatures, with certificates made here; the test skips where c2pa-python is not installed."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import numpy as np
import pytest

from gigdiff import xmp
from gigdiff.errors import InputError, MissingDependencyError
from gigdiff.provenance import XMP_KEYWORD, complete, read, save
from gigdiff.signing import Signer, read_signature


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A certificate authority and a signer's certificate under it."""
    pytest.importorskip("c2pa", reason="c2pa-python is not installed: pip install 'gigdiff[provenance]'")
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def named(name: str) -> x509.Name:  # type: ignore[valid-type]
        oid = x509.oid.NameOID
        return x509.Name([x509.NameAttribute(oid.ORGANIZATION_NAME, name), x509.NameAttribute(oid.COMMON_NAME, name)])

    now = datetime.datetime.now(datetime.UTC)
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def start(subject: str, issuer: str, public: object) -> x509.CertificateBuilder:  # type: ignore[valid-type]
        builder = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named(issuer))
        builder = builder.public_key(public).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        return builder.not_valid_after(now + datetime.timedelta(days=30))

    def usage(sign: bool) -> x509.KeyUsage:  # type: ignore[valid-type]
        return x509.KeyUsage(
            digital_signature=sign, key_cert_sign=not sign, crl_sign=not sign, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
            decipher_only=False,
        )  # fmt: skip

    identifier = x509.SubjectKeyIdentifier.from_public_key
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    root = start("Test Root", "Test Root", root_key.public_key())
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    root = root.add_extension(usage(False), critical=True)
    root = root.add_extension(identifier(root_key.public_key()), critical=False).sign(root_key, hashes.SHA256())
    leaf = start("Test Shop", "Test Root", key.public_key())
    leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    leaf = leaf.add_extension(usage(True), critical=True)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    leaf = leaf.add_extension(identifier(key.public_key()), critical=False)
    leaf = leaf.add_extension(authority, critical=False).sign(root_key, hashes.SHA256())

    folder = tmp_path_factory.mktemp("keys")
    pem = serialization.Encoding.PEM
    (folder / "chain.pem").write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return Signer(folder / "chain.pem", folder / "key.pem")


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (80, 64, 3), np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_signed_valid_and_broken_by_a_changed_byte(signer: Signer, suffix: str, tmp_path: Path):
    path = save(tmp_path / f"a{suffix}", picture(), complete({"prompt": "coat"}), watermark=True, signer=signer)
    told = read_signature(path)
    assert told["state"] in ("Valid", "Trusted"), told
    assert "Test Shop" in told["signed by"] and told["made with"].startswith("gigdiff ")
    assert told["source type"] == "trainedAlgorithmicMedia"
    assert read(path)["prompt"] == "coat" and xmp.source_type(read(path)[XMP_KEYWORD]) == xmp.GENERATED
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]
    data = path.read_bytes()
    path.write_bytes(data.replace(b"coat", b"boat"))
    assert read_signature(path)["state"] not in ("Valid", "Trusted")


def test_an_edit_is_signed_as_one(signer: Signer, tmp_path: Path):
    path = save(tmp_path / "a.png", picture(), {"edit": "recolour"}, signer=signer)
    assert read_signature(path)["source type"] == "compositeWithTrainedAlgorithmicMedia"


def test_no_signature(tmp_path: Path):
    pytest.importorskip("c2pa")
    assert read_signature(save(tmp_path / "a.png", picture(), {})) == {}


def test_a_key_that_does_not_fit_leaves_no_file(signer: Signer, tmp_path: Path):
    (tmp_path / "key.pem").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    with pytest.raises(InputError, match="signing with"):
        save(tmp_path / "a.png", picture(), {}, signer=Signer(signer.certificate, tmp_path / "key.pem"))
    assert not (tmp_path / "a.png").exists()


def test_without_c2pa_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(MissingDependencyError, match=r"gigdiff\[provenance\]"):
        read_signature(tmp_path / "a.png")
    with pytest.raises(InputError, match="there is no certificate"):
        Signer(tmp_path / "a.pem", tmp_path / "b.pem")
    (tmp_path / "a.pem").touch()
    with pytest.raises(InputError, match='did you mean "es256"'):
        Signer(tmp_path / "a.pem", tmp_path / "a.pem", algorithm="es255")
