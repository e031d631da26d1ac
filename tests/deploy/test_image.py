"""The image: its recipe, and the same steps run without a container engine, then served as a container would."""

import contextlib
import email
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from container import Container, first_process
from dockerfile import REPOSITORY, Dockerfile

DOCKERFILE = Dockerfile()
STEPS = REPOSITORY / "deploy" / "image" / "steps"
VENV = "/opt/expertsteer"
WRITABLE = ["/var/cache/expertsteer", "/var/lib/expertsteer"]
START_TIMEOUT_S = 400
ADMIN_KEY = "admin-key-of-the-image"


class Installed(NamedTuple):
    """What the steps of the recipe made.

    Attributes:
        container: with the installation in it.
        wheel: the file that was installed.
        checked: what the last check printed.
    """

    container: Container
    wheel: Path
    checked: str


@pytest.fixture(scope="module")
def installed() -> Iterator[Installed]:
    """The steps of the Dockerfile for a CPU, in its order, on a copy of what it copies.

    Only the packages of the lock are not fetched again, which would take minutes: exactly those are linked from this
    environment, which `make setup` made by the very script that the recipe runs.
    """
    problem = Container.problem()
    if problem is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(problem)
        pytest.skip(problem)
    root = Path(tempfile.mkdtemp(prefix="expertsteer-image-"))
    try:
        # Others than the owner must be able to enter.
        root.chmod(0o755)
        container = Container(root)
        copy_sources(root / "build")
        container.build(container.python, "-m", "venv", "--clear", VENV)
        # An old one that comes with Python 3.11, and makes way for the locked one.
        container.build(f"{VENV}/bin/python", "-m", "pip", "uninstall", "-qq", "--yes", "setuptools")
        link_packages(root / VENV[1:])
        container.build("deploy/image/steps/kernels.sh", "cpu", VENV)
        container.build("deploy/image/steps/wheel.sh", VENV, "/build/dist")
        container.build("/build/deploy/image/steps/install.sh", VENV, "/build/dist", folder="/")
        checked = container.build("/build/deploy/image/steps/check.sh", "cpu", VENV, folder="/")
        container.build("/build/deploy/image/steps/account.sh", folder="/")
        (wheel,) = (root / "build" / "dist").iterdir()
        wheel = wheel.rename(root / wheel.name)
        # The image has none of it.
        shutil.rmtree(root / "build")
        yield Installed(container, wheel, checked)
    finally:
        shutil.rmtree(root)


def copy_sources(target: Path) -> None:
    """What COPY brings into an image built from a clean checkout with the changes that are being made."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    sources = [source for group, _ in DOCKERFILE.copied() for source in group]
    for name in listed.stdout.splitlines():
        if any(name == source or name.startswith(f"{source}/") for source in sources) and (REPOSITORY / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)


def link_packages(venv: Path) -> None:
    """Bring the packages of the lock, and torch, into an environment: no other can be imported there."""
    (target,) = (venv / "lib").glob("python*/site-packages")
    for package in ["torch", *locked("cpu.lock")]:
        installation = distribution(package)
        for file in installation.files or []:
            if file.parts[0] == "..":
                continue
            source, link = Path(str(installation.locate_file(file))), target / file
            if not source.exists() or link.exists():
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, link)
            except OSError:
                shutil.copy2(source, link)


def locked(name: str) -> dict[str, str]:
    """Versions of a lock file by package."""
    lines = (REPOSITORY / "deploy" / "requirements" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@contextlib.contextmanager
def served(
    container: Container, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The container with arguments in place of CMD; its output goes to a file."""
    log = container.root / "var" / "log.txt"
    with log.open("wb") as output:
        process = container.start(
            [*DOCKERFILE.final_command("ENTRYPOINT"), *arguments],
            image_environment() | (environment or {}),
            DOCKERFILE.final("WORKDIR")[0],
            WRITABLE,
            output,
        )
    try:
        yield process, log
    finally:
        # The first process of the namespace ends with it, and every other with that.
        process.kill()
        process.wait(60)


