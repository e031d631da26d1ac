"""Flags of `expertsteer serve`."""

import argparse
from pathlib import Path

import pytest

from server.engine.config import DEFAULT_ROWS
from server.settings import BundleSource, SteeringSettings


def parse(*arguments: str) -> SteeringSettings:
    parser = argparse.ArgumentParser(exit_on_error=False)
    SteeringSettings.add_arguments(parser)
    return SteeringSettings.from_args(parser.parse_args(arguments))


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


def test_flags_of_the_registry() -> None:
    flags = ["--steering-registry", "r", "--steering-keys", "k.yaml", "--steering-bundle-root", "b"]
    flags += ["--steering-remote", "hf", "s3", "--steering-signatures", "enforce", "--steering-signature-key", "a.pub"]
    flags += ["--steering-max-bundle-mib", "3", "--steering-keep-versions", "0", "--steering-metric-profiles", "0"]
    settings = parse(*flags)
    assert (settings.registry, settings.keys, settings.bundle_root) == (Path("r"), Path("k.yaml"), Path("b"))
    assert settings.remote == {"hf", "s3"}
    assert (settings.signatures, settings.signature_keys) == ("enforce", (Path("a.pub"),))
    assert (settings.max_bundle_bytes, settings.keep_versions, settings.metric_profiles) == (3 << 20, 0, 0)


def test_signatures_without_a_key() -> None:
    with pytest.raises(ValueError, match="--steering-signatures needs a --steering-signature-key"):
        parse("--steering-signatures", "warn")


def test_excluded_spans_of_seeded_profiles() -> None:
    settings = parse("--steering-exclude", "reasoning", "careful=none", "late=tool_calls,structured_output")
    assert settings.exclude_of("other", ()) == ("reasoning",)
    assert settings.exclude_of("careful", ("reasoning",)) == ()
    assert settings.exclude_of("late", ()) == ("tool_calls", "structured_output")
    assert parse().exclude_of("x", ("reasoning",)) == ("reasoning",)
