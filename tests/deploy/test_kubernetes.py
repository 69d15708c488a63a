"""The Kubernetes manifests: made by kustomize, valid by schema, of one mind with what they run.

What the nodes will read is read here: each pod's environment and settings file go through the
node's own settings.
"""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from fluxion_core.config.settings import load_settings
from services.cli.health import DECODE_SERVICE, PREFILL_SERVICE
from services.decode.config import DecodeSettings
from services.prefill.config import PrefillNodeSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = ("cpu", "gpu")
KUBERNETES_VERSIONS = ("1.27", "1.37")
"""The first with stable gRPC probes, and the newest with a schema here."""
SETTINGS = {"prefill": PrefillNodeSettings, "decode": DecodeSettings}
READY_SERVICE = {"prefill": PREFILL_SERVICE, "decode": DECODE_SERVICE}
WEIGHT_BYTES = {
    "smollm2-135m": 134_515_008 * 4,  # float32 on a CPU
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248 * 2,  # bfloat16
}
PROCESS_BYTES = {"cpu": 14 * (1 << 30) // 10, "gpu": 4 << 30}
"""Interpreter, torch and, on a GPU, CUDA's context, beside weights and KV."""

_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "namespace": {}, "labels": _LABELS},
    "additionalProperties": False,
}
# The fields used here, as the Prometheus operator's API reference has them, which publishes no
# schema as a package; closed, so that a field used anew is looked up first.
CUSTOM_SCHEMAS = {
    "ServiceMonitor": {
        "type": "object",
        "required": ["selector", "endpoints"],
        "properties": {
            "selector": {
                "type": "object",
                "properties": {"matchLabels": _LABELS},
                "additionalProperties": False,
            },
            "endpoints": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["port"],
                    "properties": {
                        "port": {"type": "string"},
                        "interval": {"pattern": r"^\d+(ms|s|m|h)$"},
                        "relabelings": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "properties": {
                                    "sourceLabels": {"type": "array", "items": {"type": "string"}},
                                    "targetLabel": {"type": "string"},
                                },
                                "additionalProperties": False,
                            },
                        },
                    },
                    "additionalProperties": False,
                },
            },
        },
        "additionalProperties": False,
    },
    "PrometheusRule": {
        "type": "object",
        "required": ["groups"],
        "properties": {
            "groups": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name", "rules"],
                    "properties": {
                        "name": {"type": "string", "minLength": 1},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["expr"],
                                "oneOf": [{"required": ["record"]}, {"required": ["alert"]}],
                                "properties": {
                                    "record": {"type": "string"},
                                    "alert": {"type": "string"},
                                    "expr": {"type": "string"},
                                    "for": {"pattern": r"^\d+(ms|s|m|h)$"},
                                    "labels": _LABELS,
                                    "annotations": _LABELS,
                                },
                                "additionalProperties": False,
                            },
                        },
                    },
                    "additionalProperties": False,
                },
            }
        },
        "additionalProperties": False,
    },
}


WORKLOADS = {"prefill": "Deployment", "decode": "StatefulSet"}