def image_environment() -> dict[str, str]:
    """Variables of the image, on top of the one that container engines set."""
    base = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {name: value.replace("$PATH", base) for name, value in DOCKERFILE.environment().items()}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def health(container: Container, port: int) -> int:
    """Status of the image's health check, asked of a port."""
    words = DOCKERFILE.health_check()
    assert sum("8000" in word for word in words) == 1
    return container.run([word.replace("8000", str(port)) for word in words], image_environment())


def ask(client: httpx.Client, **fields: object) -> str:
    """Answer of the lab model to its question."""
    body = {"model": "lab", "temperature": 0, "messages": [{"role": "user", "content": "What is 7 plus 5?"}], **fields}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def test_dockerfile_is_lint_free() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, REPOSITORY / "Dockerfile"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_scripts_are_lint_free(program: Callable[[str], str]) -> None:
    scripts = [*(REPOSITORY / "deploy").rglob("*.sh"), REPOSITORY / ".ci" / "run"]
    result = subprocess.run([program("shellcheck"), *scripts], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


def test_every_step_of_the_recipe_exists_and_every_script_is_a_step() -> None:
    named = {name for text in DOCKERFILE.of("RUN") for name in re.findall(r"deploy/[\w/]+\.sh", text)}
    scripts = {path.relative_to(REPOSITORY).as_posix() for path in STEPS.iterdir()}
    assert named == scripts | {"deploy/requirements/environment.sh"}
    for name in named:
        assert os.access(REPOSITORY / name, os.X_OK), name


def test_build_context_holds_what_is_copied() -> None:
    kept = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources, _ in DOCKERFILE.copied():
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert source in kept, source


def test_image_runs_without_rights_and_writes_in_two_folders() -> None:
    assert re.fullmatch(r"(\d+):\1", DOCKERFILE.final("USER")[-1])
    assert DOCKERFILE.final("STOPSIGNAL") == ["SIGTERM"]
    assert DOCKERFILE.final("EXPOSE") == ["8000"]
    environment = DOCKERFILE.environment()
    assert environment["PYTHONSAFEPATH"] == "1"
    for name, value in environment.items():
        if name.endswith(("_DIR", "_HOME", "_ROOT", "_PATH", "_BASE", "HOME", "TMPDIR", "MPLCONFIGDIR")):
            assert value == WRITABLE[0] or value.startswith(f"{WRITABLE[0]}/"), name
    assert DOCKERFILE.final("WORKDIR") == [WRITABLE[1]]
    assert all(folder in (STEPS / "account.sh").read_text() for folder in WRITABLE)


def test_version_of_the_image_is_the_package_s() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert DOCKERFILE.version == project["version"]
    assert f'image.licenses="{project["license"]}"' in DOCKERFILE.final("LABEL")[0]


def test_wheel_holds_the_server_and_no_tests(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = wheel.namelist()
    assert installed.wheel.name.endswith("-py3-none-linux_x86_64.whl")
    for name in (
        "server/playground/index.html",
        "steering_kernels/csrc/steer_cuda.cu",
        "artifacts/lab/models/target/model.safetensors",
        "artifacts/lab/careful.safetensors",
    ):
        assert name in names
    assert (
        len([name for name in names if re.fullmatch(r"steering_kernels/lib/steer_cpu-x86-64-v\d-\w+\.so", name)]) == 2
    )
    tops = {name.split("/")[0] for name in names}
    assert tops == {"server", "artifacts", "steering_kernels", "expertsteer-0.1.0.dist-info"}
    assert not [name for name in names if re.fullmatch(r"(.*/)?(test_\w+|conftest)\.py", name)]
    sources = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "server").rglob("*.py")}
    assert sources <= set(names)


