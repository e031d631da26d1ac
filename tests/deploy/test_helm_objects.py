"""What the chart's values turn into: pods, probes, registries, keys, autoscalers, policies."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import charts
import helm_python
import pytest
import yaml
from dockerfile import Dockerfile

from server import declaration

ONE_GPU, EIGHT_GPUS, DEMO = (
    charts.CHART / "ci" / f"{name}-values.yaml" for name in ("one-gpu", "tensor-parallel-8", "cpu-demo")
)
EVERYTHING = Path(__file__).parent / "values" / "everything.yaml"
STACK = Path(__file__).parent / "values" / "production-stack.yaml"
DIGEST = "sha256:" + "1" * 64
SECRET = {"secretName": "keys", "secretKey": "one"}
MANIFEST = {"registry": {"mode": "manifest", "bundles": {"schema": 1, "profiles": {}}}}
CRON = [{"type": "cron", "metadata": {"desiredReplicas": "1"}}]
# From a stop's announcement to the kernel's signal: preStop, the server's own bound, and this for what is around it.
STOP_MARGIN_S = 30


def named(entries: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The one entry of a list that is called so."""
    (found,) = [each for each in entries if each["name"] == name]
    return found


def value_of(arguments: list[str], flag: str) -> str:
    """What follows a flag that is given once."""
    assert arguments.count(flag) == 1
    return arguments[arguments.index(flag) + 1]


def mounted(values: dict[str, Any], path: str) -> dict[str, Any]:
    """The volume that is mounted at a path."""
    (mount,) = [each for each in charts.container(values)["volumeMounts"] if each["mountPath"] == path]
    return named(charts.pod(values)["volumes"], mount["name"])


