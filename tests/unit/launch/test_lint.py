"""Shell, YAML and the Dockerfile, read by linters: mistakes in files that no other test can run to the end."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).parents[3]
SHELL = sorted(
    path
    for pattern in ("launch/*.sh", "launch/*.sbatch", "scripts/*.sh", ".ci/run")
    for path in REPOSITORY.glob(pattern)
)


def tool(name):
    """A linter installed beside the running Python."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"{name} is not installed: pip install 'moetrain[dev]'")
    return str(path)


def check(*command):
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_parses_stops_at_errors_and_can_be_run(path):
    check("bash", "-n", str(path))
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert os.access(path, os.X_OK)


def test_shellcheck():
    check(tool("shellcheck"), *map(str, SHELL))


def test_yamllint():
    check(tool("yamllint"), "--strict", "launch", "configs")


def test_kubernetes_names_agree():
    service, job = yaml.safe_load_all((REPOSITORY / "launch/kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(environment["NNODES"])
    assert spec["completionMode"] == "Indexed"
    assert service["spec"]["clusterIP"] == "None"  # headless: a name per pod
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    host, port = environment["RDZV_ENDPOINT"].split(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert pod["terminationGracePeriodSeconds"] > int(environment["GRACE"])
    assert os.access(REPOSITORY / container["command"][0], os.X_OK)
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    known = re.findall(r"\$\{?([A-Z_]+)", (REPOSITORY / "launch/torchrun.sh").read_text())
    assert set(environment) <= set(known)


def dockerfile_instructions():
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "docker/Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [line.split(maxsplit=1) for line in lines if line.strip()]


def test_dockerfile_parses_and_its_sources_exist():
    instructions = dockerfile_instructions()
    names = [name for name, _ in instructions]
    assert set(names) <= {"ARG", "FROM", "RUN", "USER", "WORKDIR", "ENV", "COPY", "ENTRYPOINT"}
    assert names.index("FROM") <= 1
    for name, rest in instructions:
        if name == "COPY":
            *sources, _target = [word for word in rest.split() if not word.startswith("--")]
            missing = [source for source in sources if not list(REPOSITORY.glob(source))]
            assert not missing, f"COPY of what is not there: {missing}"
        if name == "RUN":
            check("bash", "-n", "-c", rest)


def test_dockerfile_runs_the_launcher_without_root():
    instructions = dockerfile_instructions()
    users = [rest for name, rest in instructions if name == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    (entry,) = [yaml.safe_load(rest) for name, rest in instructions if name == "ENTRYPOINT"]
    assert os.access(REPOSITORY / entry[0], os.X_OK)
