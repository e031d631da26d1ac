"""The Helm chart, rendered by Helm itself and read as Kubernetes objects."""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import helm_python
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "expertsteer"
VALUE_SETS = sorted((CHART / "ci").glob("*-values.yaml"))
KSERVE_VALUES = DEPLOY / "kserve" / "values.yaml"
RELEASE, NAMESPACE = "demo", "steering"
# Objects of the release, and of `helm test`; not text for people.
_TEXT = "NOTES.txt"


class UniqueLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own loader keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Mapping of a node whose keys all differ."""
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


@functools.cache
def chart() -> helm_python.Chart:
    """The chart as it is on disk."""
    return helm_python.Chart.load(CHART)


def read(path: Path) -> Any:
    """The one document of a YAML file."""
    return yaml.load(path.read_text(), UniqueLoader)


def one_model(model: Mapping[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """Values for one small model, changed by fields of the model and by whole sections."""
    values: dict[str, Any] = read(CHART / "ci" / "cpu-demo-values.yaml")
    values["servingEngineSpec"]["modelSpec"][0] |= {"name": "m", "modelURL": "acme/model"} | dict(model or {})
    engine = sections.pop("servingEngineSpec", {})
    values["servingEngineSpec"] |= engine
    return values | sections


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """What Helm makes of each template, by its name."""
    chart().validate_schema(copy.deepcopy(dict(values)))
    rendered = chart().render(copy.deepcopy(dict(values)), name=RELEASE, namespace=NAMESPACE)
    return {name.partition("templates/")[2]: text for name, text in rendered.items()}


def notes(values: Mapping[str, Any]) -> str:
    """What Helm tells the user."""
    return texts(values)[_TEXT]


def objects(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every object of the release and of its test."""
    return [each for name, text in texts(values).items() if name != _TEXT for each in documents(text)]


def documents(text: str) -> Iterator[dict[str, Any]]:
    """Objects of a stream of YAML documents."""
    yield from (each for each in yaml.load_all(text, UniqueLoader) if each is not None)


def of_kind(all_objects: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Objects of one kind."""
    return [each for each in all_objects if each["kind"] == kind]


def only(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The one object of a kind that is not the test's."""
    (found,) = [each for each in of_kind(objects(values), kind) if not each["metadata"]["name"].endswith("-test")]
    return found


def workload(values: Mapping[str, Any]) -> dict[str, Any]:
    """The one Deployment or StatefulSet."""
    (found,) = [each for each in objects(values) if each["kind"] in ("Deployment", "StatefulSet")]
    return found


def pod(values: Mapping[str, Any]) -> dict[str, Any]:
    """Specification of its pods."""
    spec: dict[str, Any] = workload(values)["spec"]["template"]["spec"]
    return spec


def container(values: Mapping[str, Any]) -> dict[str, Any]:
    """Its container."""
    (found,) = pod(values)["containers"]
    assert isinstance(found, dict)
    return found
