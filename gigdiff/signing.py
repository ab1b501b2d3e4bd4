"""C2PA: a signed statement in the file of who made the picture and how, which breaks when a byte of it changes.

Content Credentials (https://spec.c2pa.org) need a certificate for signing content; c2pa-python does the work. Signing
is the last step, after pixels, watermark and metadata. `pip install 'gigdiff[provenance]'`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gigdiff
from gigdiff import xmp
from gigdiff.errors import InputError, MissingDependencyError, OutputError, nearest

__all__ = ["ALGORITHMS", "Signer", "read_signature", "sign_file"]

ALGORITHMS = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")


@dataclass(frozen=True)
class Signer:
    """With what to sign.

    Attributes:
        certificate: PEM file of the certificate chain, the signer's own first. A self-signed one is refused by C2PA.
        private_key: PEM file of its key (PKCS#8).
        algorithm: one of ALGORITHMS, by the key.
        timestamp_url: a timestamp authority (RFC 3161), or None: then the signature expires with the certificate.
    """

    certificate: str | os.PathLike[str]
    private_key: str | os.PathLike[str]
    algorithm: str = "es256"
    timestamp_url: str | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise InputError(f'algorithm "{self.algorithm}" is unknown; {nearest(self.algorithm, ALGORITHMS)}.')
        for name in ("certificate", "private_key"):
            if not Path(getattr(self, name)).is_file():
                raise InputError(f'there is no {name} "{getattr(self, name)}"; give the path of a PEM file.')


def sign_file(
    source: str | os.PathLike[str], path: str | os.PathLike[str], signer: Signer, *, edited: bool = False
) -> Path:
    """Writes `source` with a C2PA manifest to `path`, under a temporary name first.

    Args:
        source: a finished PNG, JPEG or WebP.
        path: where; an existing file is replaced.
        signer: certificate and key.
        edited: the picture was made from one that was given, not from nothing.

    Raises:
        MissingDependencyError: no c2pa-python. InputError: the certificate or key is refused. OutputError: the disk.
    """
    c2pa = _c2pa()
    source, path = Path(source), Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.signed{path.suffix}")
    try:
        info = c2pa.C2paSignerInfo(
            alg=signer.algorithm.encode(),
            sign_cert=Path(signer.certificate).read_bytes(),
            private_key=Path(signer.private_key).read_bytes(),
            ta_url=signer.timestamp_url.encode() if signer.timestamp_url else None,
        )
        with c2pa.Builder(_manifest(source.name, edited)) as builder, c2pa.Signer.from_info(info) as signs:
            builder.sign_file(source, temporary, signs)
        os.replace(temporary, path)
    except c2pa.C2paError as error:
        raise InputError(
            f"signing with {signer.certificate} failed: {error}. It takes a chain for signing content (extended key "
            f"usage emailProtection or documentSigning, not self-signed) and the {signer.algorithm} key that fits it."
        ) from error
    except OSError as error:
        raise OutputError(f'can\'t write "{path}": {error.strerror or error}.') from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_signature(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a file's C2PA manifest says: signer, time, validation state, source type; {} where there is none.

    "Valid" means that the file is as it was signed; "Trusted" that the certificate is on a trust list as well.

    Raises:
        MissingDependencyError: no c2pa-python.
    """
    c2pa = _c2pa()
    try:
        reader = c2pa.Reader.try_create(str(path))
        if reader is None:
            return {}
        with reader:
            store = json.loads(reader.json())
    except (c2pa.C2paError, ValueError) as error:
        return {"state": f"unreadable: {error}"}
    manifest = store["manifests"].get(store.get("active_manifest"), {})
    signature = manifest.get("signature_info") or {}
    failures = [one.get("code", "") for one in store.get("validation_status") or []]
    fields = {
        "state": str(store.get("validation_state") or ""),
        "signed by": str(signature.get("issuer") or signature.get("common_name") or ""),
        "signed at": str(signature.get("time") or ""),
        "made with": _generator(manifest),
        "source type": _source_type(manifest),
        "failures": ", ".join(dict.fromkeys(failures)),
    }
    return {name: text for name, text in fields.items() if text}


def _c2pa() -> Any:
    try:
        import c2pa
    except ImportError as error:
        raise MissingDependencyError(
            "C2PA signatures need c2pa-python, which is not installed: pip install 'gigdiff[provenance]'"
        ) from error
    return c2pa


def _manifest(title: str, edited: bool) -> dict[str, Any]:
    source_type = xmp.COMPOSITE if edited else xmp.GENERATED
    # The specification has an asset begin with c2pa.created (or c2pa.opened, which needs the source as an ingredient).
    actions: list[dict[str, Any]] = [{"action": "c2pa.created", "digitalSourceType": source_type}]
    if edited:
        actions.append({"action": "c2pa.edited", "digitalSourceType": source_type})
    return {
        "claim_generator_info": [{"name": "gigdiff", "version": gigdiff.__version__}],
        "title": title.removeprefix("."),
        "assertions": [{"label": "c2pa.actions", "data": {"actions": actions}}],
    }


def _generator(manifest: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{one.get('name', '')} {one.get('version', '')}".strip() for one in manifest.get("claim_generator_info") or []
    )


def _source_type(manifest: Mapping[str, Any]) -> str:
    for assertion in manifest.get("assertions") or []:
        for action in (assertion.get("data") or {}).get("actions", []):
            if "digitalSourceType" in action:
                return str(action["digitalSourceType"]).rsplit("/", 1)[-1]
    return ""
