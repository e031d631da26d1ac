"""Arguments of the containers are those that the server takes, as its own parser says."""

from pathlib import Path
from typing import Any

import charts
import pytest
from dockerfile import Dockerfile
from parsed_flags import parsed_flags

from server import declaration

STACK = charts.DEPLOY / "helm" / "production-stack-values.yaml"
VALUES = Path(__file__).parent / "values"
EVERYTHING = VALUES / "everything.yaml"
SETS = [*charts.VALUE_SETS, charts.KSERVE_VALUES, VALUES / "production-stack.yaml", EVERYTHING]
WRONG = "a flag that does not exist"


def containers(path: Path) -> list[dict[str, Any]]:
    """Containers of the servers that a file of values makes."""
    found = []
    for item in charts.objects(charts.read(path)):
        if item["kind"] == "InferenceService":
            found += item["spec"]["predictor"]["containers"]
        elif item["kind"] in ("Deployment", "StatefulSet"):
            found += item["spec"]["template"]["spec"]["containers"]
    return found


def stack_command() -> list[str]:
    """What the production stack's chart starts, but for its own name: `serve MODEL --host H --port P FLAGS`."""
    (model,) = charts.read(STACK)["servingEngineSpec"]["modelSpec"]
    config = model["vllmConfig"]
    flags = ["--enable-prefix-caching", "--max-model-len", str(config["maxModelLen"]), "--dtype", config["dtype"]]
    return ["serve", model["modelURL"], "--host", "0.0.0.0", "--port", "8000", *flags, *config["extraArgs"]]


@pytest.fixture(scope="module")
def parsed() -> dict[str, list[dict[str, Any]]]:
    """Flags of each container, by the name of the file of values."""
    wanted = [(path.stem, each["args"]) for path in SETS for each in containers(path)]
    wanted += [(STACK.stem, stack_command()), (WRONG, ["serve", "m", "--no-such-flag"])]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for (name, _), flags in zip(wanted, parsed_flags([arguments for _, arguments in wanted]), strict=True):
        by_name.setdefault(name, []).append(flags)
    return by_name


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_the_server_takes_the_arguments(path: Path, parsed: dict[str, list[dict[str, Any]]]) -> None:
    for container, flags in zip(containers(path), parsed[path.stem], strict=True):
        assert "refused" not in flags, flags["refused"]
        port = container["ports"][0]["containerPort"]
        assert (flags["host"], flags["port"]) == ("0.0.0.0", port)


def test_every_flag_of_steering_arrives(parsed: dict[str, list[dict[str, Any]]]) -> None:
    first, second = parsed[EVERYTHING.stem]
    wanted = {
        "model_tag": "acme/first",
        "tensor_parallel_size": 2,
        "data_parallel_size": 2,
        "enable_lora": True,
        "max_loras": 2,
        "enforce_eager": True,
        "revision": "main",
        "shutdown_timeout": 120,
        "steering_registry": "/var/lib/expertsteer/registry",
        "steering_declaration": "/etc/expertsteer/bundles/bundles.yaml",
        "steering_remote": ["s3"],
        "steering_bundle_root": "/bundles",
        "steering_keys": "/etc/expertsteer/keys/keys.yaml",
        "steering_signatures": "enforce",
        "steering_signature_key": [f"/etc/expertsteer/signature-keys/{name}.pem" for name in ("team", "release")],
        "steering_rows": 8192,
        "steering_keep_versions": 0,
        "steering_max_bundle_mib": 64,
        "steering_metric_profiles": 50,
        "steering_fingerprint": "ignore",
        "steering_fusion": "never",
        "disable_steering_playground": True,
        "steering_write_rate": 5,
    }
    assert {name: first[name] for name in wanted} == wanted
    # A model of its own folder, with its own section `steering`.
    assert (second["model_tag"], second["steering_remote"]) == ("/models/second", [])


def test_the_demo_keeps_its_model(parsed: dict[str, list[dict[str, Any]]]) -> None:
    (flags,) = parsed["cpu-demo-values"]
    assert flags["served_model_name"] == ["lab"]
    assert flags["shutdown_timeout"] == 30


def test_values_for_the_chart_of_the_production_stack(parsed: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    """That chart starts `vllm`; the script that is mounted in its place hands the words to this server."""
    values = charts.read(STACK)
    (flags,) = parsed[STACK.stem]
    assert "refused" not in flags, flags["refused"]
    (model,) = values["servingEngineSpec"]["modelSpec"]
    maps = {each["metadata"]["name"]: each["data"] for each in values["extraObjects"]}
    volumes = {each["name"]: each for each in model["extraVolumes"]}
    mounts = {each["name"]: each for each in model["extraVolumeMounts"]}
    assert set(volumes) == set(mounts)
    source = volumes["vllm-command"]["configMap"]
    assert maps[source["name"]][mounts["vllm-command"]["subPath"]] == '#!/bin/sh\nexec expertsteer "$@"\n'
    assert source["defaultMode"] & 0o111 == 0o111
    assert Path(mounts["vllm-command"]["mountPath"]).name == "vllm"
    # That chart leaves a pod Kubernetes' default of 30 seconds to end.
    assert flags["shutdown_timeout"] < 30
    bundles = Path(flags["steering_declaration"])
    assert bundles.parent == Path(mounts["bundles"]["mountPath"])
    file = tmp_path / bundles.name
    file.write_text(maps[volumes["bundles"]["configMap"]["name"]][bundles.name])
    assert set(declaration.read(file).declaration.profiles) == {"medical"}
    assert Path(flags["steering_registry"]).is_relative_to(mounts["registry"]["mountPath"])


def test_that_script_stands_before_vllms_own() -> None:
    """The image's first folder of programs is where it is mounted."""
    (model,) = charts.read(STACK)["servingEngineSpec"]["modelSpec"]
    (mount,) = [each["mountPath"] for each in model["extraVolumeMounts"] if each["name"] == "vllm-command"]
    assert Dockerfile().environment()["PATH"].split(":")[0] == str(Path(mount).parent)


def test_a_wrong_flag_is_refused(parsed: dict[str, list[dict[str, Any]]]) -> None:
    (flags,) = parsed[WRONG]
    assert "--no-such-flag" in flags["refused"]
