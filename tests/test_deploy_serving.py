"""The service's manifests fit the service, and its autoscaler is in time."""

import argparse
import pathlib
import runpy
import subprocess
import sys

import yaml

from serving.__main__ import add_flags

FOLDER = pathlib.Path(__file__).parent.parent / "deploy/serving"


def test_the_manifests_fit_the_service() -> None:
    by_kind = {document["kind"]: document for document in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())}
    pod = by_kind["Deployment"]["spec"]["template"]
    container = pod["spec"]["containers"][0]
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = parser.parse_args([*container["args"]])
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"http": flags.port, "probes": flags.probes_port}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert flags.tokens.parent == pathlib.Path(mounts["tokens"]) and mounts["cache"] in (FOLDER / "Containerfile").read_text()
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert probes == [{"path": path, "port": "probes"} for path in ("/readyz", "/readyz", "/healthz")]
    for kind in ("Service", "PodDisruptionBudget"):
        selector = by_kind[kind]["spec"]["selector"]
        assert selector.get("matchLabels", selector) == pod["metadata"]["labels"]
    assert by_kind["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == by_kind["Deployment"]["metadata"]["name"]


def test_the_autoscaler_is_in_time() -> None:
    done = subprocess.run([sys.executable, FOLDER / "simulate_scaling.py"], capture_output=True, text=True, check=True)
    assert "0.00% of requests found no core free" in done.stdout
    # With a start-up of minutes nothing could be: then it says so.
    late = subprocess.run([sys.executable, FOLDER / "simulate_scaling.py", "--startup", "120"], capture_output=True, text=True, check=False)
    assert late.returncode == 1 and "0.00%" not in late.stdout.splitlines()[-1]


def test_the_formula_is_the_autoscalers() -> None:
    module = runpy.run_path(str(FOLDER / "simulate_scaling.py"))
    spec = module["autoscaler"](FOLDER / "kubernetes.yaml")
    wanted, target = module["wanted"], spec["metrics"][0]["resource"]["target"]["averageUtilization"] / 100
    assert [wanted(spec, 4, 4, target * ratio) for ratio in (0.5, 1, 1.09, 1.11, 2, 100)] == [4, 4, 4, 5, 8, 12]
    assert wanted(spec, 4, 8, 2 * target) == 8  # Those that are asked for count as idle.
    assert wanted(spec, 18, 18, 2 * target) == spec["maxReplicas"]
