"""deploy/compose: valid, confined, and in agreement with what it starts."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile import REPOSITORY, Dockerfile
from parsed_flags import parsed_flags

FOLDER = REPOSITORY / "deploy" / "compose"
FILES = ("compose.yaml", "compose.gpu.yaml")
SERVICES = ("server", "prometheus", "grafana")


def load(name: str, **variables: str) -> dict[str, Any]:
    """A compose file, with these values of variables, and those that others have unless set."""
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1], found[2]), (FOLDER / name).read_text())
    document: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:\?[^}]*\}", "given", text))
    return document


COMPOSE = load("compose.yaml")["services"]


def mounts(service: str) -> dict[str, str]:
    """Target of each mounted file, folder or volume of a service, by source."""
    return {volume.split(":")[0]: volume.split(":")[1] for volume in COMPOSE[service]["volumes"]}


@pytest.mark.parametrize("name", FILES)
def test_follows_the_specification(name: str) -> None:
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run([*command, FOLDER / name], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_stops_with_a_clear_message_without_an_admin_key() -> None:
    assert re.search(r"\$\{EXPERTSTEER_ADMIN_KEY:\?set it [^}]+\}", (FOLDER / "compose.yaml").read_text())
    assert re.search(r"\$\{EXPERTSTEER_MODEL:\?set it [^}]+\}", (FOLDER / "compose.gpu.yaml").read_text())


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_confined(service: str) -> None:
    definition = COMPOSE[service]
    assert definition["read_only"] is True
    assert definition["cap_drop"] == ["ALL"]
    assert definition["security_opt"] == ["no-new-privileges:true"]
    # A tag that names a version.
    assert re.search(r":v?\d+\.\d+\.\d+(-cpu)?$", definition["image"])
    for port in definition["ports"]:
        assert port.startswith("127.0.0.1:"), port


@pytest.mark.parametrize("service", SERVICES)
def test_every_mount_exists(service: str) -> None:
    volumes = load("compose.yaml")["volumes"]
    for mount in COMPOSE[service]["volumes"]:
        source, _, *options = mount.split(":")
        if source.startswith("."):
            assert (FOLDER / source).exists(), source
            assert options == ["ro"]
        else:
            assert source in volumes


def test_server_writes_volumes_only() -> None:
    environment = Dockerfile().environment()
    assert set(mounts("server").values()) == {environment["HOME"], Dockerfile().final("WORKDIR")[0]}


@pytest.mark.parametrize("name", FILES)
def test_image_is_built_for_its_target(name: str) -> None:
    server = load(name)["services"]["server"]
    target = "cpu" if server["image"].endswith("-cpu") else "gpu"
    assert server["build"]["args"] == {"TARGET": target}
    assert (FOLDER / server["build"]["context"]).resolve() == REPOSITORY
    assert f"/server:{Dockerfile().version}" in server["image"]


def command_of(server: dict[str, Any]) -> list[str]:
    """Words of a service's command; compose splits a text as a shell does."""
    command = server["command"]
    return shlex.split(command) if isinstance(command, str) else command


def test_server_understands_its_command() -> None:
    registry = mounts("server")["registry"]
    more = load("compose.gpu.yaml", EXPERTSTEER_FLAGS="--tensor-parallel-size 4 --served-model-name 'my model'")
    commands = [command_of(each["services"]["server"]) for each in (*map(load, FILES), more)]
    parsed = parsed_flags(commands)
    assert [flags.get("tensor_parallel_size") for flags in parsed] == [1, 1, 4]
    assert parsed[-1]["served_model_name"] == ["my model"]
    for flags in parsed:
        assert "refused" not in flags, flags
        assert (flags["host"], flags["port"]) == ("0.0.0.0", 8000)
        assert flags["steering_registry"].startswith(f"{registry}/")
        # The engine stops the container only after the server has let running requests end.
        assert int(COMPOSE["server"]["stop_grace_period"].removesuffix("s")) > flags["shutdown_timeout"]


def test_gpus_are_chosen_by_variables_that_may_be_unset() -> None:
    server = load("compose.gpu.yaml")["services"]["server"]
    # None: passed on where it is set. An empty text would hide every GPU.
    assert server["environment"]["CUDA_VISIBLE_DEVICES"] is None
    assert server["deploy"]["resources"]["reservations"]["devices"][0]["count"] == "all"


def test_addresses_agree() -> None:
    prometheus = yaml.safe_load((FOLDER / "../prometheus/prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    provisioning = FOLDER / "../grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/expertsteer.yaml").read_text())["providers"]
    assert mounts("grafana")["../grafana/expertsteer.json"].rpartition("/")[0] == provider["options"]["path"]
    assert mounts("grafana")["../grafana/provisioning"] == "/etc/grafana/provisioning"
    for service, port in (("server", 8000), ("prometheus", 9090), ("grafana", 3000)):
        assert [each.split(":")[-1] for each in COMPOSE[service]["ports"]] == [str(port)]


def test_prometheus_accepts_what_is_mounted(program: Any) -> None:
    flags = dict(flag.split("=", 1) for flag in COMPOSE["prometheus"]["command"])
    assert flags["--config.file"] == f"{mounts('prometheus')['../prometheus']}/prometheus.yml"
    assert flags["--storage.tsdb.path"] == mounts("prometheus")["prometheus"]
    command = [program("promtool"), "check", "config", FOLDER / "../prometheus/prometheus.yml"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