class TestPod:
    def test_it_may_do_nothing_but_serve(self) -> None:
        spec, container = charts.pod(charts.one_model()), charts.container(charts.one_model())
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }

    def test_user_and_writable_folders_are_those_of_the_image(self) -> None:
        image = Dockerfile()
        values = charts.one_model(steering=MANIFEST)
        security = charts.pod(values)["securityContext"]
        assert image.final("USER")[-1] == f"{security['runAsUser']}:{security['runAsGroup']}"
        written = [each["mountPath"] for each in charts.container(values)["volumeMounts"] if not each.get("readOnly")]
        folders = {name: value for name, value in image.environment().items() if value.startswith("/var/")}
        assert folders["HOME"] and folders["HF_HOME"] and folders["TMPDIR"]
        for name, folder in folders.items():
            assert any(folder == each or folder.startswith(f"{each}/") for each in written), name
        assert charts.container(values)["command"] == image.final_command("ENTRYPOINT")

    def test_a_given_security_context_is_merged(self) -> None:
        engine = {"securityContext": {"runAsUser": 1000}, "containerSecurityContext": {"readOnlyRootFilesystem": False}}
        values = charts.one_model(servingEngineSpec=engine)
        assert charts.pod(values)["securityContext"]["runAsUser"] == 1000
        assert charts.pod(values)["securityContext"]["runAsNonRoot"] is True
        assert charts.container(values)["securityContext"]["readOnlyRootFilesystem"] is False
        assert charts.container(values)["securityContext"]["capabilities"] == {"drop": ["ALL"]}

    def test_probes(self) -> None:
        container = charts.container(charts.one_model())
        paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
        assert paths == {"startup": "/health/live", "liveness": "/health/live", "readiness": "/health/ready"}
        startup = container["startupProbe"]
        assert startup["failureThreshold"] * startup["periodSeconds"] >= 3600

    @pytest.mark.parametrize(("pause", "shutdown"), [(5, 30), (10, 120)])
    def test_answers_may_end_before_the_pod_does(self, pause: int, shutdown: int) -> None:
        values = charts.one_model(steering={"preStopSeconds": pause, "shutdownTimeoutSeconds": shutdown})
        assert charts.container(values)["lifecycle"]["preStop"]["sleep"]["seconds"] == pause
        assert value_of(charts.container(values)["args"], "--shutdown-timeout") == str(shutdown)
        assert charts.pod(values)["terminationGracePeriodSeconds"] == pause + shutdown + STOP_MARGIN_S

    def test_shared_memory_with_parallelism_only(self) -> None:
        values = charts.read(EIGHT_GPUS)
        assert mounted(values, "/dev/shm") == {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}}
        assert "/dev/shm" not in [each["mountPath"] for each in charts.container(charts.read(DEMO))["volumeMounts"]]

    def test_gpus_and_their_runtime_class(self) -> None:
        values = charts.read(EIGHT_GPUS)
        resources = charts.container(values)["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "8"
        assert charts.pod(values)["runtimeClassName"] == "nvidia"
        limits = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
        assert charts.pod(charts.one_model(limits))["runtimeClassName"] == "nvidia"
        assert "runtimeClassName" not in charts.pod(charts.read(DEMO))
        assert "runtimeClassName" not in charts.pod(charts.one_model({"requestGPU": 1, "runtimeClassName": ""}))

    def test_large_numbers_stay_whole(self) -> None:
        arguments = charts.container(charts.one_model({"vllmConfig": {"maxModelLen": 10485760}}))["args"]
        assert value_of(arguments, "--max-model-len") == "10485760"

    def test_what_is_left_out_is_left_to_vllm(self) -> None:
        arguments = charts.container(charts.one_model())["args"]
        assert not [each for each in arguments if "prefix-caching" in each or "chunked-prefill" in each]

    def test_the_last_of_several_variables_of_one_name_stays(self) -> None:
        environment = charts.container(charts.read(STACK))["env"]
        assert named(environment, "SHARED")["value"] == "model"
        assert named(environment, "VLLM_LOGGING_LEVEL")["value"] == "INFO"

    def test_the_demo_is_the_model_of_the_image(self) -> None:
        arguments = charts.container(charts.read(DEMO))["args"]
        assert arguments[:5] == ["demo", "--host", "0.0.0.0", "--port", "8000"]
        assert arguments[5:7] == ["--show-log", "--"]

    def test_labels_let_the_router_of_the_production_stack_find_it(self) -> None:
        labels = charts.workload(charts.one_model())["spec"]["template"]["metadata"]["labels"]
        assert labels | {"environment": "test", "release": "test", "model": "m"} == labels

    def test_labels_of_the_user_do_not_break_the_selector(self) -> None:
        item = charts.workload(charts.one_model({"podLabels": {"model": "other", "team": "a"}}))
        labels = item["spec"]["template"]["metadata"]["labels"]
        assert labels["team"] == "a"
        assert item["spec"]["selector"]["matchLabels"].items() <= labels.items()


class TestRegistry:
    def test_none_ends_with_the_container(self) -> None:
        values = charts.one_model()
        assert charts.workload(values)["kind"] == "Deployment"
        assert not [each for each in charts.container(values)["args"] if each.startswith("--steering")]

    def test_pvc_is_a_volume_for_each_pod(self) -> None:
        registry = {"mode": "pvc", "storage": "3Gi", "storageClass": "fast"}
        values = charts.one_model({"replicaCount": 2}, steering={"registry": registry})
        item = charts.workload(values)
        (claim,) = item["spec"]["volumeClaimTemplates"]
        assert item["kind"] == "StatefulSet"
        assert claim["spec"] == {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "fast",
            "resources": {"requests": {"storage": "3Gi"}},
        }
        mount = named(charts.container(values)["volumeMounts"], claim["metadata"]["name"])
        folder = value_of(charts.container(values)["args"], "--steering-registry")
        # Not the root of the file system, which holds more than the registry.
        assert folder.startswith(f"{mount['mountPath']}/")
        headless = [each for each in charts.of_kind(charts.objects(values), "Service") if "clusterIP" in each["spec"]]
        assert [each["metadata"]["name"] for each in headless] == [item["spec"]["serviceName"]]
        assert "every pod" in charts.notes(values)

    @pytest.mark.parametrize("path", [ONE_GPU, charts.KSERVE_VALUES], ids=lambda path: path.stem)
    def test_the_server_reads_what_is_declared(self, path: Path, tmp_path: Path) -> None:
        values = charts.read(path)
        (item,) = [each for each in charts.objects(values) if each["metadata"]["name"] == "demo-qwen-bundles"]
        file = tmp_path / "bundles.yaml"
        file.write_text(item["data"]["bundles.yaml"])
        declared = declaration.read(file).declaration
        wanted = values["steering"]["registry"]["bundles"]["profiles"]
        assert {name: each.source for name, each in declared.profiles.items()} == {
            name: each["source"] for name, each in wanted.items()
        }
        assert declared.profiles["medical"].strength == 0.5

    def test_every_field_of_a_declared_profile_arrives(self, tmp_path: Path) -> None:
        values = charts.read(EVERYTHING)
        (item,) = [each for each in charts.objects(values) if each["metadata"]["name"] == "demo-first-bundles"]
        assert yaml.safe_load(item["data"]["bundles.yaml"]) == values["steering"]["registry"]["bundles"]
        file = tmp_path / "bundles.yaml"
        file.write_text(item["data"]["bundles.yaml"])
        read = declaration.read(file).declaration
        assert read.prune is False
        assert read.profiles["calm"].layers == (2, 3) or list(read.profiles["calm"].layers or ()) == [2, 3]

    def test_small_numbers_arrive(self, tmp_path: Path) -> None:
        values = charts.read(ONE_GPU)
        values["steering"]["registry"]["bundles"]["profiles"]["medical"]["strength"] = 0.00001
        (item,) = [each for each in charts.objects(values) if each["metadata"]["name"] == "demo-qwen-bundles"]
        file = tmp_path / "bundles.yaml"
        file.write_text(item["data"]["bundles.yaml"])
        assert declaration.read(file).declaration.profiles["medical"].strength == 0.00001

    def test_the_schema_knows_every_field_that_the_server_knows(self) -> None:
        schema = json.loads((charts.CHART / "values.schema.json").read_text())["definitions"]["bundles"]["properties"]
        profile = schema["profiles"]["additionalProperties"]["properties"]
        known = {field.alias or name for name, field in declaration.DeclaredProfile.model_fields.items()}
        assert set(profile) == known
        assert set(schema) == {field.alias or name for name, field in declaration.Declaration.model_fields.items()}

    def test_a_folder_is_mounted_so_that_changes_arrive(self) -> None:
        values = charts.read(ONE_GPU)
        path = value_of(charts.container(values)["args"], "--steering-declaration")
        (mount,) = [each for each in charts.container(values)["volumeMounts"] if each["name"] == "bundles"]
        assert Path(path).parent == Path(mount["mountPath"])
        assert "subPath" not in mount
        assert mounted(values, mount["mountPath"])["configMap"]["name"] == "demo-qwen-bundles"

    def test_a_change_of_what_is_declared_restarts_nothing(self) -> None:
        before, after = charts.read(ONE_GPU), charts.read(ONE_GPU)
        after["steering"]["registry"]["bundles"]["profiles"]["medical"]["strength"] = 0.25
        assert charts.objects(before) != charts.objects(after)
        assert charts.workload(before) == charts.workload(after)

    def test_what_a_model_declares_is_its_own(self) -> None:
        values = charts.read(EVERYTHING)
        pods = {
            item["metadata"]["name"]: item["spec"]["template"]["spec"]
            for item in charts.objects(values)
            if item["kind"] in ("StatefulSet", "Deployment")
        }
        names = {name: named(pod["volumes"], "bundles")["configMap"]["name"] for name, pod in pods.items()}
        assert names == {"demo-first": "demo-first-bundles", "demo-second": "my-bundles"}


class TestKeys:
    def test_they_come_from_secrets(self) -> None:
        engine = {"vllmApiKey": SECRET}
        values = charts.one_model({"hf_token": SECRET}, servingEngineSpec=engine, steering={"adminKey": SECRET})
        environment = charts.container(values)["env"]
        for name in ("VLLM_API_KEY", "EXPERTSTEER_ADMIN_KEY", "HF_TOKEN"):
            assert named(environment, name)["valueFrom"] == {"secretKeyRef": {"name": "keys", "key": "one"}}
        assert charts.of_kind(charts.objects(values), "Secret") == []

    def test_texts_are_in_the_secret_and_nowhere_else(self) -> None:
        texts = {"vllmApiKey": "text-of-inference", "adminKey": "text-of-admin", "hf_token_m": "text-of-hub"}
        values = charts.one_model(
            {"hf_token": "text-of-hub"},
            servingEngineSpec={"vllmApiKey": "text-of-inference"},
            steering={"adminKey": "text-of-admin"},
        )
        found = charts.objects(values)
        (secret,) = charts.of_kind(found, "Secret")
        assert secret["stringData"] == texts
        rest = json.dumps([each for each in found if each["kind"] != "Secret"]) + charts.notes(values)
        assert not [text for text in texts.values() if text in rest]
        for variable, key in (("VLLM_API_KEY", "vllmApiKey"), ("EXPERTSTEER_ADMIN_KEY", "adminKey")):
            reference = named(charts.container(values)["env"], variable)["valueFrom"]["secretKeyRef"]
            assert reference == {"name": secret["metadata"]["name"], "key": key}

    def test_a_changed_text_restarts_the_pods(self) -> None:
        first, second = (charts.one_model(steering={"adminKey": key}) for key in ("one-key", "another-key"))
        assert charts.workload(first) != charts.workload(second)

    def test_a_new_chart_alone_restarts_nothing(self, tmp_path: Path) -> None:
        values = charts.one_model(
            {"hf_token": "text-of-hub"},
            servingEngineSpec={"vllmApiKey": "text-of-inference"},
            steering={"adminKey": "text-of-admin"},
        )
        later = tmp_path / "expertsteer"
        shutil.copytree(charts.CHART, later)
        description = later / "Chart.yaml"
        description.write_text(re.sub(r"ersion: .+", "ersion: 99.0.0", description.read_text()))
        rendered = helm_python.Chart.load(later).render(values, name=charts.RELEASE, namespace=charts.NAMESPACE)
        (item,) = charts.documents(rendered["expertsteer/templates/workload.yaml"])
        assert item["metadata"]["labels"]["app.kubernetes.io/version"] == "99.0.0"
        assert item["spec"] == charts.workload(values)["spec"]

    def test_a_file_of_keys(self) -> None:
        values = charts.read(EVERYTHING)
        (item,) = [
            each
            for each in charts.objects(values)
            if each["metadata"]["name"] == "demo-first" and each["kind"] == "StatefulSet"
        ]
        pod = item["spec"]["template"]["spec"]
        path = Path(value_of(pod["containers"][0]["args"], "--steering-keys"))
        secret = named(pod["volumes"], "keys")["secret"]
        assert secret["secretName"] == "role-keys"
        assert secret["items"] == [{"key": "keys.yaml", "path": path.name}]
        # Others may not read it; the group of the user may.
        assert secret["defaultMode"] == 0o440
        assert named(pod["containers"][0]["volumeMounts"], "keys")["mountPath"] == str(path.parent)

    def test_without_a_key_the_notes_say_so(self) -> None:
        assert "Everybody who reaches the Service" in charts.notes(charts.one_model())
        assert "Everybody" not in charts.notes(charts.one_model(servingEngineSpec={"vllmApiKey": SECRET}))
        assert "Everybody" not in charts.notes(charts.one_model(steering={"keys": SECRET}))


class TestScaling:
    def test_horizontal_pod_autoscaler(self) -> None:
        scaling = {"enabled": True, "minReplicas": 2, "maxReplicas": 6, "targets": {"steeredRequests": 40}}
        values = charts.one_model({"autoscaling": scaling}, steering=MANIFEST)
        item = charts.only(values, "HorizontalPodAutoscaler")
        assert (item["spec"]["minReplicas"], item["spec"]["maxReplicas"]) == (2, 6)
        assert item["spec"]["scaleTargetRef"]["name"] == charts.workload(values)["metadata"]["name"]
        targets = {
            each["pods"]["metric"]["name"]: each["pods"]["target"]["averageValue"] for each in item["spec"]["metrics"]
        }
        assert targets == {
            "vllm_num_requests_waiting": "5",
            "steering_engine_requests": "40",
            "vllm_kv_cache_usage": "850m",
        }
        # The autoscaler decides; a number here would be put back by every upgrade.
        assert "replicas" not in charts.workload(values)["spec"]

    def test_the_adapter_offers_what_the_autoscaler_asks_for(self) -> None:
        adapter = charts.read(charts.DEPLOY / "helm" / "prometheus-adapter-values.yaml")
        offered = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
        targets = {"waitingRequests": 5, "steeredRequests": 200, "cachePercent": 85}
        scaling = {"enabled": True, "targets": targets}
        item = charts.only(charts.one_model({"autoscaling": scaling}, steering=MANIFEST), "HorizontalPodAutoscaler")
        assert {each["pods"]["metric"]["name"] for each in item["spec"]["metrics"]} == offered

    def test_steered_requests_count_only_where_their_number_is_given(self) -> None:
        item = charts.only(charts.read(ONE_GPU), "HorizontalPodAutoscaler")
        names = {each["pods"]["metric"]["name"] for each in item["spec"]["metrics"]}
        assert names == {"vllm_num_requests_waiting", "vllm_kv_cache_usage"}

    def test_keda(self) -> None:
        targets = {"steeredRequests": 200, "cachePercent": 0}
        keda = {"enabled": True, "minReplicaCount": 2, "maxReplicaCount": 3, "targets": targets}
        values = charts.one_model({"keda": keda}, steering=MANIFEST)
        item = charts.only(values, "ScaledObject")
        assert (item["spec"]["minReplicaCount"], item["spec"]["maxReplicaCount"]) == (2, 3)
        queries = [each["metadata"]["query"] for each in item["spec"]["triggers"]]
        where = '{namespace="steering",service="demo-m-engine-service"}'
        assert queries == [f"sum(vllm:num_requests_waiting{where})", f"sum(steering_engine_requests{where})"]
        service = [each for each in charts.of_kind(charts.objects(values), "Service")]
        assert [each["metadata"]["name"] for each in service] == ["demo-m-engine-service"]
        assert "replicas" not in charts.workload(values)["spec"]

    def test_keda_keeps_a_pod_whose_series_can_wake_others(self) -> None:
        item = charts.only(charts.one_model({"keda": {"enabled": True}}, steering=MANIFEST), "ScaledObject")
        assert (item["spec"]["minReplicaCount"], item["spec"]["maxReplicaCount"]) == (1, 4)

    def test_a_share_is_of_a_pod_and_not_of_each_engine_in_it(self) -> None:
        item = charts.only(charts.one_model({"keda": {"enabled": True}}, steering=MANIFEST), "ScaledObject")
        (query,) = [
            each["metadata"]["query"] for each in item["spec"]["triggers"] if "usage_perc" in each["metadata"]["query"]
        ]
        assert query.startswith("sum(avg by (pod) (vllm:kv_cache_usage_perc{")

    def test_triggers_of_the_user_may_wake_a_model_without_pods(self) -> None:
        keda = {"enabled": True, "minReplicaCount": 0, "triggers": CRON}
        item = charts.only(charts.one_model({"keda": keda}, steering=MANIFEST), "ScaledObject")
        assert item["spec"]["minReplicaCount"] == 0
        assert "idleReplicaCount" not in item["spec"]
        keda = {"enabled": True, "minReplicaCount": 2, "idleReplicaCount": 0, "triggers": CRON}
        item = charts.only(charts.one_model({"keda": keda}, steering=MANIFEST), "ScaledObject")
        assert (item["spec"]["minReplicaCount"], item["spec"]["idleReplicaCount"]) == (2, 0)

    def test_triggers_of_the_user_win(self) -> None:
        item = charts.only(charts.read(STACK), "ScaledObject")
        assert [each["metadata"]["query"] for each in item["spec"]["triggers"]] == ["sum(vllm:num_requests_waiting)"]

    def test_neither_unless_asked_for(self) -> None:
        kinds = {each["kind"] for each in charts.objects(charts.one_model({"replicaCount": 3}))}
        assert not kinds & {"HorizontalPodAutoscaler", "ScaledObject"}
        assert charts.workload(charts.one_model({"replicaCount": 3}))["spec"]["replicas"] == 3
        assert charts.workload(charts.one_model({"replicaCount": 0}))["spec"]["replicas"] == 0


class TestVolumeForModels:
    @pytest.mark.parametrize(
        ("model", "wanted"),
        [
            ({"pvcStorage": "9Gi"}, "Recreate"),
            ({"pvcStorage": "9Gi", "pvcAccessMode": ["ReadWriteOncePod"]}, "Recreate"),
            ({"pvcStorage": "9Gi", "pvcAccessMode": ["ReadWriteOnce", "ReadWriteMany"]}, "RollingUpdate"),
            ({"pvcStorage": {"emptyDir": {}}, "replicaCount": 2}, "RollingUpdate"),
            ({}, "RollingUpdate"),
        ],
    )
    def test_a_new_pod_does_not_wait_for_a_volume_that_the_old_one_holds(
        self, model: dict[str, Any], wanted: str
    ) -> None:
        assert charts.workload(charts.one_model(model))["spec"]["strategy"]["type"] == wanted
        predictor = charts.only(charts.one_model(model, kserve={"enabled": True}), "InferenceService")["spec"][
            "predictor"
        ]
        assert predictor.get("deploymentStrategy") == ({"type": "Recreate"} if wanted == "Recreate" else None)

    def test_a_strategy_of_the_user_wins(self) -> None:
        strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0}}
        values = charts.one_model({"pvcStorage": "9Gi"}, servingEngineSpec={"strategy": strategy})
        assert charts.workload(values)["spec"]["strategy"] == strategy


