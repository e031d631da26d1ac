"""Settings of the server, frozen at the edge."""

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from artifacts.bundle import load_bundle
from artifacts.errors import BundleError
from artifacts.verify import ServedModel, check_target
from server.engine.config import DEFAULT_ROWS
from server.profiles import Profile, ProfileTable

# As in the manifest: `@` separates name and version in a request, so it cannot be part of a name.
_PROFILE_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"

FingerprintPolicy = Literal["enforce", "ignore"]


class BundleSource(NamedTuple):
    """A bundle file to serve; the profile is called `name`, or as the manifest says."""

    name: str | None
    path: Path


@dataclass(frozen=True)
class SteeringSettings:
    """What `expertsteer serve` adds to vLLM's settings.

    Attributes:
        bundles: files to serve.
        rows: capacity of the row pool, in vectors.
        fingerprint: `enforce` refuses a bundle made for other weights of the same shape; `ignore` is for quantised
            copies of the weights that the bundle was made for.
    """

    bundles: tuple[BundleSource, ...]
    rows: int
    fingerprint: FingerprintPolicy

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
            help="Steering vectors that fit on the device at once (default: %(default)s).",
        )
        group.add_argument(
            "--steering-fingerprint",
            choices=["enforce", "ignore"],
            default="enforce",
            help="Refuse a bundle made for other weights than the served ones, or ignore the difference, for quantised "
            "copies of the same model (default: %(default)s).",
        )

    @staticmethod
    def from_args(args: argparse.Namespace) -> "SteeringSettings":
        """Settings from parsed arguments."""
        return SteeringSettings(tuple(args.steering_bundle), args.steering_rows, args.steering_fingerprint)

    def load_profiles(self, served: ServedModel) -> ProfileTable:
        """Read the bundles and hold them against the served model.

        Raises:
            BundleError: a file is damaged or belongs to another model; the message names the file.
            ValueError: two profiles have one name.
        """
        return ProfileTable(self._load_profile(source, served) for source in self.bundles)

    def _load_profile(self, source: BundleSource, served: ServedModel) -> Profile:
        try:
            bundle = load_bundle(source.path)
            expected = served.fingerprint if self.fingerprint == "enforce" else bundle.manifest.target.fingerprint
            check_target(bundle, replace(served, fingerprint=expected))
        except BundleError as error:
            raise BundleError(error.code, f"{source.path}: {error}") from error
        return Profile.from_bundle(bundle, source.name)


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


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
