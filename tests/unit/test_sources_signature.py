"""Signatures: made with the real tool, held against the real bytes, refused in every other case."""

import base64
import json
import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_signing import hashing, signing

from server.sources.errors import SourceError, SourceErrorCode
from server.sources.signature import MAX_SIGNATURE_BYTES, SignaturePolicy

CONTENT = b"bundle " * 1000


def _write_key(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> None:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.key").write_bytes(private)
    (folder / f"{name}.pem").write_bytes(public)


def _sign(model: Path, key: Path, config: hashing.Config | None = None) -> bytes:
    signature = key.parent / "made.sig"
    signer = signing.Config().use_elliptic_key_signer(private_key=key)
    if config is not None:
        signer.set_hashing_config(config)
    signer.sign(model, signature)
    return signature.read_bytes()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("team", "other"):
        _write_key(folder, name)
    return folder


@pytest.fixture(scope="module")
def signed(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The signature of `CONTENT` by the team."""
    file = tmp_path_factory.mktemp("signed") / "medical.safetensors"
    file.write_bytes(CONTENT)
    return _sign(file, keys / "team.key")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "incoming-1"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def policy(keys: Path) -> SignaturePolicy:
    return SignaturePolicy("enforce", [keys / "team.pem"])


def _code(policy: SignaturePolicy, file: Path, signature: bytes | None) -> SourceErrorCode:
    with pytest.raises(SourceError) as caught:
        policy.check(file, signature)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return caught.value.code


def test_the_documented_commands_make_a_valid_signature(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    (tmp_path / "medical.safetensors").write_bytes(CONTENT)
    program = [sys.executable, "-m", "model_signing"]
    sign = ["sign", "key", "--private_key", "team.key", "--signature", "medical.safetensors.sig", "medical.safetensors"]
    for command in (
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "team.key"],
        ["openssl", "ec", "-in", "team.key", "-pubout", "-out", "team.pem"],
        [*program, *sign],
    ):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    policy = SignaturePolicy("enforce", [tmp_path / "team.pem"])
    signature = (tmp_path / "medical.safetensors.sig").read_bytes()
    assert policy.check(tmp_path / "medical.safetensors", signature) == "team.pem"


@pytest.mark.parametrize("name", ["medical.safetensors", "incoming-1", ".hidden", ".gitignore", ".git", "größe 1"])
def test_the_name_of_the_file_does_not_matter(
    policy: SignaturePolicy, tmp_path: Path, signed: bytes, name: str
) -> None:
    (tmp_path / name).write_bytes(CONTENT)
    assert policy.check(tmp_path / name, signed) == "team.pem"


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_each_curve(tmp_path: Path, file: Path, curve: ec.EllipticCurve) -> None:
    _write_key(tmp_path, "own", curve)
    signature = _sign(file, tmp_path / "own.key")
    assert SignaturePolicy("enforce", [tmp_path / "own.pem"]).check(file, signature) == "own.pem"


def test_one_of_several_keys_is_enough_and_is_named(keys: Path, file: Path, signed: bytes) -> None:
    policy = SignaturePolicy("enforce", [keys / "other.pem", keys / "team.pem"])
    assert policy.check(file, signed) == "team.pem"
    assert policy.check(file, _sign(file, keys / "other.key")) == "other.pem"


def test_keys_are_read_once(tmp_path: Path, keys: Path, file: Path, signed: bytes) -> None:
    own = tmp_path / "team.pem"
    shutil.copy(keys / "team.pem", own)
    policy = SignaturePolicy("enforce", [own])
    own.unlink()
    assert policy.check(file, signed) == "team.pem"


def test_another_key_is_refused(keys: Path, file: Path, policy: SignaturePolicy) -> None:
    assert _code(policy, file, _sign(file, keys / "other.key")) == SourceErrorCode.BAD_SIGNATURE


def test_a_missing_signature_is_told_apart(file: Path, policy: SignaturePolicy) -> None:
    assert _code(policy, file, None) == SourceErrorCode.UNSIGNED
    assert _code(policy, file, b"") == SourceErrorCode.BAD_SIGNATURE


@pytest.mark.parametrize("change", ["flip", "append", "cut", "empty"])
def test_other_bytes_are_refused(file: Path, policy: SignaturePolicy, signed: bytes, change: str) -> None:
    flipped = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
    contents = {"flip": flipped, "append": CONTENT + b"\0", "cut": CONTENT[:-1], "empty": b""}
    file.write_bytes(contents[change])
    assert _code(policy, file, signed) == SourceErrorCode.BAD_SIGNATURE


def test_a_refusal_has_no_effect_on_the_next_file(file: Path, policy: SignaturePolicy, signed: bytes) -> None:
    for _ in range(2):
        assert _code(policy, file, b"{}") == SourceErrorCode.BAD_SIGNATURE
        assert _code(policy, file, _edited(signed, lambda text: text)) == SourceErrorCode.BAD_SIGNATURE
        assert policy.check(file, signed) == "team.pem"


@pytest.mark.parametrize(
    "signature",
    [
        b"garbage",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"0",
        b"[" * 20_000,
        b'{"dsseEnvelope": null}',
        b'{"mediaType": 1, "verificationMaterial": 1, "dsseEnvelope":'
        b' {"payload": 1, "payloadType": 1, "signatures": 1}}',
        b"\x80\x04\x95",
    ],
)
def test_garbage_is_refused(file: Path, policy: SignaturePolicy, signature: bytes) -> None:
    assert _code(policy, file, signature) == SourceErrorCode.BAD_SIGNATURE


def test_a_signature_is_bounded(file: Path, policy: SignaturePolicy, signed: bytes) -> None:
    assert policy.check(file, signed + b" " * (MAX_SIGNATURE_BYTES - len(signed))) == "team.pem"
    with pytest.raises(SourceError, match=str(MAX_SIGNATURE_BYTES)) as caught:
        policy.check(file, signed + b" " * (MAX_SIGNATURE_BYTES + 1 - len(signed)))
    assert caught.value.code == SourceErrorCode.BAD_SIGNATURE
    assert _code(policy, file, bytes(50_000_000)) == SourceErrorCode.BAD_SIGNATURE


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_or_changed_signatures_are_refused_or_mean_the_same(
    file: Path, policy: SignaturePolicy, signed: bytes, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(signed) - 1))
    assert _code(policy, file, signed[:position]) == SourceErrorCode.BAD_SIGNATURE
    byte = data.draw(st.integers(0, 255))
    changed = signed[:position] + bytes([byte]) + signed[position + 1 :]
    try:
        assert policy.check(file, changed) == "team.pem"
    except SourceError as error:
        assert error.code == SourceErrorCode.BAD_SIGNATURE
    else:
        # What decides is untouched.
        before, after = json.loads(signed)["dsseEnvelope"], json.loads(changed)["dsseEnvelope"]
        assert base64.b64decode(before["payload"]) == base64.b64decode(after["payload"])


def _edited(signature: bytes, edit: Callable[[str], str]) -> bytes:
    """Return a signature whose signed text is `edit` of the old one, and indented differently."""
    document = json.loads(signature)
    text = edit(base64.b64decode(document["dsseEnvelope"]["payload"]).decode())
    document["dsseEnvelope"]["payload"] = base64.b64encode(f"{text} ".encode()).decode()
    return json.dumps(document).encode()


def test_a_signed_text_cannot_be_exchanged(file: Path, policy: SignaturePolicy, signed: bytes, keys: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"hostile")
    hostile = json.loads(_sign(other, keys / "other.key"))
    document = json.loads(signed)
    # The text of the hostile file under the team's signature, in every place that a reader may look at.
    swapped = {**document, "dsseEnvelope": {**document["dsseEnvelope"], "payload": hostile["dsseEnvelope"]["payload"]}}
    second = {**document, "dsse_envelope": hostile["dsseEnvelope"]}
    third = {**hostile, "dsse_envelope": document["dsseEnvelope"]}
    envelope = {**hostile["dsseEnvelope"], "Payload": document["dsseEnvelope"]["payload"]}
    fourth = {**document, "dsseEnvelope": envelope}
    twice = signed[:-1] + b', "dsseEnvelope": ' + json.dumps(hostile["dsseEnvelope"]).encode() + b"}"
    for signature in (*(json.dumps(each).encode() for each in (swapped, second, third, fourth)), twice):
        assert _code(policy, other, signature) == SourceErrorCode.BAD_SIGNATURE
    assert policy.check(file, signed) == "team.pem"


def test_a_signed_folder_is_no_signed_file(file: Path, policy: SignaturePolicy, keys: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(file, folder / "medical.safetensors")
    with pytest.raises(SourceError, match="folder") as caught:
        policy.check(file, _sign(folder, keys / "team.key"))
    assert caught.value.code == SourceErrorCode.BAD_SIGNATURE


def test_parts_that_a_signature_does_not_have_are_refused(file: Path, policy: SignaturePolicy, signed: bytes) -> None:
    document = json.loads(signed)
    envelope = document["dsseEnvelope"]
    for changed in ({**document, "more": 1}, {**document, "dsseEnvelope": {**envelope, "more": 1}}):
        assert _code(policy, file, json.dumps(changed).encode()) == SourceErrorCode.BAD_SIGNATURE
    assert policy.check(file, json.dumps(document).encode()) == "team.pem"


def test_a_signature_of_nothing_covers_nothing(file: Path, policy: SignaturePolicy, keys: Path, tmp_path: Path) -> None:
    # The package would call these a match: the signed text says to leave the only file out.
    config = hashing.Config().set_ignored_paths(paths=[Path(".")])
    signature = _sign(file, keys / "team.key", config)
    assert (
        json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))["predicate"]["resources"] == []
    )
    assert _code(policy, file, signature) == SourceErrorCode.BAD_SIGNATURE


@pytest.mark.parametrize("method", ["blake2", "shards"])
def test_other_ways_of_hashing_are_refused(file: Path, policy: SignaturePolicy, keys: Path, method: str) -> None:
    config = hashing.Config()
    if method == "shards":
        config.use_shard_serialization(shard_size=100)
    else:
        config.use_file_serialization(hashing_algorithm="blake2")
    with pytest.raises(SourceError, match=r"not made with SHA-256|for a single file") as caught:
        policy.check(file, _sign(file, keys / "team.key", config))
    assert caught.value.code == SourceErrorCode.BAD_SIGNATURE


def test_a_statement_of_another_kind_by_the_same_key_is_refused(
    file: Path, policy: SignaturePolicy, keys: Path, signed: bytes
) -> None:
    """A key may sign other things than models; only a model signature of this file counts."""
    document: Any = json.loads(signed)
    key: Any = serialization.load_pem_private_key((keys / "team.key").read_bytes(), None)

    def signed_as(kind: str, text: bytes) -> bytes:
        message = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(text), text)
        signature = base64.b64encode(key.sign(message, ec.ECDSA(hashes.SHA256()))).decode()
        payload = base64.b64encode(text).decode()
        envelope = {"payload": payload, "payloadType": kind, "signatures": [{"sig": signature, "keyid": ""}]}
        return json.dumps({**document, "dsseEnvelope": envelope}).encode()

    text = base64.b64decode(document["dsseEnvelope"]["payload"])
    assert policy.check(file, signed_as("application/vnd.in-toto+json", text)) == "team.pem"
    assert _code(policy, file, signed_as("text/plain", text)) == SourceErrorCode.BAD_SIGNATURE
    other = text.replace(b"model_signing/signature/v1.0", b"model_signing/revoked/v1.0")
    assert other != text
    assert _code(policy, file, signed_as("application/vnd.in-toto+json", other)) == SourceErrorCode.BAD_SIGNATURE


def test_warn_takes_everything_and_says_so(
    keys: Path, file: Path, signed: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    policy = SignaturePolicy("warn", [keys / "team.pem"])
    with caplog.at_level(logging.WARNING, logger="vllm.expertsteer.signature"):
        assert policy.check(file, signed) == "team.pem"
        assert not caplog.records
        for signature, word in ((None, "no signature"), (b"garbage", "is not one"), (bytes(70_000), "limit")):
            caplog.clear()
            assert policy.check(file, signature) is None
            [record] = caplog.records
            assert word in record.getMessage()


def test_off_looks_at_nothing(tmp_path: Path) -> None:
    policy = SignaturePolicy("off", [tmp_path / "absent.pem"])
    assert policy.check(tmp_path / "absent", b"garbage") is None


def test_an_unknown_mode_is_refused(keys: Path) -> None:
    with pytest.raises(ValueError, match="'maybe'"):
        SignaturePolicy("maybe", [keys / "team.pem"])  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["warn", "enforce"])
def test_a_policy_without_a_usable_key_does_not_start(mode: Any, tmp_path: Path, keys: Path) -> None:
    rsa_key = rsa.generate_private_key(65537, 2048).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "rsa.pem").write_bytes(rsa_key.public_bytes(serialization.Encoding.PEM, form))
    _write_key(tmp_path, "curve", ec.SECP256K1())
    (tmp_path / "garbage.pem").write_bytes(b"garbage")
    (tmp_path / "empty.pem").touch()
    for paths in (
        [],
        *([tmp_path / f"{name}.pem"] for name in ("rsa", "curve", "garbage", "empty", "absent")),
        [keys / "team.pem", tmp_path / "garbage.pem"],
        [keys / "team.key"],
        [tmp_path],
    ):
        with pytest.raises(SourceError) as caught:
            SignaturePolicy(mode, paths)
        assert caught.value.code == SourceErrorCode.BAD_KEY


def test_without_the_package_the_server_says_so_at_the_start(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match="model-signing; install it") as caught:
        SignaturePolicy("enforce", [keys / "team.pem"])
    assert caught.value.code == SourceErrorCode.MISSING_PACKAGE
    SignaturePolicy("off")


def test_threads_do_not_disturb_each_other(policy: SignaturePolicy, tmp_path: Path, keys: Path, signed: bytes) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(CONTENT)
    bad.write_bytes(CONTENT)
    forged = _sign(bad, keys / "other.key")
    outcomes: list[object] = []

    def check(number: int) -> None:
        try:
            outcomes.append(policy.check(bad, forged) if number % 2 else policy.check(good, signed))
        except SourceError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=check, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == ["bad_signature"] * 10 + ["team.pem"] * 10
