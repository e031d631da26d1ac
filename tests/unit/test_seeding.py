"""Bundles of the command line on their way into the registry."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from artifacts.bundle import Bundle, write_bundle
from artifacts.errors import BundleError, BundleErrorCode
from artifacts.verify import ServedModel
from server.declaration import Declaration
from server.profile_operations import DECLARATION
from server.programs import Programs
from server.registry.errors import RegistryError, RegistryErrorCode
from server.registry.registry import Registry
from server.seeding import require_servable, retire, seed
from server.settings import SteeringSettings
from server.sources.errors import SourceError
from server.sources.signature import SignaturePolicy

SERVED = ServedModel(id="tiny", architecture="LlamaForCausalLM", hidden_size=4, num_layers=6, fingerprint=None)
FINGERPRINT, OTHER = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    opened = Registry.open(tmp_path / "registry")
    yield opened
    opened.close()


@pytest.fixture
def bundle_file(tmp_path: Path, tiny_bundle: Callable[..., Bundle]) -> Callable[..., Path]:
    def make(name: str, fingerprint: str | None = None, layers: tuple[int, ...] = (1,)) -> Path:
        bundle = tiny_bundle(name, layers)
        target = bundle.manifest.target.model_copy(update={"fingerprint": fingerprint})
        path = tmp_path / f"{name}.safetensors"
        write_bundle(path, bundle.manifest.model_copy(update={"target": target}), bundle.rows)
        return path

    return make


def start(registry: Registry, *arguments: str, served: ServedModel = SERVED) -> dict[str, str]:
    """What a server with these flags does to its registry first; profiles and their bundles afterwards."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    SteeringSettings.add_arguments(parser)
    settings = SteeringSettings.from_args(parser.parse_args(arguments))
    programs = Programs(registry.store, served, settings.fingerprint, dict)
    seed(registry, settings, programs, SignaturePolicy(settings.signatures, settings.signature_keys))
    versions = [versions[0] for versions in registry.snapshot().profiles.values()]
    return {version.name: version.settings.bundle for version in versions if version.settings}


def test_profiles(registry: Registry, bundle_file: Callable[..., Path]) -> None:
    path = bundle_file("careful")
    served = start(registry, "--steering-bundle", str(path), f"other={path}", "--steering-exclude", "other=reasoning")
    assert served.keys() == {"careful", "other"}
    assert served["careful"] == served["other"]
    current = registry.snapshot().current("other")
    assert current is not None and current.settings is not None
    assert (current.settings.exclude, current.action) == (("reasoning",), "seed")
    assert current.actor.startswith("cli:")
    assert list((registry.directory / "incoming").iterdir()) == []


def test_a_restart_undoes_nothing(registry: Registry, bundle_file: Callable[..., Path]) -> None:
    first, second = bundle_file("careful"), bundle_file("second", layers=(2,))
    served = start(registry, "--steering-bundle", f"careful={first}", f"gone={first}")
    generation = registry.generation()
    assert start(registry, "--steering-bundle", f"careful={first}", f"gone={first}") == served
    assert registry.generation() == generation
    registry.delete_profile("gone", actor="ops")
    current = registry.snapshot().current("careful")
    assert current is not None and current.settings is not None
    registry.put_profile("careful", replace(current.settings, strength=0.1), actor="ops")
    served = start(registry, "--steering-bundle", f"careful={first}", f"gone={first}")
    assert served.keys() == {"careful"}
    current = registry.snapshot().current("careful")
    assert current is not None and current.settings is not None and current.settings.strength == 0.1
    assert start(registry, "--steering-bundle", f"careful={second}") != served, "a new file is a new version"
    assert len(registry.history("careful")) == 3


def test_two_of_one_name(registry: Registry, bundle_file: Callable[..., Path]) -> None:
    path = str(bundle_file("careful"))
    with pytest.raises(ValueError, match=r"Two bundles are named 'careful'; rename one with --steering-bundle NAME="):
        start(registry, "--steering-bundle", path, path)


def test_an_exclusion_of_nobody(registry: Registry, bundle_file: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="--steering-exclude names profile 'x'; named by --steering-bundle: careful"):
        start(registry, "--steering-bundle", str(bundle_file("careful")), "--steering-exclude", "x=reasoning")


