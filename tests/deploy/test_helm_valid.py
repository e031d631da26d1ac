"""The chart is well formed, and what it renders is valid for Kubernetes and for the operators that read it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import charts
import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

# The oldest version that the chart says it runs on, and the newest that the validator knows.
KUBERNETES_VERSIONS = ("1.30", kubernetes_validate.latest_version())
CRDS = Path(__file__).parent / "crds"
STACK_VALUES = Path(__file__).parent / "values" / "production-stack.yaml"
EVERYTHING = Path(__file__).parent / "values" / "everything.yaml"
SETS = [*charts.VALUE_SETS, charts.KSERVE_VALUES, STACK_VALUES, EVERYTHING]
# Fields of a predictor that are KServe's own; what is left is the specification of a pod.
KSERVE_FIELDS = {"minReplicas", "maxReplicas", "autoScaling", "labels", "annotations", "deploymentStrategy"}
PROGRAM_TIMEOUT_S = 120


def check(item: dict[str, Any], version: str) -> None:
    """Hold an object against Kubernetes' schema, or against the one in crds/."""
    own = CRDS / f"{item['kind'].lower()}.json"
    if own.exists():
        jsonschema.Draft7Validator(json.loads(own.read_text())).validate(item)
    if item["kind"] == "InferenceService":
        predictor = item["spec"]["predictor"]
        spec = {key: value for key, value in predictor.items() if key not in KSERVE_FIELDS}
        item = {"apiVersion": "v1", "kind": "Pod", "metadata": item["metadata"], "spec": spec}
    elif own.exists():
        return
    kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_object_is_valid(path: Path, version: str) -> None:
    found = charts.objects(charts.read(path))
    assert found
    for item in found:
        check(item, version)


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_lint(path: Path) -> None:
    report = helm_python.lint(charts.CHART, charts.read(path), strict=True, kube_version="v1.30.0")
    assert report["errors"] == []
    # Severity 2 is a warning; 1 is the recommendation of an icon.
    assert [each for each in report["messages"] if each["severity"] > 1] == []


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_names_are_unique_and_belong_to_the_release(path: Path) -> None:
    found = charts.objects(charts.read(path))
    names = [(each["kind"], each["metadata"]["name"]) for each in found]
    assert len(set(names)) == len(names)
    for item in found:
        assert item["metadata"]["name"].startswith(f"{charts.RELEASE}-")
        assert len(item["metadata"]["name"]) <= 63
        # Those of the user are as the user has written them.
        assert item["metadata"].get("namespace", charts.NAMESPACE) == charts.NAMESPACE


def test_an_invalid_object_does_not_pass() -> None:
    item = charts.workload(charts.one_model())
    item["spec"]["template"]["spec"]["containers"][0]["imagePullPolicies"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        check(item, KUBERNETES_VERSIONS[0])
    monitor = charts.only(charts.read(STACK_VALUES), "ServiceMonitor")
    monitor["spec"]["endpoint"] = []
    with pytest.raises(jsonschema.ValidationError):
        check(monitor, KUBERNETES_VERSIONS[0])


def test_without_models_there_is_nothing_to_install() -> None:
    assert charts.objects({}) == []
    assert "no model yet" in charts.notes({})


def test_alerts_and_dashboard_are_those_of_the_repository(tmp_path: Path) -> None:
    values = charts.one_model(prometheusRule={"enabled": True}, grafanaDashboards={"enabled": True})
    rule = charts.only(values, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((charts.DEPLOY / "prometheus" / "alerts.yaml").read_text())
    (dashboard,) = [each for each in charts.objects(values) if each["metadata"]["name"] == "demo-dashboard"]
    written = (charts.DEPLOY / "grafana" / "expertsteer.json").read_text()
    assert dashboard["data"] == {"expertsteer.json": written}
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    # In the archive they are files, not links that lead out of it.
    archive = helm_python.package(charts.CHART, destination=tmp_path)
    with helm_python.Chart.load(archive) as packed:
        contents = {each["name"]: each["data"] for each in packed.files}
    assert contents["files/expertsteer.json"] == written
    assert set(contents) >= {"README.md", "files/alerts.yaml", "files/ask.py"}


def test_the_readme_lists_the_values() -> None:
    script = charts.DEPLOY / "helm" / "values_table.py"
    done = subprocess.run([sys.executable, script, "--check"], timeout=PROGRAM_TIMEOUT_S)
    assert done.returncode == 0, "run: python deploy/helm/values_table.py"


def test_defaults_and_schema_have_the_same_fields() -> None:
    schema = json.loads((charts.CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    defaults = charts.read(charts.CHART / "values.yaml")
    jsonschema.Draft7Validator(schema).validate(defaults)
    for section, fields in defaults.items():
        assert section in schema["properties"]
        if isinstance(fields, dict):
            assert set(fields) <= set(schema["properties"][section]["properties"])


def test_chart_and_package_have_one_version() -> None:
    chart = charts.read(charts.CHART / "Chart.yaml")
    pyproject = (charts.DEPLOY.parent / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in pyproject


def test_the_inference_service_is_what_the_chart_renders() -> None:
    rendered = charts.texts(charts.read(charts.KSERVE_VALUES))
    wanted = [
        each
        for name in ("config-maps.yaml", "inference-service.yaml", "service.yaml")
        for each in charts.documents(rendered[name])
    ]
    for item in wanted:
        for label in ("app.kubernetes.io/managed-by", "helm.sh/chart"):
            del item["metadata"]["labels"][label]
    written = (charts.KSERVE_VALUES.parent / "inference-service.yaml").read_text()
    assert list(charts.documents(written)) == wanted, "the first lines of the file say how it is made"


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_kubeconform(path: Path) -> None:
    program = shutil.which("kubeconform")
    if program is None:
        pytest.skip("kubeconform is not installed; test_every_object_is_valid has the same schemas")
    stream = yaml.safe_dump_all(charts.objects(charts.read(path)))
    command = [program, "-strict", "-summary", "-ignore-missing-schemas", "-"]
    done = subprocess.run(command, input=stream, text=True, capture_output=True, timeout=PROGRAM_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", charts.VALUE_SETS, ids=lambda path: path.stem)
def test_the_helm_program_renders_the_same(path: Path) -> None:
    program = shutil.which("helm")
    if program is None:
        pytest.skip("helm is not installed; the other tests render with its library")
    command = [program, "template", charts.RELEASE, charts.CHART, "-n", charts.NAMESPACE, "-f", path]
    done = subprocess.run(command, text=True, capture_output=True, timeout=PROGRAM_TIMEOUT_S)
    assert done.returncode == 0, done.stderr

    def key(item: dict[str, Any]) -> tuple[str, str]:
        return item["kind"], item["metadata"]["name"]

    assert sorted(charts.documents(done.stdout), key=key) == sorted(charts.objects(charts.read(path)), key=key)
