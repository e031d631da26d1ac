"""Values that make no sense are refused with a sentence that says what to do."""

import copy
from typing import Any

import charts
import helm_python
import pytest

DIGEST = "sha256:" + "1" * 64
HUB = {"schema": 1, "profiles": {"calm": {"source": f"hf://acme/v@{'0' * 40}/a.safetensors", "digest": DIGEST}}}


def with_bundles(**fields: Any) -> dict[str, Any]:
    """The section `steering` that declares one profile, with other fields of it."""
    declared = copy.deepcopy(HUB)
    declared["profiles"]["calm"] |= fields  # type: ignore[index]
    return {"remote": ["hf"], "registry": {"mode": "manifest", "bundles": declared}}


MANIFEST = {"registry": {"mode": "manifest", "bundles": {"schema": 1, "profiles": {}}}}


def scaled(section: str, **fields: Any) -> dict[str, Any]:
    """Values of a model with an autoscaler."""
    return charts.one_model({section: {"enabled": True, **fields}}, steering=MANIFEST)


def two_models(first: str, second: str, **sections: Any) -> dict[str, Any]:
    """Values of two models with these names."""
    values = charts.one_model(**sections)
    models = values["servingEngineSpec"]["modelSpec"]
    values["servingEngineSpec"]["modelSpec"] = [{**models[0], "name": name} for name in (first, second)]
    return values


