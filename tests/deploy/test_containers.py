"""docker-compose.yml and the Dockerfiles: of one mind with the settings, and with each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from fluxion_core.config.setting_types import parse_auto_bytes, parse_bytes

ROOT = Path(__file__).parents[2]
NODES = ("prefill", "decode", "prefill-gpu", "decode-gpu")


@pytest.fixture(scope="module")
def services() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def settings_of(service: dict) -> dict:
    """The file that a node is given."""
    (mounted,) = [one for one in service["volumes"] if one.startswith("./deploy/config/")]
    source, target, _ = mounted.split(":")
    assert service["environment"]["FLUXION_CONFIG"] == target
    return tomllib.loads((ROOT / source).read_text())


def test_both_images_are_built_alike():
    prefill, decode = (
        (ROOT / "deploy" / f"{node}.Dockerfile").read_text() for node in ("prefill", "decode")
    )
    # A prefill node listens for KV too.
    assert prefill.replace("prefill", "decode").replace("EXPOSE 7070 7072", "EXPOSE 7070") == decode


@pytest.mark.parametrize("node", NODES)
def test_containers_outlive_their_drain(services, node):
    server = settings_of(services[node])["server"]
    stop_seconds = int(services[node]["stop_grace_period"].removesuffix("s"))
    assert stop_seconds >= server["grace_seconds"] + 10


@pytest.mark.parametrize("node", NODES)
def test_ports_and_places_are_those_of_the_settings(services, node):
    settings = settings_of(services[node])
    port = settings["server"]["listen"].rpartition(":")[2]
    published = [one.rpartition(":")[2] for one in services[node].get("ports", [])]
    assert published == ([port] if node.startswith("decode") else [])
    volume = f"models:{settings['model']['models_dir']}:ro"
    assert volume in services[node]["volumes"]
    dockerfile = (ROOT / services[node]["build"]["dockerfile"]).read_text()
    assert f'"health", "127.0.0.1:{port}"' in dockerfile
    for address in settings.get("prefill", {}).get("addresses", []):
        name = address.rpartition(":")[0]
        assert name in services
        assert services[f"{name}-gpu"]["networks"]["default"]["aliases"] == [name]


def test_prometheus_finds_the_nodes_where_they_export(services):
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    for job in scraped:
        (found,) = job["dns_sd_configs"]
        (name,) = found["names"]
        server = settings_of(services[name])["server"]
        assert server["metrics_listen"].rpartition(":")[2] == str(found["port"])
    assert {job["job_name"] for job in scraped} == {"prefill", "decode"}


def test_the_gpu_profile_pins_what_it_holds(services):
    for node in ("prefill-gpu", "decode-gpu"):
        assert services[node]["ulimits"]["memlock"] == -1
        (device,) = services[node]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert services[node]["build"]["args"]["EXTRAS"] == "cuda,hub"
        assert "TORCH_INDEX" not in services[node]["build"]["args"]
    size = services["decode-gpu"]["environment"]["FLUXION_STORE__HOST_KV_BYTES"]
    assert parse_bytes(re.fullmatch(r"\$\{\w+:-(\w+)\}", size)[1]) == 64 << 30
    of_gpu = services["decode-gpu"]["environment"]["FLUXION_STORE__DEVICE_KV_BYTES"]
    assert parse_auto_bytes(re.fullmatch(r"\$\{\w+:-(\w+)\}", of_gpu)[1]) is None


def test_a_model_is_there_before_its_nodes(services):
    for node in NODES:
        (fetcher,) = services[node]["depends_on"]
        assert (
            services[node]["depends_on"][fetcher]["condition"] == "service_completed_successfully"
        )
        assert services[fetcher]["profiles"] == services[node]["profiles"]
        model = services[node]["environment"]["FLUXION_MODEL__MODEL"]
        assert services[fetcher]["entrypoint"][:3] == ["fluxion", "pull", model]


def test_every_port_is_published_on_this_machine_alone(services):
    published = {name: one["ports"] for name, one in services.items() if "ports" in one}
    assert set(published) == {"decode", "decode-gpu", "prometheus", "grafana"}
    for ports in published.values():
        assert [one.startswith("127.0.0.1:${") for one in ports] == [True]


def test_containers_are_hardened_as_the_pods_are(services):
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["pids_limit"] >= 1024, name
        assert service["init"], name
        assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service), name
        # What is written elsewhere than in a volume.
        assert any(one.startswith("/tmp:") for one in service["tmpfs"]), name
    for kind in ("prefill", "decode"):
        (pod,) = [
            one["spec"]["template"]["spec"]
            for one in yaml.safe_load_all(
                (ROOT / "deploy" / "kubernetes" / "base" / f"{kind}.yaml").read_text()
            )
            if one["kind"] in ("Deployment", "StatefulSet")
        ]
        user = str(pod["securityContext"]["runAsUser"])
        assert f"--uid {user} " in (ROOT / "deploy" / f"{kind}.Dockerfile").read_text()
        for name in (kind, f"{kind}-gpu", "models", "models-gpu"):
            assert services[name]["user"] == user


def test_triton_may_load_what_it_builds_in_scratch_memory(services):
    for name in NODES:
        (scratch,) = services[name]["tmpfs"]
        assert ("exec" in scratch.partition(":")[2].split(",")) == name.endswith("-gpu")


@pytest.mark.parametrize(("password", "status"), [("", 1), ("long enough", 0)])
def test_grafana_starts_with_a_password_only(services, tmp_path, password: str, status: int):
    grafana = services["grafana"]
    assert "GF_AUTH_ANONYMOUS_ENABLED" not in grafana["environment"]
    # No `:?`: compose would want it of those who start no Grafana.
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "${FLUXION_GRAFANA_PASSWORD-}"
    shell, flag, script = grafana["entrypoint"]
    script = script.replace("$$", "$").replace("/run.sh", "true")
    ended = subprocess.run(
        [shell, flag, script],
        env={"GF_SECURITY_ADMIN_PASSWORD": password, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == status
    assert ("set FLUXION_GRAFANA_PASSWORD" in ended.stdout) == (status == 1)


def test_grafana_shows_the_composed_prometheus(services):
    deploy = ROOT / "deploy" / "grafana"
    provisioned = deploy / "provisioning"
    datasources = yaml.safe_load((provisioned / "datasources" / "prometheus.yml").read_text())
    (source,) = datasources["datasources"]
    port = services["prometheus"]["ports"][0].rpartition(":")[2]
    assert source["url"] == f"http://prometheus:{port}"
    providers = yaml.safe_load((provisioned / "dashboards" / "fluxion.yml").read_text())
    (provider,) = providers["providers"]
    path = provider["options"]["path"]
    assert f"./deploy/grafana/dashboards:{path}:ro" in services["grafana"]["volumes"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (deploy / "dashboards" / Path(home).relative_to(path)).is_file()
    for dashboard in (deploy / "dashboards").glob("*.json"):
        panels = json.loads(dashboard.read_text())["panels"]
        assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