class Manifests:
    """One overlay's objects."""

    def __init__(self, overlay: str) -> None:
        self.overlay = overlay
        made = subprocess.run(
            [KUBECTL, "kustomize", DEPLOY / "kubernetes" / "overlays" / overlay],
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr
        self.objects = list(yaml.safe_load_all(made.stdout))

    def of_kind(self, kind: str) -> list[dict]:
        return [one for one in self.objects if one["kind"] == kind]

    def named(self, kind: str, name: str) -> dict:
        return next(one for one in self.of_kind(kind) if one["metadata"]["name"] == name)

    def pods(self) -> dict[str, dict]:
        """Pod templates by component."""
        templates = [
            one["spec"]["template"] for kind in WORKLOADS.values() for one in self.of_kind(kind)
        ]
        label = "app.kubernetes.io/component"
        return {one["metadata"]["labels"][label]: one for one in templates}

    def node(self, component: str) -> dict:
        (container,) = self.pods()[component]["spec"]["containers"]
        return container

    def environment(self, container: dict) -> dict[str, str]:
        """What the container's process sees."""
        found = {}
        for source in container.get("envFrom", []):
            found |= self.named("ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in container.get("env", []):
            if "value" in variable:
                found[variable["name"]] = variable["value"]
            elif "resourceFieldRef" in variable["valueFrom"]:
                section, field = variable["valueFrom"]["resourceFieldRef"]["resource"].split(".")
                found[variable["name"]] = container["resources"][section][field]
        return found


@functools.cache
def manifests_of(overlay: str) -> Manifests:
    return Manifests(overlay)


@pytest.fixture(params=OVERLAYS)
def manifests(request):
    return manifests_of(request.param)


@pytest.fixture(params=WORKLOADS)
def component(request):
    return request.param


@pytest.fixture
def settings(manifests, component, tmp_path, monkeypatch):
    """What the node reads from its environment and its file in the pod."""
    container = manifests.node(component)
    volumes = {one["name"]: one for one in manifests.pods()[component]["spec"]["volumes"]}
    environment = manifests.environment(container)
    (mount,) = [
        one
        for one in container["volumeMounts"]
        if Path(environment["FLUXION_CONFIG"]).is_relative_to(one["mountPath"])
    ]
    data = manifests.named("ConfigMap", volumes[mount["name"]]["configMap"]["name"])["data"]
    for name, text in data.items():
        (tmp_path / name).write_text(text)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / Path(environment["FLUXION_CONFIG"]).relative_to(mount["mountPath"])
    monkeypatch.setenv("FLUXION_CONFIG", str(file))
    return load_settings(SETTINGS[component], [], program=component)


def validate(thing: dict, version: str) -> None:
    """Against Kubernetes' schema, where no field is allowed that it does not know."""
    if thing["kind"] in CUSTOM_SCHEMAS:
        assert thing["apiVersion"] == "monitoring.coreos.com/v1"
        jsonschema.validate(thing["metadata"], _METADATA)
        jsonschema.validate(thing["spec"], CUSTOM_SCHEMAS[thing["kind"]])
        assert set(thing) == {"apiVersion", "kind", "metadata", "spec"}
    else:
        kubernetes_validate.validate(thing, version, strict=True)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def gibibytes(quantity: str) -> int:
    """Bytes of a Kubernetes quantity in Gi."""
    return int(quantity.removesuffix("Gi")) << 30


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_object_is_valid(manifests, version):
    kinds = {one["kind"] for one in manifests.objects}
    assert kinds >= {
        *("Namespace", "ConfigMap", "Service", "Deployment", "StatefulSet", "NetworkPolicy"),
        *("PodDisruptionBudget", "ServiceMonitor", "PrometheusRule"),
    }
    for one in manifests.objects:
        validate(one, version)


def test_a_field_that_does_not_exist_is_noticed(manifests):
    for kind in ("StatefulSet", "ServiceMonitor", "PrometheusRule"):
        thing = copy.deepcopy(manifests.of_kind(kind)[0])
        thing["spec"]["replica"] = 2
        with pytest.raises(jsonschema.ValidationError):
            validate(thing, KUBERNETES_VERSIONS[-1])


def test_everything_but_the_namespace_is_in_one_namespace(manifests):
    (namespace,) = manifests.of_kind("Namespace")
    others = [one for one in manifests.objects if one is not namespace]
    assert {one["metadata"]["namespace"] for one in others} == {namespace["metadata"]["name"]}


def test_ports_are_those_of_the_settings(manifests, component, settings):
    container = manifests.node(component)
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    server = settings.server
    listens = {
        "grpc": server.listen,
        "health": server.health_listen,
        "metrics": server.metrics_listen,
    }
    if component == "prefill":
        listens["kv"] = settings.handoff.listen
    assert ports == {name: port_of(address) for name, address in listens.items()}
    assert all(address.startswith("0.0.0.0:") for address in listens.values())
    exposed = re.search(r"EXPOSE (.*)", dockerfile(component))[1].split()
    # Only pods have a port for probes alone.
    assert {str(port) for name, port in ports.items() if name != "health"} == set(exposed)


def test_probes_ask_what_the_node_answers(manifests, component, settings):
    container = manifests.node(component)
    health = port_of(settings.server.health_listen)
    assert container["startupProbe"]["grpc"] == {"port": health}
    assert container["livenessProbe"]["grpc"] == {"port": health}
    ready = {"port": health, "service": READY_SERVICE[component]}
    assert container["readinessProbe"]["grpc"] == ready


def test_services_reach_pods_and_their_ports(manifests):
    pods = manifests.pods()
    for service in manifests.of_kind("Service"):
        selected = [
            one
            for one in pods.values()
            if selects(service["spec"]["selector"], one["metadata"]["labels"])
        ]
        (pod,) = selected
        (container,) = pod["spec"]["containers"]
        names = {one["name"]: one["containerPort"] for one in container["ports"]}
        for port in service["spec"]["ports"]:
            assert names[port["targetPort"]] == port["port"]


@pytest.mark.parametrize("component", ["decode"], indirect=True)
def test_the_decode_node_finds_every_prefill_node(manifests, component, settings):
    (address,) = settings.prefill.addresses
    service = manifests.named("Service", address.rpartition(":")[0])
    assert service["spec"]["clusterIP"] == "None", "one address would stand for all of them"
    assert service["spec"]["selector"]["app.kubernetes.io/component"] == "prefill"
    assert port_of(address) in [one["port"] for one in service["spec"]["ports"]]


def test_the_set_of_decode_nodes_has_a_headless_service(manifests):
    (nodes,) = manifests.of_kind("StatefulSet")
    service = manifests.named("Service", nodes["spec"]["serviceName"])
    assert service["spec"]["clusterIP"] == "None"
    assert nodes["spec"]["updateStrategy"]["type"] == "RollingUpdate"


def test_selectors_match_their_own_pods_only(manifests):
    for component, kind in WORKLOADS.items():
        workload = manifests.named(kind, component)
        policies = manifests.named("NetworkPolicy", component)["spec"]["podSelector"]
        budget = manifests.named("PodDisruptionBudget", component)["spec"]["selector"]
        for selector in (workload["spec"]["selector"], policies, budget):
            chosen = {
                name
                for name, pod in manifests.pods().items()
                if selects(selector["matchLabels"], pod["metadata"]["labels"])
            }
            assert chosen == {component}


def test_budgets_let_a_node_go_and_never_all(manifests):
    assert manifests.named("PodDisruptionBudget", "decode")["spec"]["maxUnavailable"] == 1
    budget = manifests.named("PodDisruptionBudget", "prefill")["spec"]
    replicas = manifests.named("Deployment", "prefill")["spec"]["replicas"]
    assert 1 <= budget["minAvailable"] < replicas


def test_policies_name_ports_that_pods_have(manifests):
    for component in WORKLOADS:
        policy = manifests.named("NetworkPolicy", component)["spec"]
        names = {one["name"] for one in manifests.node(component)["ports"]}
        allowed = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
        assert allowed == names - {"health"}
    (to_prefill,) = [
        rule
        for rule in manifests.named("NetworkPolicy", "decode")["spec"]["egress"]
        if "to" in rule
    ]
    (peer,) = to_prefill["to"]
    prefill = manifests.pods()["prefill"]["metadata"]["labels"]
    assert selects(peer["podSelector"]["matchLabels"], prefill)
    ports = {one["name"]: one["containerPort"] for one in manifests.node("prefill")["ports"]}
    assert to_prefill["ports"] == [{"port": ports["grpc"]}, {"port": ports["kv"]}]


def test_each_pod_is_scraped_once(manifests):
    (monitor,) = manifests.of_kind("ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    scraped = [
        service["spec"]["selector"]["app.kubernetes.io/component"]
        for service in manifests.of_kind("Service")
        if selects(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
        and endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    ]
    assert sorted(scraped) == sorted(WORKLOADS)
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert endpoint["interval"] == scrape


def test_rules_are_those_of_the_composed_prometheus(manifests):
    (rule,) = manifests.of_kind("PrometheusRule")
    assert rule["spec"] == yaml.safe_load((DEPLOY / "rules" / "fluxion.yml").read_text())


def test_settings_files_are_those_of_the_composed_nodes(manifests, component):
    (volume,) = [
        one for one in manifests.pods()[component]["spec"]["volumes"] if one["name"] == "config"
    ]
    data = manifests.named("ConfigMap", volume["configMap"]["name"])["data"]
    assert data == {"node.toml": (DEPLOY / "config" / f"{component}.toml").read_text()}


def test_pods_outlive_their_drain(manifests, component, settings):
    pod = manifests.pods()[component]["spec"]
    command, seconds = manifests.node(component)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    drain = int(seconds) + settings.server.grace_seconds
    # Ten seconds to end, and half a second for each GiB that is to be unpinned.
    margin = 10 + (settings.store.host_kv_bytes >> 31 if component == "decode" else 0)
    assert pod["terminationGracePeriodSeconds"] >= drain + margin


def test_memory_holds_kv_weights_and_process(manifests, component, settings):
    resources = manifests.node(component)["resources"]
    needed = WEIGHT_BYTES[settings.model.model] + PROCESS_BYTES[manifests.overlay]
    if component == "decode":
        needed += settings.store.host_kv_bytes
    else:
        # With a GPU: what was computed and not taken.
        needed += settings.engine.running_kv_bytes
    for volume in manifests.pods()[component]["spec"]["volumes"]:
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            needed += gibibytes(volume["emptyDir"]["sizeLimit"])
    assert gibibytes(resources["requests"]["memory"]) >= needed
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_arithmetic_in_the_comments_adds_up(manifests, component):
    comment = " ".join(
        line.removeprefix("#").strip()
        for line in (DEPLOY / "kubernetes" / "overlays" / manifests.overlay / f"{component}.yaml")
        .read_text()
        .splitlines()
        if line.startswith("#")
    )
    terms, total = re.search(r"Memory[^:]*: (.*?) = ([\d.]+) GiB", comment).groups()
    assert sum(map(float, re.findall(r"([\d.]+) GiB", terms))) == float(total)
    memory = manifests.node(component)["resources"]["requests"]["memory"]
    assert gibibytes(memory) >> 30 == -(-float(total) // 1)


def test_threads_are_no_more_than_the_cpus(manifests, component, settings):
    cpus = int(manifests.node(component)["resources"]["limits"]["cpu"])
    assert settings.model.threads == cpus
    if component == "decode":
        # With CPUs of its own, a node sees how many they are.
        assert settings.engine.attention_threads == (cpus if manifests.overlay == "cpu" else None)


def test_gpu_pods_get_cpus_memory_and_gpu_of_one_numa_node():
    # The kubelet's static policies look at pods whose requests equal their limits, in whole CPUs.
    for pod in manifests_of("gpu").pods().values():
        for container in pod["spec"]["initContainers"] + pod["spec"]["containers"]:
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            assert resources["requests"]["cpu"].isdigit()
        (node,) = pod["spec"]["containers"]
        assert node["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_decode_nodes_without_cpus_of_their_own_do_not_share_a_machine():
    pod = manifests_of("cpu").pods()["decode"]
    rules = pod["spec"]["affinity"]["podAntiAffinity"]
    (term,) = rules["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert selects(term["labelSelector"]["matchLabels"], pod["metadata"]["labels"])


def test_containers_may_do_no_more_than_they_need(manifests, component):
    pod = manifests.pods()[component]["spec"]
    (uid,) = re.findall(r"useradd --system --uid (\d+)", dockerfile(component))
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == int(uid)
    assert pod["automountServiceAccountToken"] is False
    # A service called fluxion would otherwise look like settings.
    assert pod["enableServiceLinks"] is False
    # Process 1 would not hear SIGTERM while Python imports.
    assert pod["shareProcessNamespace"] is True
    for container in pod["initContainers"] + pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_what_is_written_has_a_place(manifests, component, settings):
    pod = manifests.pods()[component]["spec"]
    (pull,), (node,) = pod["initContainers"], pod["containers"]
    writable = {one["mountPath"] for one in pull["volumeMounts"] if not one.get("readOnly", False)}
    assert writable == {str(settings.model.models_dir), "/tmp"}
    cache = Path(re.search(r"TRITON_CACHE_DIR=(\S+)", dockerfile(component))[1])
    own = [one["mountPath"] for one in node["volumeMounts"] if not one.get("readOnly", False)]
    assert any(cache.is_relative_to(path) for path in own)
    mounted = {one["name"] for container in (pull, node) for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in pod["volumes"]}


def test_images_and_commands_are_what_the_dockerfiles_build(manifests, component):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pod = manifests.pods()[component]["spec"]
    (pull,), (node,) = pod["initContainers"], pod["containers"]
    tag = project["version"] + ("-gpu" if manifests.overlay == "gpu" else "")
    assert pull["image"] == node["image"] == f"fluxion-{component}:{tag}"
    assert "command" not in node
    assert "args" not in node
    assert f'ENTRYPOINT ["python", "-m", "services.{component}"]' in dockerfile(component)
    assert pull["command"][0] in project["scripts"]
    model = manifests.environment(node)["FLUXION_MODEL__MODEL"]
    assert manifests.environment(pull)["FLUXION_MODEL__MODEL"] == model
    assert pull["command"][1:3] == ["pull", "$(FLUXION_MODEL__MODEL)"]


def test_dashboards_are_those_of_the_composed_grafana(manifests):
    (dashboards,) = [
        one
        for one in manifests.of_kind("ConfigMap")
        if one["metadata"].get("labels", {}).get("grafana_dashboard") == "1"
    ]
    files = {path.name: path.read_text() for path in (DEPLOY / "grafana/dashboards").glob("*.json")}
    assert dashboards["data"] == files


def dockerfile(component: str) -> str:
    return (DEPLOY / f"{component}.Dockerfile").read_text()
