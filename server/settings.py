"""Settings of the server, frozen at the edge."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from artifacts.bundle import load_bundle
from artifacts.errors import BundleError
from artifacts.manifest import ExcludedSpan
from artifacts.verify import ServedModel, check_target
from server.engine.config import DEFAULT_ROWS, FUSIONS, Fusion
from server.engine.span_tokens import SpanTexts
from server.engine.steering import SPAN_NAMES
from server.profiles import Profile, ProfileTable

# As in the manifest: `@` separates name and version in a request, so it cannot be part of a name.
_PROFILE_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"

FingerprintPolicy = Literal["enforce", "ignore"]
EXCLUDABLE: tuple[ExcludedSpan, ...] = get_args(ExcludedSpan)


class BundleSource(NamedTuple):
    """A bundle file to serve; the profile is called `name`, or as the manifest says."""

    name: str | None
    path: Path


class Exclusion(NamedTuple):
    """Spans that a profile leaves unsteered, in place of what its bundle says; of every profile without a name."""

    profile: str | None
    spans: tuple[ExcludedSpan, ...]


class NamedSpan(NamedTuple):
    """Delimiters of a span, by name."""

    name: str
    texts: SpanTexts


@dataclass(frozen=True)
class SteeringSettings:
    """What `expertsteer serve` adds to vLLM's settings.

    Attributes:
        bundles: files to serve.
        rows: capacity of the row pool, in vectors.
        fingerprint: `enforce` refuses a bundle made for other weights of the same shape; `ignore` is for quantised
            copies of the weights that the bundle was made for.
        fusion: how steering is folded into the norm that follows a layer.
        exclude: spans that profiles leave unsteered; a later entry wins.
        spans: delimiters of spans, by name, in place of those that vLLM's parsers know.
    """

    bundles: tuple[BundleSource, ...]
    rows: int
    fingerprint: FingerprintPolicy
    fusion: Fusion = "auto"
    exclude: tuple[Exclusion, ...] = ()
    spans: Mapping[str, SpanTexts] = field(default_factory=dict)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        group = parser.add_argument_group("steering", "Options of the ExpertSteer server.")
        group.add_argument(
            "--steering-bundle",
            action="extend",
            nargs="+",
            default=[],
            metavar="[NAME=]FILE",
            type=_bundle_source,
            help="Serve each bundle FILE as a profile, called NAME or as its manifest says.",
        )
        group.add_argument(
            "--steering-rows",
            type=_positive,
            default=DEFAULT_ROWS,
            metavar="N",
            help="Vectors that interventions read or write, that fit on the device at once (default: %(default)s).",
        )
        group.add_argument(
            "--steering-fingerprint",
            choices=["enforce", "ignore"],
            default="enforce",
            help="Refuse a bundle made for other weights than the served ones, or ignore the difference, for quantised "
            "copies of the same model (default: %(default)s).",
        )
        group.add_argument(
            "--steering-fusion",
            choices=FUSIONS,
            default="auto",
            help="Fold steering into the RMSNorm that follows a layer: always where such a norm is known, never, or "
            "where it is no slower (default: %(default)s). The log and /v1/steering/status show what each layer does.",
        )
        group.add_argument(
            "--steering-exclude",
            action="extend",
            nargs="+",
            default=[],
            metavar="[PROFILE=]SPAN[,SPAN]",
            type=_exclusion,
            help=f"Spans that PROFILE, or every profile, leaves unsteered: {', '.join(EXCLUDABLE)}, or none. In place "
            "of what the bundle says.",
        )
        group.add_argument(
            "--steering-span",
            action="extend",
            nargs="+",
            default=[],
            metavar="SPAN=OPEN,CLOSE",
            type=_span,
            help=f"Tokens that open and close a span ({' or '.join(SPAN_NAMES)}), where --reasoning-parser and "
            "--tool-call-parser do not tell.",
        )

    @staticmethod
    def from_args(args: argparse.Namespace) -> "SteeringSettings":
        """Settings from parsed arguments."""
        return SteeringSettings(
            tuple(args.steering_bundle),
            args.steering_rows,
            args.steering_fingerprint,
            args.steering_fusion,
            tuple(args.steering_exclude),
            {span.name: span.texts for span in args.steering_span},
        )

    def load_profiles(self, served: ServedModel) -> ProfileTable:
        """Read the bundles and hold them against the served model.

        Raises:
            BundleError: a file is damaged or belongs to another model; the message names the file.
            ValueError: two profiles have one name, or one that does not exist is told what to exclude.
        """
        profiles = ProfileTable(self._load_profile(source, served) for source in self.bundles)
        names = {profile.name for profile in profiles}
        for exclusion in self.exclude:
            if exclusion.profile is not None and exclusion.profile not in names:
                raise ValueError(
                    f"--steering-exclude names profile {exclusion.profile!r}; "
                    f"served: {', '.join(sorted(names)) or 'none'}."
                )
        return profiles

    def _load_profile(self, source: BundleSource, served: ServedModel) -> Profile:
        try:
            bundle = load_bundle(source.path)
            expected = served.fingerprint if self.fingerprint == "enforce" else bundle.manifest.target.fingerprint
            check_target(bundle, replace(served, fingerprint=expected))
        except BundleError as error:
            raise BundleError(error.code, f"{source.path}: {error}") from error
        profile = Profile.from_bundle(bundle, source.name)
        for exclusion in self.exclude:
            if exclusion.profile in (None, profile.name):
                profile = replace(profile, exclude=exclusion.spans)
        return profile


def _bundle_source(text: str) -> BundleSource:
    name, separator, path = text.partition("=")
    if not separator:
        return BundleSource(None, Path(text))
    if not path or not re.fullmatch(_PROFILE_NAME, name):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither FILE nor NAME=FILE with a NAME of a-z, 0-9, '.', '_' and '-'; "
            "a FILE with '=' in its path needs a NAME"
        )
    return BundleSource(name, Path(path))


def _exclusion(text: str) -> Exclusion:
    profile, separator, spans = text.rpartition("=")
    names = [] if spans == "none" else spans.split(",")
    for name in names:
        if name not in EXCLUDABLE:
            raise argparse.ArgumentTypeError(
                f"{text!r}: {name!r} is no span; known: {', '.join(EXCLUDABLE)}, or none for all of them to be steered"
            )
    return Exclusion(profile if separator else None, tuple(span for span in EXCLUDABLE if span in names))


def _span(text: str) -> NamedSpan:
    name, _, delimiters = text.partition("=")
    start, _, end = delimiters.partition(",")
    if name not in SPAN_NAMES or not start or not end:
        raise argparse.ArgumentTypeError(f"{text!r} is not SPAN=OPEN,CLOSE with a SPAN of {', '.join(SPAN_NAMES)}")
    return NamedSpan(name, SpanTexts(start, end))


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