class TestDisruptionBudget:
    @pytest.mark.parametrize(
        ("model", "wanted"),
        [
            ({"replicaCount": 1}, None),
            ({"replicaCount": 2}, {"maxUnavailable": 1}),
            ({"replicaCount": 2, "pdb": {"enabled": False}}, None),
            ({"replicaCount": 1, "pdb": {"enabled": True}}, {"maxUnavailable": 1}),
            ({"replicaCount": 3, "pdb": {"minAvailable": "50%"}}, {"minAvailable": "50%"}),
            ({"replicaCount": 3, "pdb": {"minAvailable": 0}}, {"minAvailable": 0}),
            ({"autoscaling": {"enabled": True, "minReplicas": 2}}, {"maxUnavailable": 1}),
            ({"autoscaling": {"enabled": True, "minReplicas": 1}, "replicaCount": 4}, None),
            ({"keda": {"enabled": True, "minReplicaCount": 2}}, {"maxUnavailable": 1}),
            ({"keda": {"enabled": True}, "replicaCount": 4}, None),
            ({"replicaCount": 2, "pdb": {"maxUnavailable": 0}}, {"maxUnavailable": 0}),
        ],
    )
    def test_where_there_are_two_pods(self, model: dict[str, Any], wanted: dict[str, Any] | None) -> None:
        values = charts.one_model(model, steering=MANIFEST)
        found = charts.of_kind(charts.objects(values), "PodDisruptionBudget")
        if wanted is None:
            assert found == []
            return
        (item,) = found
        selector = item["spec"].pop("selector")
        assert item["spec"] == wanted
        assert selector == charts.workload(values)["spec"]["selector"]


