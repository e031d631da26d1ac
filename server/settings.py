"""Settings of the server, frozen at the edge."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, get_args

from artifacts.manifest import ExcludedSpan
from server.engine.config import DEFAULT_ROWS, FUSIONS, Fusion
from server.engine.span_tokens import SpanTexts
from server.engine.steering import SPAN_NAMES
from server.programs import FingerprintPolicy
from server.sources.remote import SCHEMES
from server.sources.signature import SignatureMode

# As in the manifest: `@` separates name and version in a request, so it cannot be part of a name.
_PROFILE_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"

DEFAULT_BUNDLE_MIB = 256
DEFAULT_WRITE_RATE = 20
DEFAULT_KEEP_VERSIONS = 2
DEFAULT_METRIC_PROFILES = 200
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
        exclude: spans that the profiles of `bundles` leave unsteered; a later entry wins.
        spans: delimiters of spans, by name, in place of those that vLLM's parsers know.
        registry: folder of the registry; None for one that ends with the server.
        declaration: file that says which profiles there shall be.
        keys: file of the keys; None for none.
        write_rate: changes per second that a key may make.
        bundle_root: folder that the admin API may take bundles from.
        remote: remote places that it may take bundles from.
        signatures: what is demanded of the signatures of bundles.
        signature_keys: files of the public keys that signatures are checked with.
        max_bundle_bytes: bound of a bundle's size.
        keep_versions: previous versions of each profile that stay loaded.
        metric_profiles: profiles with metric series of their own.
        has_playground: whether the page is served.
    """

    bundles: tuple[BundleSource, ...]
    rows: int
    fingerprint: FingerprintPolicy
    fusion: Fusion = "auto"
    exclude: tuple[Exclusion, ...] = ()
    spans: Mapping[str, SpanTexts] = field(default_factory=dict)
    registry: Path | None = None
    declaration: Path | None = None
    keys: Path | None = None
    write_rate: int = DEFAULT_WRITE_RATE
    bundle_root: Path | None = None
    remote: frozenset[str] = frozenset()
    signatures: SignatureMode = "off"
    signature_keys: tuple[Path, ...] = ()
    max_bundle_bytes: int = DEFAULT_BUNDLE_MIB << 20
    keep_versions: int = DEFAULT_KEEP_VERSIONS
    metric_profiles: int = DEFAULT_METRIC_PROFILES
    has_playground: bool = True

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
            help="Serve each bundle FILE as a profile, called NAME or as its manifest says. A profile of the registry "
            "that has had this very file before stays as it is.",
        )
        group.add_argument(
            "--steering-registry",
            type=Path,
            metavar="DIR",
            help="Folder that keeps bundles, profiles, their history and the audit log over restarts. Several servers "
            "on one machine may share it. Without it they end with the server.",
        )
        group.add_argument(
            "--steering-declaration",
            type=Path,
            metavar="FILE",
            help="YAML file of profiles with the sources and digests of their bundles, as from a ConfigMap. The server "
            "is ready when its profiles are as the file says, and follows the file when it changes; profiles of the "
            "file change only there. `expertsteer profile check FILE` checks it.",
        )
        group.add_argument(
            "--steering-keys",
            type=Path,
            metavar="FILE",
            help="YAML file of keys (expertsteer key new --file FILE); read again when it changes. A write key for the "
            "admin API may also be given in the environment variable EXPERTSTEER_ADMIN_KEY.",
        )
        group.add_argument(
            "--steering-write-rate",
            type=_positive,
            default=DEFAULT_WRITE_RATE,
            metavar="N",
            help="Changes per second that each API process takes from each key, after a burst of five times as many "
            "(default: %(default)s).",
        )
        group.add_argument(
            "--steering-bundle-root",
            type=Path,
            metavar="DIR",
            help="Folder from which the admin API may take bundles by name.",
        )
        group.add_argument(
            "--steering-remote",
            nargs="+",
            choices=sorted(SCHEMES),
            default=[],
            help="Remote places from which the admin API may take bundles, by address and digest.",
        )
        group.add_argument(
            "--steering-signatures",
            choices=get_args(SignatureMode),
            default="off",
            help="Check the signatures of bundles (OpenSSF model signing) and refuse, or only report, what is not "
            "signed by one of the keys (default: %(default)s).",
        )
        group.add_argument(
            "--steering-signature-key",
            action="extend",
            nargs="+",
            default=[],
            type=Path,
            metavar="FILE",
            help="Public key (PEM) that signatures are checked with.",
        )
        group.add_argument(
            "--steering-max-bundle-mib",
            type=_positive,
            default=DEFAULT_BUNDLE_MIB,
            metavar="MIB",
            help="Largest bundle that the admin API takes (default: %(default)s).",
        )
        group.add_argument(
            "--steering-keep-versions",
            type=_whole,
            default=DEFAULT_KEEP_VERSIONS,
            metavar="N",
            help="Previous versions of each profile that stay loaded, for rollback and for requests that name them "
            "(default: %(default)s).",
        )
        group.add_argument(
            "--steering-metric-profiles",
            type=_whole,
            default=DEFAULT_METRIC_PROFILES,
            metavar="N",
            help="Profiles with metric series of their own; the others count as `other` (default: %(default)s).",
        )
        group.add_argument(
            "--disable-steering-playground",
            action="store_true",
            help="Do not serve the page at /playground.",
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
            help="Spans that PROFILE, or every profile of --steering-bundle, leaves unsteered: "
            f"{', '.join(EXCLUDABLE)}, or none. In place of what the bundle says.",
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
        settings = SteeringSettings(
            tuple(args.steering_bundle),
            args.steering_rows,
            args.steering_fingerprint,
            args.steering_fusion,
            tuple(args.steering_exclude),
            {span.name: span.texts for span in args.steering_span},
            registry=args.steering_registry,
            declaration=args.steering_declaration,
            keys=args.steering_keys,
            write_rate=args.steering_write_rate,
            bundle_root=args.steering_bundle_root,
            remote=frozenset(args.steering_remote),
            signatures=args.steering_signatures,
            signature_keys=tuple(args.steering_signature_key),
            max_bundle_bytes=args.steering_max_bundle_mib << 20,
            keep_versions=args.steering_keep_versions,
            metric_profiles=args.steering_metric_profiles,
            has_playground=not args.disable_steering_playground,
        )
        if settings.signatures != "off" and not settings.signature_keys:
            raise ValueError("--steering-signatures needs a --steering-signature-key to check with.")
        return settings

    def exclude_of(self, name: str, recommended: tuple[ExcludedSpan, ...]) -> tuple[ExcludedSpan, ...]:
        """Spans that a profile of `bundles` leaves unsteered.

        Args:
            name: of the profile.
            recommended: what its bundle says.
        """
        for exclusion in self.exclude:
            if exclusion.profile in (None, name):
                recommended = exclusion.spans
        return recommended


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


def _whole(text: str) -> int:
    return 0 if text == "0" else _positive(text)
