"""deploy/kubernetes as kubectl renders it: valid by published schemas, and of one mind with the server's options."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cutaway_server.config import read_config
from cutaway_server.exposure import check_exposure
from cutaway_server.service.metrics import CATALOG
from promql import DEPLOY

pytestmark = pytest.mark.deploy

KUBERNETES = DEPLOY / "kubernetes"
OLDEST, NEWEST = "1.30", "1.37"
COMPONENTS = ["cpu", "hpa", "keda", "prometheus", "grafana"]
FREE = {"matchLabels", "metadata", "labels", "annotations"}  # may have any keys
Resource = dict[str, Any]


def render(directory: Path) -> list[Resource]:
    done = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # deprecated fields
    return list(yaml.safe_load_all(done.stdout))


def with_component(name: str, tmp_path: Path) -> list[Resource]:
    """The base with one component, put together as an operator would."""
    where = DEPLOY / "grafana" if name == "grafana" else KUBERNETES / "components" / name
    for link, target in (("base", KUBERNETES / "base"), ("component", where)):
        (tmp_path / link).symlink_to(target)
    together = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["base"],
        "components": ["component"],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(together))
    return render(tmp_path)


def one(resources: list[Resource], kind: str, name: str = "cutaway") -> Resource:
    [found] = [r for r in resources if r["kind"] == kind and r["metadata"]["name"].startswith(name)]
    return found


def custom() -> dict[str, Any]:
    """Models made from the published definitions of the resources that Kubernetes itself does not know."""
    from cloudcoil.models.keda import v1alpha1 as keda
    from cloudcoil.models.prometheus_operator import v1 as operator

    return {
        "ScaledObject": keda.ScaledObject,
        "PodMonitor": operator.PodMonitor,
        "PrometheusRule": operator.PrometheusRule,
    }


def check(resource: Resource, version: str = NEWEST) -> None:
    """Refuse what the API server would, and fields it would drop."""
    from kubernetes_validate import validate

    if model := custom().get(resource["kind"]):
        kept = model.model_validate(resource).model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert kept == resource, f"{resource['kind']} has fields that there are not"
    else:
        validate(resource, version, strict=True)


def within(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every mapping inside."""
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from within(inner, (*path, index))
    elif isinstance(value, dict):
        yield path
        for key, inner in value.items():
            yield from within(inner, (*path, key))


@pytest.fixture(scope="module")
def base() -> list[Resource]:
    return render(KUBERNETES / "base")


@pytest.fixture(scope="module")
def scaled() -> list[Resource]:
    return render(KUBERNETES / "examples" / "scaled")


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_base_is_valid(base: list[Resource], version: str) -> None:
    for resource in base:
        check(resource, version)


@pytest.mark.parametrize("name", COMPONENTS)
def test_each_component_goes_with_the_base(name: str, tmp_path: Path) -> None:
    for resource in with_component(name, tmp_path):
        check(resource)


def test_the_example_is_valid_and_all_in_its_namespace(scaled: list[Resource]) -> None:
    for resource in scaled:
        check(resource)
        assert resource["kind"] == "Namespace" or resource["metadata"]["namespace"] == "cutaway"
    assert {r["kind"] for r in scaled} >= {"ScaledObject", "PodMonitor", "PrometheusRule", "NetworkPolicy"}


@pytest.mark.parametrize("kind", ["Deployment", "NetworkPolicy", "ScaledObject", "PodMonitor", "PrometheusRule"])
def test_a_misspelled_field_is_found(scaled: list[Resource], kind: str) -> None:
    """So that valid means something: a stray field in spec, and in something deep inside."""
    resource = one(scaled, kind)
    maps = [path for path in within(resource["spec"]) if not FREE & set(path)]
    for path in (min(maps, key=len), max(maps, key=len)):
        wrong = copy.deepcopy(resource)
        inner = wrong["spec"]
        for step in path:
            inner = inner[step]
        inner["strayField"] = "x"
        with pytest.raises(Exception, match=r"stray|that there are not"):
            check(wrong)