class TestNetworkPolicy:
    def policy(self, **sections: Any) -> dict[str, Any]:
        model = {"modelURL": sections.pop("model", "/models/local")} | sections.pop("fields", {})
        policy = {"enabled": True} | sections.pop("networkPolicy", {})
        spec: dict[str, Any] = charts.only(charts.one_model(model, networkPolicy=policy, **sections), "NetworkPolicy")
        return spec["spec"]

    def test_only_names_are_looked_up_when_nothing_is_downloaded(self) -> None:
        (rule,) = self.policy()["egress"]
        assert {each["port"] for each in rule["ports"]} == {53}

    @pytest.mark.parametrize(
        "sections",
        [
            {"model": "acme/model"},
            {"steering": {"remote": ["s3"]}},
            {"fields": {"initContainer": {"name": "fetch", "image": "fetch:1"}}},
            {"servingEngineSpec": {"env": [{"name": "STORAGE_URI", "value": "hf://acme/model"}]}},
        ],
        ids=["model from the hub", "remote bundles", "container that runs first", "storage of KServe"],
    )
    def test_https_for_downloads(self, sections: dict[str, Any]) -> None:
        _, rule = self.policy(**sections)["egress"]
        assert rule["ports"] == [{"protocol": "TCP", "port": 443}]
        blocks = {each["ipBlock"]["cidr"]: each["ipBlock"]["except"] for each in rule["to"]}
        assert blocks["0.0.0.0/0"] == ["169.254.0.0/16"]

    def test_kserve_downloads_what_storage_uri_names(self) -> None:
        values = charts.read(charts.KSERVE_VALUES) | {"networkPolicy": {"enabled": True}}
        values["steering"]["remote"] = []
        values["steering"]["registry"] = MANIFEST["registry"]
        assert len(charts.only(values, "NetworkPolicy")["spec"]["egress"]) == 2

    def test_who_may_come_in(self) -> None:
        (rule,) = self.policy()["ingress"]
        assert rule["ports"] == [{"protocol": "TCP", "port": "container-port"}]
        assert {"podSelector": {}} in rule["from"]
        namespaces = [each["namespaceSelector"]["matchLabels"] for each in rule["from"] if "namespaceSelector" in each]
        assert namespaces == [{"kubernetes.io/metadata.name": "monitoring"}]

    def test_further_ports_are_open(self) -> None:
        ports = [
            {"name": "debug", "port": 9001, "targetPort": 9002, "protocol": "TCP"},
            {"name": "plain", "port": 9003},
        ]
        (rule,) = self.policy(servingEngineSpec={"extraPorts": ports})["ingress"]
        assert [each["port"] for each in rule["ports"]] == ["container-port", 9002, 9003]
        assert {each["protocol"] for each in rule["ports"]} == {"TCP"}

    def test_the_test_may_come_in_where_nobody_else_may(self) -> None:
        (rule,) = self.policy(networkPolicy={"from": [], "metricsFrom": []})["ingress"]
        (peer,) = rule["from"]
        (pod,) = charts.of_kind(charts.objects(charts.one_model()), "Pod")
        assert peer["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()

    def test_it_selects_the_pods(self) -> None:
        values = charts.one_model(networkPolicy={"enabled": True})
        labels = charts.workload(values)["spec"]["template"]["metadata"]["labels"]
        selector = charts.only(values, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
        assert selector.items() <= labels.items()

    def test_none_unless_asked_for(self) -> None:
        assert charts.of_kind(charts.objects(charts.one_model()), "NetworkPolicy") == []


class TestMonitoring:
    def test_the_monitor_finds_each_pod_once(self) -> None:
        values = charts.read(EVERYTHING)
        monitor = charts.only(values, "ServiceMonitor")
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        services = charts.of_kind(charts.objects(values), "Service")
        found = [each for each in services if wanted <= each["metadata"]["labels"].items()]
        assert [each["metadata"]["name"] for each in found] == [
            "demo-first-engine-service",
            "demo-second-engine-service",
        ]
        (endpoint,) = monitor["spec"]["endpoints"]
        for service in found:
            assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]

    def test_the_job_is_called_as_the_alerts_have_it(self) -> None:
        values = charts.read(ONE_GPU)
        label = charts.only(values, "ServiceMonitor")["spec"]["jobLabel"]
        job = charts.only(values, "Service")["metadata"]["labels"][label]
        assert f'job="{job}"' in (charts.DEPLOY / "prometheus" / "alerts.yaml").read_text()

    def alerts(self, *models: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Alerts of a release, by name."""
        values = charts.one_model(prometheusRule={"enabled": True}, steering=MANIFEST, test={"profile": ""})
        (common,) = values["servingEngineSpec"]["modelSpec"]
        values["servingEngineSpec"]["modelSpec"] = [
            {**common, "name": f"m{index}", **model} for index, model in enumerate(models)
        ]
        groups = charts.only(values, "PrometheusRule")["spec"]["groups"]
        return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}

    @pytest.mark.parametrize(
        ("models", "is_there"),
        [
            ([{}], True),
            ([], True),
            ([{"replicaCount": 0}], False),
            ([{"keda": {"enabled": True, "minReplicaCount": 0, "triggers": CRON}}], False),
            ([{"keda": {"enabled": True, "idleReplicaCount": 0, "triggers": CRON}}], False),
            ([{"keda": {"enabled": True}, "replicaCount": 0}], True),
            ([{"autoscaling": {"enabled": True}, "replicaCount": 0}], True),
            ([{"replicaCount": 0}, {}], True),
        ],
    )
    def test_no_server_is_an_alarm_unless_it_may_be_wanted(self, models: list[dict[str, Any]], is_there: bool) -> None:
        shipped = charts.read(charts.DEPLOY / "prometheus" / "alerts.yaml")["groups"]
        wanted = {rule["alert"]: rule for group in shipped for rule in group["rules"] if "alert" in rule}
        if not is_there:
            del wanted["ExpertsteerAbsent"]
        assert self.alerts(*models) == wanted

    def test_a_start_may_take_what_its_probe_allows(self) -> None:
        probe = charts.container(charts.one_model())["startupProbe"]
        allowed_s = probe["initialDelaySeconds"] + probe["failureThreshold"] * probe["periodSeconds"]
        bound = self.alerts({})["ExpertsteerStartStuck"]["for"]
        assert int(bound.removesuffix("m")) * 60 > allowed_s

    def test_services_lead_to_the_port(self) -> None:
        for path in (ONE_GPU, EVERYTHING):
            for service in charts.of_kind(charts.objects(charts.read(path)), "Service"):
                assert service["spec"]["ports"][0]["targetPort"] == "container-port"


class TestTest:
    def test_it_asks_the_service_with_the_key(self) -> None:
        values = charts.one_model(servingEngineSpec={"vllmApiKey": SECRET}, test={"profile": "calm"})
        (pod,) = charts.of_kind(charts.objects(values), "Pod")
        (container,) = pod["spec"]["containers"]
        environment = container["env"]
        service = charts.only(values, "Service")
        port = service["spec"]["ports"][0]["port"]
        assert named(environment, "SERVER")["value"] == f"http://{service['metadata']['name']}:{port}"
        assert named(environment, "PROFILE")["value"] == "calm"
        assert named(environment, "VLLM_API_KEY")["valueFrom"]["secretKeyRef"]["name"] == "keys"
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        (script,) = [
            each
            for each in charts.objects(values)
            if each["metadata"]["name"] == pod["metadata"]["name"] and each["kind"] == "ConfigMap"
        ]
        assert script["data"]["ask.py"] == (charts.CHART / "files" / "ask.py").read_text()

    def test_it_may_have_a_key_of_its_own(self) -> None:
        key = {"secretName": "role-keys", "secretKey": "tester"}
        for engine in ({}, {"vllmApiKey": SECRET}):
            values = charts.one_model(servingEngineSpec=engine, steering={"keys": SECRET}, test={"key": key})
            (pod,) = charts.of_kind(charts.objects(values), "Pod")
            reference = named(pod["spec"]["containers"][0]["env"], "VLLM_API_KEY")["valueFrom"]["secretKeyRef"]
            assert reference == {"name": "role-keys", "key": "tester"}

    def test_it_runs_on_the_nodes_of_the_model(self) -> None:
        (pod,) = charts.of_kind(charts.objects(charts.read(STACK)), "Pod")
        model = charts.pod(charts.read(STACK))
        assert pod["spec"]["affinity"] == model["affinity"]
        assert pod["spec"]["tolerations"] == model["tolerations"]
        assert {each["key"] for each in model["tolerations"]} == {"nvidia.com/gpu", "dedicated"}

    def test_pods_that_avoid_each_other_do_not_avoid_it(self) -> None:
        term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"model": "m"}}}
        apart = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
        values = charts.one_model({"affinity": apart})
        (pod,) = charts.of_kind(charts.objects(values), "Pod")
        assert charts.pod(values)["affinity"] == apart
        assert "affinity" not in pod["spec"]


class TestKserve:
    def test_one_inference_service_in_the_place_of_a_deployment(self) -> None:
        kinds = [each["kind"] for each in charts.objects(charts.read(charts.KSERVE_VALUES))]
        assert kinds.count("InferenceService") == 1
        assert not {"Deployment", "StatefulSet", "HorizontalPodAutoscaler", "ScaledObject"} & set(kinds)

    def test_its_pod_is_that_of_the_deployment(self) -> None:
        values = charts.read(charts.KSERVE_VALUES)
        predictor = charts.only(values, "InferenceService")["spec"]["predictor"]
        values["kserve"]["enabled"] = False
        plain = charts.pod(values)
        (container,) = predictor["containers"]
        assert container.pop("name") == "kserve-container"
        assert plain["containers"][0].pop("name") == "vllm"
        assert {key: predictor[key] for key in plain} == plain
        labels = charts.workload(values)["spec"]["template"]["metadata"]["labels"]
        assert predictor["labels"] == labels
