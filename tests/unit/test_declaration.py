"""The file that declares profiles: what it may say, and how it is refused."""

from pathlib import Path

import pytest

from artifacts.manifest import Scope
from server.cli import main
from server.convergence import require_sources
from server.declaration import read
from server.outcomes import ProfileSpec

DIGEST = f"sha256:{'1a' * 32}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "bundles.yaml"


def profile(*lines: str) -> str:
    return "\n".join(
        ["schema: 1", "profiles:", "  medical:", f"    digest: {DIGEST}", *(f"    {line}" for line in lines)]
    )


def test_every_field(file: Path) -> None:
    file.write_text(
        profile(
            *("source: s3://bucket/medical.safetensors", "signature: c2lnbmF0dXJl", "strength: -1", "scope: response"),
            *("maximum_strength: 2.5", "layers: [3, 1]", "exclude: [reasoning]", "allowed_keys: [doctor]"),
            "description: Doses.",
        )
    )
    declared = read(file).declaration
    assert declared.prune
    medical = declared.profiles["medical"]
    assert (medical.source, medical.scheme, medical.signature) == (
        "s3://bucket/medical.safetensors",
        "s3",
        b"signature",
    )
    assert medical.wanted == ProfileSpec(
        bundle=DIGEST,
        strength=-1.0,
        maximum_strength=2.5,
        scope=Scope.RESPONSE,
        layers=(3, 1),
        exclude=("reasoning",),
        allowed_keys=("doctor",),
        description="Doses.",
    )


@pytest.mark.parametrize("text", ["schema: 1\nprofiles:\n", "schema: 1\nprofiles: {}\nprune: false\n"])
def test_no_profiles(file: Path, text: str) -> None:
    file.write_text(text)
    assert read(file).declaration.profiles == {}


@pytest.mark.parametrize(("text", "strength"), [("1e-05", 1e-05), ("-2E3", -2000.0), ("1.5e+1", 15.0), ("1.", 1.0)])
def test_numbers_as_json_writes_them(file: Path, text: str, strength: float) -> None:
    file.write_text(profile(f"strength: {text}", "maximum_strength: 5000"))
    assert read(file).declaration.profiles["medical"].strength == strength


def test_what_has_not_changed_is_not_read_again(file: Path) -> None:
    file.write_text(profile())
    before = read(file)
    assert read(file, before) is before
    file.write_text(profile("strength: 1"))
    assert read(file, before).declaration.profiles["medical"].strength == 1.0


def test_the_digest_follows_the_bytes(file: Path) -> None:
    file.write_text(profile())
    before = read(file).digest
    file.write_text(profile("# the same, said otherwise"))
    assert read(file).digest != before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["form"]),
        ("profiles: {}", ["schema", "missing"]),
        ("schema: 2\nprofiles: {}", ["schema", "1"]),
        ("schema: 1\nprofiles: []", ["profiles"]),
        ("schema: 1\nprofiles: {}\nprune: 'yes'", ["prune"]),
        ("schema: 1\nprofile: {}", ["profile"]),
        ("schema: 1\nprofiles: {Medical: {}}", ["profiles.Medical"]),
        ("schema: 1\nprofiles: {a@b: {}}", ["profiles.a@b"]),
        ("schema: 1\nprofiles: {medical: {}}", ["profiles.medical.digest", "missing"]),
        ("schema: 1\nprofiles: {medical: {digest: sha256:12}}", ["profiles.medical.digest"]),
        ("schema: 1\nprofiles: {medical: 7}", ["profiles.medical"]),
        ("schema: 1\nschema: 1\nprofiles: {}", ["schema", "twice"]),
        ("schema: 1\nprofiles: {a: [[[[[[[[[]]]]]]]]]}", ["deep"]),
        ("schema: 1\nprofiles: &a {medical: *a}", ["line 2", "alias *a"]),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}", ["line 2", "alias *a"]),
        ("schema: !!bool xx", ["value"]),
        ("schema: !!int ''", ["value"]),
        ("schema: !!timestamp xx", ["value"]),
        ("? [1]\n: 2", ["line 1"]),
        ("schema: [", ["line"]),
        (profile("strenght: 1"), ["profiles.medical.strenght", "no such field"]),
        (profile("strength: .nan"), ["profiles.medical.strength"]),
        (profile("strength: .inf"), ["profiles.medical.strength"]),
        (profile("strength: '1'"), ["profiles.medical.strength"]),
        (profile("strength: true"), ["profiles.medical.strength"]),
        (profile("strength: 3", "maximum_strength: 2"), ["profiles.medical", "maximum_strength"]),
        (profile("source: http://host/file"), ["profiles.medical.source"]),
        (profile("source: 'root:'"), ["profiles.medical.source"]),
        (profile("signature: '!!'"), ["profiles.medical.signature", "base64"]),
        (profile("layers: [1, 1]"), ["profiles.medical.layers", "twice"]),
        (profile("scope: some"), ["profiles.medical.scope"]),
    ],
)
def test_refusals(file: Path, text: str, words: list[str]) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match="Declaration ") as refusal:
        read(file)
    message = str(refusal.value)
    assert all(word in message for word in [str(file), *words]), message
    assert "\n" not in message


def test_unreadable(file: Path, tmp_path: Path) -> None:
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match=str(path)):
            read(path)
    file.write_bytes(b"#" * (2 << 20))
    with pytest.raises(ValueError, match="bytes"):
        read(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="YAML"):
        read(file)


def test_sources_that_the_flags_do_not_enable(file: Path, tmp_path: Path) -> None:
    for source, flag in (("hf://a/b@c/d", "--steering-remote hf"), ("root:a", "--steering-bundle-root")):
        file.write_text(profile(f"source: {source}"))
        declared = read(file).declaration
        with pytest.raises(ValueError, match=f"'medical'.*{flag}"):
            require_sources(declared, frozenset({"s3"}), None)
        require_sources(declared, frozenset({"hf"}), tmp_path)
    file.write_text(profile())
    require_sources(read(file).declaration, frozenset(), None)


def test_check_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(profile("strength: 0.25"))
    assert main(["profile", "check", str(file)]) == 0
    assert "medical" in (shown := capsys.readouterr().out)
    assert "0.25" in shown
    file.write_text(profile("strenght: 0.25"))
    assert main(["profile", "check", str(file)]) == 1
    assert "strenght" in capsys.readouterr().err