@pytest.fixture(scope="module")
def pod(base: list[Resource]) -> Resource:
    spec: Resource = one(base, "Deployment")["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: Resource) -> Resource:
    [only] = pod["containers"]
    return dict(only)


@pytest.fixture(scope="module")
def options(base: list[Resource]) -> Any:
    """What the server makes of the config map: checked as at its start."""
    config = read_config([], one(base, "ConfigMap")["data"])
    check_exposure(config)
    return config


def test_ports_and_probes_are_where_the_server_listens(container: Resource, options: Any) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for name, address in (
        ("grpc", options.listen),
        ("health", options.health_listen),
        ("metrics", options.metrics_listen),
    ):
        assert address == f"0.0.0.0:{ports[name]}"
    assert container["startupProbe"]["grpc"]["port"] == ports["health"]
    assert container["readinessProbe"]["grpc"]["port"] == ports["health"]
    assert container["livenessProbe"]["httpGet"]["port"] == "metrics"


def test_files_that_options_name_are_mounted(pod: Resource, container: Resource, options: Any) -> None:
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    for file in (options.tls_cert, options.tls_key, options.api_keys):
        [mount] = [m for m in mounts.values() if file.startswith(m["mountPath"] + "/")]
        assert mount["readOnly"]
    assert mounts["models"]["mountPath"] == "/models"


def test_a_slow_start_is_waited_for(base: list[Resource], container: Resource) -> None:
    startup = container["startupProbe"]
    granted = startup["periodSeconds"] * startup["failureThreshold"]
    assert granted >= 16e9 / 10e6  # 16 GB at 10 MB/s
    assert one(base, "Deployment")["spec"]["progressDeadlineSeconds"] > granted


def test_a_pod_that_goes_may_drain(pod: Resource, container: Resource, options: Any) -> None:
    unlisted = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= unlisted + options.drain_timeout + 10
    assert options.max_connection_age is not None
    assert options.max_connection_age_grace is None  # calls may end


def test_nothing_is_privileged_and_everything_writable_is_a_volume(pod: Resource, container: Resource) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}


def test_every_selector_finds_the_pods_and_only_ours_have_our_label(scaled: list[Resource]) -> None:
    template = one(scaled, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors: list[tuple[str, Callable[[Resource], Any]]] = [
        ("Deployment", lambda spec: spec["selector"]["matchLabels"]),
        ("NetworkPolicy", lambda spec: spec["podSelector"]["matchLabels"]),
        ("PodDisruptionBudget", lambda spec: spec["selector"]["matchLabels"]),
        ("PodMonitor", lambda spec: spec["selector"]["matchLabels"]),
        ("Service", lambda spec: spec["selector"]),
    ]
    for kind, selector in selectors:
        for resource in scaled:
            if resource["kind"] == kind:
                wanted = selector(resource["spec"])
                assert wanted == {"app.kubernetes.io/name": "cutaway"}
                assert wanted.items() <= template.items()
    policy = one(scaled, "NetworkPolicy")["spec"]
    [names, _] = policy["egress"]
    assert names["to"][0]["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}


def test_what_is_scraped_is_the_job_that_dashboards_and_alerts_ask_for(scaled: list[Resource]) -> None:
    monitor = one(scaled, "PodMonitor")["spec"]
    labels = one(scaled, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels[monitor["jobLabel"]] == "cutaway"


def test_the_operator_gets_the_same_rules(scaled: list[Resource]) -> None:
    files = sorted((DEPLOY / "prometheus/rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    assert one(scaled, "PrometheusRule")["spec"]["groups"] == groups, "make dashboards"


@pytest.mark.parametrize(("name", "kind"), [("keda", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler")])
def test_what_scales_has_a_volume_for_all_and_no_number_of_its_own(name: str, kind: str, tmp_path: Path) -> None:
    together = with_component(name, tmp_path)
    assert "replicas" not in one(together, "Deployment")["spec"]
    assert one(together, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
    asked = set(re.findall(r"cutaway_\w+", str(one(together, kind)["spec"])))
    assert asked == {"cutaway_requests_waiting", "cutaway_requests_running"}
    assert asked <= {spec.name for specs in CATALOG.values() for spec in specs}


def test_without_a_gpu_the_server_computes_on_the_cores_it_asks_for(tmp_path: Path) -> None:
    together = with_component("cpu", tmp_path)
    spec = one(together, "Deployment")["spec"]["template"]["spec"]
    requested = spec["containers"][0]["resources"]["requests"]
    assert "nvidia.com/gpu" not in requested
    assert one(together, "ConfigMap")["data"]["CUTAWAY_THREADS"] == requested["cpu"]
    assert spec["containers"][0]["image"].endswith("-cpu")