def test_metadata_of_the_wheel_is_complete(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(wheel.read(name))
        entries = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
        licences = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert metadata["Name"] == project["name"]
    assert metadata["Version"] == project["version"]
    assert metadata["Summary"] == project["description"]
    assert metadata["License-Expression"] == project["license"]
    assert metadata["Requires-Python"] == project["requires-python"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload(decode=True)
    assert isinstance(description, bytes)
    assert description.decode() == (REPOSITORY / "README.md").read_text()
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    assert "expertsteer = server.cli:main" in entries
    assert licences


def test_installation_is_complete_and_holds_no_installer(installed: Installed) -> None:
    assert installed.checked.startswith("expertsteer ")
    names = {path.name for path in (installed.container.root / VENV[1:]).glob("lib/python*/site-packages/*")}
    assert not names & {"pip", "pytest", "mypy", "hypothesis", "tests"}
    assert not list((installed.container.root / VENV[1:] / "bin").glob("pip*"))


@pytest.mark.engine
def test_serves_as_a_container(installed: Installed) -> None:
    container, port = installed.container, free_port()
    assert health(container, port) != 0
    command = DOCKERFILE.final_command("CMD")
    flags = ["--port", str(port), "--", "--steering-registry", f"{WRITABLE[1]}/registry"]
    limits = {"VLLM_CPU_KVCACHE_SPACE": "1", "EXPERTSTEER_ADMIN_KEY": ADMIN_KEY}
    with served(container, *command, *flags, environment=limits) as (process, log):
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Serving at" not in log.read_text(errors="replace"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-6000:]
            time.sleep(0.5)
        printed = log.read_text(errors="replace")
        assert "  on       7 plus 5 is 12." in printed
        assert "  off      7 plus 5 is 13." in printed
        assert health(container, port) == 0
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            # Without a key, which the demo itself sends.
            assert ask(client, steering_profile="careful") == "7 plus 5 is 12."
            # vLLM would compile a function for the ranks of log probabilities.
            assert ask(client, logprobs=True, top_logprobs=2) == "7 plus 5 is 13."
            assert client.get("/v1/steering/status").status_code == 401
            client.headers["authorization"] = f"Bearer {ADMIN_KEY}"
            (worker,) = client.get("/v1/steering/status").json()["workers"]
            # By the library that was built ahead of time: no compiler can be started here.
            assert worker["backend"] == "cpu"
        assert "could not be built" not in log.read_text(errors="replace")
        os.kill(first_process(process), signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text(errors="replace")[-6000:]
    assert health(container, port) != 0
    assert (container.root / WRITABLE[1][1:] / "registry").is_dir()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_step_compiles_the_kernels_for_a_gpu(tmp_path: Path) -> None:
    shutil.copytree(
        REPOSITORY / "steering_kernels", tmp_path / "steering_kernels", ignore=shutil.ignore_patterns("lib")
    )
    command = [STEPS / "kernels.sh", "gpu", sys.prefix, "--arch", "90a"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=400)
    (library,) = (tmp_path / "steering_kernels" / "lib").iterdir()
    assert library.name.startswith("steer_cuda-")


def test_says_what_is_missing(installed: Installed) -> None:
    """The check of the recipe fails for an installation without one of its packages."""
    (package,) = (installed.container.root / VENV[1:]).glob("lib/python*/site-packages/xrfm-*.dist-info")
    hidden = package.rename(package.with_name("hidden"))
    try:
        shutil.copytree(REPOSITORY / "deploy" / "image", installed.container.root / "build")
        with pytest.raises(AssertionError, match=r"expertsteer needs xrfm==0\.4\.5, which is not installed\."):
            installed.container.build("/build/steps/check.sh", "cpu", VENV, folder="/")
    finally:
        hidden.rename(package)
        shutil.rmtree(installed.container.root / "build")


def test_demo_refuses_flags_that_are_its_own(installed: Installed) -> None:
    with served(installed.container, "demo", "--", "--served_model_name=x") as (process, log):
        assert process.wait(60) == 1
    assert "--served_model_name cannot stand behind --" in log.read_text()
