"""Flags of `expertsteer serve`, and the bundles they name."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.bundle import write_bundle
from artifacts.errors import BundleError, BundleErrorCode
from artifacts.verify import ServedModel
from server.engine.config import DEFAULT_ROWS
from server.profiles import Profile
from server.settings import BundleSource, SteeringSettings

SERVED = ServedModel(id="tiny", architecture="LlamaForCausalLM", hidden_size=4, num_layers=6, fingerprint=None)
FINGERPRINT, OTHER = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"


def parse(*arguments: str) -> SteeringSettings:
    parser = argparse.ArgumentParser(exit_on_error=False)
    SteeringSettings.add_arguments(parser)
    return SteeringSettings.from_args(parser.parse_args(arguments))


@pytest.fixture
def bundle_file(tmp_path: Path, make_profile: Callable[..., Profile]) -> Callable[..., Path]:
    def make(name: str, fingerprint: str | None = None) -> Path:
        bundle = make_profile(name).bundle
        target = bundle.manifest.target.model_copy(update={"fingerprint": fingerprint})
        path = tmp_path / f"{name}.safetensors"
        write_bundle(path, bundle.manifest.model_copy(update={"target": target}), bundle.rows)
        return path

    return make


def test_defaults() -> None:
    assert parse() == SteeringSettings((), DEFAULT_ROWS, "enforce")
    assert parse() == parse(), "parsing once must not change the defaults"


def test_flags() -> None:
    flags = ["--steering-bundle", "a.safetensors", "--steering-bundle", "b-1=dir/b.safetensors"]
    settings = parse(*flags, "--steering-rows", "7", "--steering-fingerprint", "ignore")
    sources = (BundleSource(None, Path("a.safetensors")), BundleSource("b-1", Path("dir/b.safetensors")))
    assert settings == SteeringSettings(sources, 7, "ignore")
    assert parse("--steering-bundle", "b=dir/x=1.safetensors").bundles == (
        BundleSource("b", Path("dir/x=1.safetensors")),
    )


@pytest.mark.parametrize("value", ["=a.safetensors", "a=", "=", "a@b=c", "A b=c", "/data/run=3/a.safetensors", "é=c"])
def test_neither_file_nor_name(value: str) -> None:
    with pytest.raises(argparse.ArgumentError, match="is neither FILE nor NAME=FILE") as caught:
        parse("--steering-bundle", value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "", "²", "1_0"])
def test_rows_must_be_positive(value: str) -> None:
    with pytest.raises(argparse.ArgumentError, match="is not a positive whole number"):
        parse(f"--steering-rows={value}")


def test_unknown_policy() -> None:
    with pytest.raises(argparse.ArgumentError, match="enforce"):
        parse("--steering-fingerprint", "warn")


def test_profiles(bundle_file: Callable[..., Path]) -> None:
    path = bundle_file("careful")
    settings = parse("--steering-bundle", str(path), "--steering-bundle", f"other={path}")
    first, second = settings.load_profiles(SERVED)
    assert (first.name, second.name) == ("careful", "other")
    assert first.bundle.digest == second.bundle.digest


def test_two_of_one_name(bundle_file: Callable[..., Path]) -> None:
    path = str(bundle_file("careful"))
    with pytest.raises(ValueError, match=r"Two bundles are named 'careful'; rename one with --steering-bundle NAME="):
        parse("--steering-bundle", path, "--steering-bundle", path).load_profiles(SERVED)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a bundle")
    for name, code in ((path, None), (tmp_path / "missing.safetensors", BundleErrorCode.UNREADABLE)):
        with pytest.raises(BundleError) as caught:
            parse("--steering-bundle", str(name)).load_profiles(SERVED)
        assert str(caught.value).startswith(f"{name}: ")
        assert code is None or caught.value.code == code


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
    bundle_file: Callable[..., Path], made_for: str | None, served: str | None, policy: str, refused: bool
) -> None:
    settings = parse("--steering-bundle", str(bundle_file("careful", made_for)), "--steering-fingerprint", policy)
    model = ServedModel(**{**vars(SERVED), "fingerprint": served})
    if not refused:
        assert [profile.name for profile in settings.load_profiles(model)] == ["careful"]
        return
    with pytest.raises(BundleError) as caught:
        settings.load_profiles(model)
    assert caught.value.code == BundleErrorCode.MODEL_MISMATCH


@pytest.mark.parametrize(
    "change", [{"hidden_size": 8}, {"num_layers": 7}, {"architecture": "Qwen2ForCausalLM"}], ids=str
)
def test_another_model_is_refused_whatever_the_policy(
    bundle_file: Callable[..., Path], change: dict[str, object]
) -> None:
    settings = parse("--steering-bundle", str(bundle_file("careful")), "--steering-fingerprint", "ignore")
    with pytest.raises(BundleError) as caught:
        settings.load_profiles(ServedModel(**{**vars(SERVED), **change}))
    assert caught.value.code == BundleErrorCode.MODEL_MISMATCH