NO_TARGETS = {"waitingRequests": 0, "steeredRequests": 0, "cachePercent": 0}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("misspelt field", charts.one_model({"requestGpu": 1}), "'requestGpu' not allowed"),
    ("misspelt section", charts.one_model(steer={}), "'steer' not allowed"),
    ("misspelt steering field", charts.one_model(steering={"row": 1}), "'row' not allowed"),
    ("name that is no label", charts.one_model({"name": "Bad_Name"}), "'Bad_Name' does not match"),
    ("no image", charts.one_model({"repository": ""}), "minLength"),
    ("unknown mode", charts.one_model(steering={"registry": {"mode": "nfs"}}), "'none', 'pvc', 'manifest'"),
    ("router", charts.one_model(routerSpec={"enableRouter": True}), "the chart has no router: set"),
    ("router by default", charts.one_model(routerSpec={"routingLogic": "session"}), "the chart has no router: set"),
    ("LMCache", charts.one_model({"lmcacheConfig": {"enabled": True}}), "hashes KV blocks without the steering"),
    ("cache server", charts.one_model(cacheserverSpec={"enabled": True}), "hashes KV blocks without the steering"),
    ("Ray", charts.one_model({"raySpec": {"headNode": {}}}), "a model runs in one pod"),
    ("V0", charts.one_model({"vllmConfig": {"v0": "1"}}), "V1 engine only"),
    ("pooling", charts.one_model({"vllmConfig": {"runner": "pooling"}}), "leave runner out"),
    ("shared volume", charts.one_model(sharedPvcStorage={"enabled": True}), "use pvcStorage"),
    ("LoRA controller", charts.one_model(loraAdapters=[{"name": "a"}]), "leave loraAdapters out"),
    ("other embedded model", charts.one_model({"modelURL": "embedded://mine"}), "embedded://lab"),
    ("model that is a flag", charts.one_model({"modelURL": "--trust-remote-code"}), "does not match pattern"),
    ("mode that YAML reads as false", charts.one_model(steering={"signatures": {"mode": False}}), "got boolean"),
    ("template without content", charts.one_model({"chatTemplate": "a"}), "'chatTemplateConfigMap' required"),
    ("privileged port", charts.one_model(servingEngineSpec={"containerPort": 80}), "minimum"),
    ("short digest", charts.one_model(steering=with_bundles(digest="sha256:12")), "does not match pattern"),
    ("unknown field of a profile", charts.one_model(steering=with_bundles(strenght=1)), "'strenght' not allowed"),
    ("unknown source", charts.one_model(steering=with_bundles(source="http://a/b")), "does not match pattern"),
    (
        "no schema",
        charts.one_model(steering={"registry": {"mode": "manifest", "bundles": {"profiles": {}}}}),
        "missing property 'schema'",
    ),
    (
        "too few GPUs",
        charts.one_model({"requestGPU": 1, "vllmConfig": {"tensorParallelSize": 4, "dataParallelSize": 2}}),
        "is 8 and requestGPU 1; request 8",
    ),
    (
        "nothing declared",
        charts.one_model(steering={"registry": {"mode": "manifest"}}),
        "nothing is declared; give steering.registry.bundles",
    ),
    (
        "declared for nobody",
        charts.one_model(steering={"registry": {"mode": "none", "bundles": HUB}, "remote": ["hf"]}),
        "its mode is none; set it to manifest or pvc",
    ),
    (
        "source that is not enabled",
        charts.one_model(steering={"registry": {"mode": "manifest", "bundles": HUB}}),
        "steering.remote is []; add hf",
    ),
    ("root without a folder", charts.one_model(steering=with_bundles(source="root:a")), "bundleRoot is empty"),
    (
        "no source in an empty registry",
        charts.one_model(
            steering={
                "registry": {"mode": "manifest", "bundles": {"schema": 1, "profiles": {"calm": {"digest": DIGEST}}}}
            }
        ),
        '"calm" has no source',
    ),
    (
        "two sources of the declaration",
        charts.one_model(
            steering={"registry": {"mode": "manifest", "bundles": HUB, "bundlesConfigMap": "a"}, "remote": ["hf"]}
        ),
        "both given",
    ),
    ("signatures without a key", charts.one_model(steering={"signatures": {"mode": "warn"}}), "no key to check with"),
    (
        "two autoscalers",
        charts.one_model({"autoscaling": {"enabled": True}, "keda": {"enabled": True}}),
        "two autoscalers would fight",
    ),
    (
        "pods with empty registries",
        charts.one_model({"autoscaling": {"enabled": True}}, steering={"registry": {"mode": "pvc"}}),
        "whose registry is empty",
    ),
    ("pods without a registry", charts.one_model({"keda": {"enabled": True}}), "whose registry is empty"),
    ("no pod that could wake others", scaled("keda", minReplicaCount=0), "keda.minReplicaCount is 0"),
    ("no pod while idle", scaled("keda", idleReplicaCount=0), "leave it out, or give keda.triggers"),
    (
        "as many pods while idle",
        scaled("keda", idleReplicaCount=1),
        "KEDA takes fewer idle pods only; leave idleReplicaCount out",
    ),
    (
        "no idle pods and no least pods",
        scaled("keda", minReplicaCount=0, idleReplicaCount=0, triggers=[{"type": "cron", "metadata": {}}]),
        "keda.idleReplicaCount is 0 and minReplicaCount 0",
    ),
    (
        "fewest over most",
        scaled("autoscaling", minReplicas=5),
        "autoscaling.minReplicas is 5 and maxReplicas 4; raise maxReplicas",
    ),
    (
        "KEDA's fewest over most",
        scaled("keda", minReplicaCount=3, maxReplicaCount=2),
        "keda.minReplicaCount is 3 and maxReplicaCount 2",
    ),
    ("no metric", scaled("autoscaling", targets=NO_TARGETS), "all targets of autoscaling are 0; give one"),
    ("no trigger", scaled("keda", targets=NO_TARGETS), "give one, or keda.triggers"),
    (
        "pods on several nodes and a volume on one",
        charts.one_model({"pvcStorage": "9Gi", "replicaCount": 2}),
        "pvcAccessMode [ReadWriteOnce] ties it to one node",
    ),
    (
        "autoscaler and a volume on one node",
        charts.one_model(
            {"pvcStorage": "9Gi", "pvcAccessMode": ["ReadWriteOncePod"], "keda": {"enabled": True}}, steering=MANIFEST
        ),
        "use ReadWriteMany, one replica",
    ),
    ("one name twice", two_models("m", "m"), "2 models have this name"),
    (
        "one profile for two models",
        two_models("m", "n", test={"profile": "calm"}),
        'test.profile is "calm" and there are 2 models',
    ),
    (
        "a Deployment's strategy",
        charts.one_model(servingEngineSpec={"strategy": {"type": "Recreate"}}, steering={"registry": {"mode": "pvc"}}),
        "leave strategy out",
    ),
    (
        "KServe without volumes",
        charts.one_model(kserve={"enabled": True}, steering={"registry": {"mode": "pvc"}}),
        "KServe makes no volume",
    ),
    (
        "KServe and a second autoscaler",
        charts.one_model({"autoscaling": {"enabled": True}}, steering=MANIFEST, kserve={"enabled": True}),
        "use keda, which KServe passes on",
    ),
    (
        "key in the arguments",
        charts.one_model({"vllmConfig": {"extraArgs": ["--api-key", "x"]}}),
        "readable in the pod",
    ),
    ("key after =", charts.one_model({"vllmConfig": {"extraArgs": ["--api-key=x"]}}), "readable in the pod"),
    (
        "TLS that probes do not speak",
        charts.one_model({"vllmConfig": {"extraArgs": ["--ssl_certfile=/tls/tls.crt", "--ssl-keyfile=/tls/tls.key"]}}),
        "which speak HTTP; end TLS in front of it (ingress, mesh)",
    ),
    ("port twice", charts.one_model({"vllmConfig": {"extraArgs": ["--port", "1"]}}), "--port in extraArgs is set"),
    (
        "parallelism that the chart does not see",
        charts.one_model({"vllmConfig": {"extraArgs": ["-tp", "4"]}}),
        "-tp in extraArgs is set",
    ),
    (
        "underscores",
        charts.one_model({"vllmConfig": {"extraArgs": ["--data_parallel_size=4"]}}),
        "--data-parallel-size in extraArgs is set",
    ),
    ("registry twice", charts.one_model(steering={"extraArgs": ["--steering-registry=/x"]}), "is set by the chart"),
]


@pytest.mark.parametrize(("values", "sentence"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_refusals_say_why(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(helm_python.HelmError) as caught:
        charts.objects(values)
    assert sentence in str(caught.value)


def test_names_that_would_not_fit_are_refused() -> None:
    values = charts.one_model({"name": "m" * 40})
    with pytest.raises(helm_python.HelmError, match="has 51 characters, and the names made from it have room for 47"):
        charts.chart().render(values, name="release-10", namespace=charts.NAMESPACE)


@pytest.mark.parametrize(
    "flag",
    ["lmcacheConfig", "raySpec", "lwsSpec"],
)
def test_what_is_switched_off_may_stay_in_the_file(flag: str) -> None:
    assert charts.workload(charts.one_model({flag: {"enabled": False, "other": 1}}))