def test_errors_name_the_file(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a bundle")
    for name, code in ((path, None), (tmp_path / "missing.safetensors", BundleErrorCode.UNREADABLE)):
        with pytest.raises(BundleError) as caught:
            start(registry, "--steering-bundle", str(name))
        assert str(caught.value).startswith(f"{name}: ")
        assert code is None or caught.value.code == code
    assert registry.generation() == 0


@pytest.mark.parametrize(
    ("made_for", "served", "policy", "refused"),
    [
        (FINGERPRINT, FINGERPRINT, "enforce", False),
        (FINGERPRINT, OTHER, "enforce", True),
        (FINGERPRINT, OTHER, "ignore", False),
        (None, OTHER, "enforce", False),
        (FINGERPRINT, None, "ignore", False),
    ],
)
def test_fingerprint(
    registry: Registry,
    bundle_file: Callable[..., Path],
    made_for: str | None,
    served: str | None,
    policy: str,
    refused: bool,
) -> None:
    flags = ["--steering-bundle", str(bundle_file("careful", made_for)), "--steering-fingerprint", policy]
    model = replace(SERVED, fingerprint=served)
    if not refused:
        assert start(registry, *flags, served=model).keys() == {"careful"}
        return
    with pytest.raises(BundleError) as caught:
        start(registry, *flags, served=model)
    assert caught.value.code == BundleErrorCode.MODEL_MISMATCH


@pytest.mark.parametrize(
    "change", [{"hidden_size": 8}, {"num_layers": 7}, {"architecture": "Qwen2ForCausalLM"}], ids=str
)
def test_another_model_is_refused_whatever_the_policy(
    registry: Registry, bundle_file: Callable[..., Path], change: dict[str, object]
) -> None:
    flags = ["--steering-bundle", str(bundle_file("careful")), "--steering-fingerprint", "ignore"]
    with pytest.raises(BundleError) as caught:
        start(registry, *flags, served=ServedModel(**{**vars(SERVED), **change}))  # type: ignore[arg-type]
    assert caught.value.code == BundleErrorCode.MODEL_MISMATCH


def test_unsigned_bundles_are_refused_where_signatures_are_enforced(
    registry: Registry, bundle_file: Callable[..., Path], tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(pem)
    flags = ["--steering-signatures", "enforce", "--steering-signature-key", str(tmp_path / "key.pub")]
    with pytest.raises(SourceError, match="no signature"):
        start(registry, "--steering-bundle", str(bundle_file("careful")), *flags)
    assert registry.generation() == 0


class TestWhatTheRegistryNames:
    """Found before the model is loaded."""

    def test_all_is_well(self, registry: Registry, bundle_file: Callable[..., Path]) -> None:
        start(registry, "--steering-bundle", str(bundle_file("careful")))
        require_servable(registry, Programs(registry.store, SERVED, "enforce", dict))

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.chmod(0o600) or path.write_bytes(b"x")])
    def test_a_file_is_gone_or_another_one(
        self, registry: Registry, bundle_file: Callable[..., Path], damage: Callable[[Path], None]
    ) -> None:
        (digest,) = start(registry, "--steering-bundle", str(bundle_file("careful"))).values()
        damage(registry.store.path(digest))
        with pytest.raises(RegistryError, match=f"{digest}.* add it again") as caught:
            require_servable(registry, Programs(registry.store, SERVED, "enforce", dict))
        assert caught.value.code is RegistryErrorCode.STORE_DAMAGED

    def test_a_registry_of_another_model(self, registry: Registry, bundle_file: Callable[..., Path]) -> None:
        start(registry, "--steering-bundle", str(bundle_file("careful")))
        other = replace(SERVED, num_layers=7)
        with pytest.raises(BundleError, match="Profile 'careful' of the registry: ") as caught:
            require_servable(registry, Programs(registry.store, other, "enforce", dict))
        assert caught.value.code is BundleErrorCode.MODEL_MISMATCH

    def test_a_bundle_that_no_profile_means_may_be_damaged(
        self, registry: Registry, bundle_file: Callable[..., Path]
    ) -> None:
        (digest,) = start(registry, "--steering-bundle", str(bundle_file("careful"))).values()
        registry.delete_profile("careful", actor="test")
        registry.store.path(digest).unlink()
        require_servable(registry, Programs(registry.store, SERVED, "enforce", dict))


class TestRetire:
    """What an earlier declaration left on the registry of a server that has another model now."""

    @pytest.fixture
    def digest(self, registry: Registry, bundle_file: Callable[..., Path]) -> str:
        (digest,) = start(registry, "--steering-bundle", str(bundle_file("careful"))).values()
        settings = registry.snapshot().profiles["careful"][0].settings
        assert settings is not None
        registry.put_profile("declared", settings, actor=DECLARATION)
        return digest

    @staticmethod
    def retired(registry: Registry, served: ServedModel, **profiles: str) -> set[str]:
        declared = {name: {"digest": digest} for name, digest in profiles.items()}
        declaration = Declaration.model_validate({"schema": 1, "profiles": declared})
        before = registry.snapshot().profiles.keys()
        retire(registry, declaration, Programs(registry.store, served, "enforce", dict))
        return before - registry.snapshot().profiles.keys()

    def test_what_fits_no_more_and_is_declared_no_more_goes(self, registry: Registry, digest: str) -> None:
        other = replace(SERVED, num_layers=7)
        assert self.retired(registry, other, declared=digest) == set(), "it is still declared: the start says so"
        assert self.retired(registry, other, declared=f"sha256:{'0' * 64}") == {"declared"}
        assert "careful" in registry.snapshot().profiles, "others' profiles never go"

    def test_what_fits_stays(self, registry: Registry, digest: str) -> None:
        assert self.retired(registry, SERVED) == set(), "the server itself prunes it, if it may"

    def test_what_is_damaged_goes(self, registry: Registry, digest: str) -> None:
        registry.store.path(digest).write_bytes(b"damaged")
        assert self.retired(registry, SERVED) == {"declared"}
