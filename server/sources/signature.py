"""Signatures of bundles, made with the OpenSSF model-signing tool and checked against the operator's public keys.

To sign a bundle with a key of one's own (elliptic curve, P-256, P-384 or P-521) and send the signature with it:

    openssl ecparam -name prime256v1 -genkey -noout -out team.key
    openssl ec -in team.key -pubout -out team.pem
    model_signing sign key --private_key team.key --signature medical.safetensors.sig medical.safetensors

The server holds `team.pem`. The file is signed by itself, not in a folder; its name is free, before and after.
"""

import base64
import hashlib
import importlib.util
import logging
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from artifacts import strict_json
from artifacts.errors import quoted
from server.sources.errors import SourceError, SourceErrorCode

if TYPE_CHECKING:
    from model_signing.verifying import Config

SignatureMode = Literal["off", "warn", "enforce"]
MAX_SIGNATURE_BYTES = 64 * 1024
# How model-signing calls the one file of a model that is a file.
_WHOLE_MODEL = "."
_DOCUMENT_KEYS = {"mediaType", "verificationMaterial", "dsseEnvelope"}
_ENVELOPE_KEYS = {"payload", "payloadType", "signatures"}
# Below the server's own logger, so that it is shown without further configuration.
_logger = logging.getLogger("vllm.expertsteer.signature")


class SignaturePolicy:
    """What the server demands of the signature of a bundle."""

    def __init__(self, mode: SignatureMode, public_keys: Sequence[Path] = ()) -> None:
        """Read the keys once: a later change of the files has no effect.

        Args:
            mode: "off": signatures are not looked at. "warn": a bundle without a valid signature is logged. "enforce":
                it is refused.
            public_keys: PEM files of elliptic-curve keys. One that verifies is enough.

        Raises:
            SourceError: `missing_package`; `bad_key`: no key at all, or a file that is not such a key.
        """
        if mode not in get_args(SignatureMode):
            raise ValueError(f"the signature mode {quoted(mode)} is none of {', '.join(get_args(SignatureMode))}")
        self._mode = mode
        self._verifiers = [] if mode == "off" else _load(public_keys)
        # A verifier of the package keeps state from one file to the next.
        self._lock = threading.Lock()

    def check(self, file: Path, signature: bytes | None) -> str | None:
        """Hold `signature` against the bytes of `file`. Blocks: call it in a thread.

        Args:
            file: the bundle, under any name.
            signature: what `model_signing sign` wrote, or None.

        Returns:
            The file name of the key that verifies it; None if signatures are off, or missing or wrong in mode "warn".

        Raises:
            SourceError: in mode "enforce": `unsigned`, `bad_signature`.
        """
        if self._mode == "off":
            return None
        try:
            return self._signer(file, signature)
        except SourceError as error:
            if self._mode == "enforce":
                raise
            _logger.warning("Taken although signatures are on (warn): %s", error)
            return None

    def _signer(self, file: Path, signature: bytes | None) -> str:
        if signature is None:
            message = "the bundle has no signature; sign it with `model_signing sign key` and send both"
            raise SourceError(SourceErrorCode.UNSIGNED, message)
        if len(signature) > MAX_SIGNATURE_BYTES:
            _refuse(f"has {len(signature)} bytes and the limit is {MAX_SIGNATURE_BYTES}")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if _signed_digest(signature) != digest:
            _refuse(f"is not of this file (sha256:{digest}) alone")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.sig")
            path.write_bytes(signature)
            for name, verifier in self._verifiers:
                if self._verifies(verifier, file, path):
                    return name
        _refuse(f"does not verify with a key of the server ({', '.join(name for name, _ in self._verifiers)})")

    def _verifies(self, verifier: "Config", file: Path, signature: Path) -> bool:
        from model_signing import hashing

        with self._lock:
            # Fresh and fixed: the default is what the signature asks for, and it piles up from file to file.
            verifier.set_hashing_config(hashing.Config().use_file_serialization(hashing_algorithm="sha256"))
            try:
                verifier.verify(file, signature)
            except Exception as error:  # noqa: BLE001 - the package names no error types; none of them is a yes
                _logger.debug("A signature does not verify: %s", type(error).__name__)
                return False
        return True


def _signed_digest(signature: bytes) -> str:
    """Return the SHA-256 that `signature` claims for the one file it is about; whether it is genuine comes later.

    The package compares lists of files, and lets the signed text say which files to leave out.
    """
    try:
        document: Any = strict_json.loads(signature)
        envelope = document["dsseEnvelope"]
        # No second spelling of a part: this function and the package must read the same payload.
        if document.keys() != _DOCUMENT_KEYS or envelope.keys() != _ENVELOPE_KEYS:
            raise ValueError("other parts than those of a signature")
        payload: Any = strict_json.loads(base64.b64decode(envelope["payload"], validate=True))
        [resource] = payload["predicate"]["resources"]
        if (resource["name"], resource["algorithm"]) != (_WHOLE_MODEL, "sha256"):
            _refuse("is of a folder, or not made with SHA-256")
        return str(resource["digest"])
    except (ValueError, LookupError, TypeError, AttributeError):
        _refuse("is not one that model-signing makes for a single file")


def _load(public_keys: Sequence[Path]) -> "list[tuple[str, Config]]":
    if importlib.util.find_spec("model_signing") is None:
        message = "signatures need the package model-signing; install it"
        raise SourceError(SourceErrorCode.MISSING_PACKAGE, message)
    if not public_keys:
        raise SourceError(
            SourceErrorCode.BAD_KEY, "signatures need a public key; name one with --steering-signature-key"
        )
    from cryptography.exceptions import UnsupportedAlgorithm
    from model_signing import verifying

    verifiers = []
    for path in public_keys:
        try:
            verifiers.append((path.name, verifying.Config().use_elliptic_key_verifier(public_key=path)))
        # AttributeError: a key of another kind has no curve.
        except (OSError, ValueError, AttributeError, UnsupportedAlgorithm) as error:
            message = (
                f"{quoted(str(path))} is not the PEM file of a public elliptic-curve key; use P-256, P-384 or P-521"
            )
            raise SourceError(SourceErrorCode.BAD_KEY, message) from error
    return verifiers


def _refuse(problem: str) -> NoReturn:
    message = f"the signature {problem}; sign the file again with `model_signing sign key`"
    raise SourceError(SourceErrorCode.BAD_SIGNATURE, message)
