"""What deploy/ and docs/operations.md say of the server: options, alerts, version; and the keys that it is given."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from containers import ROOT, base_image
from cryptography import x509
from cutaway_server.config import Config
from cutaway_server.service.credentials import digest, read_credentials
from promql import DEPLOY, rules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPERATIONS = ROOT / "docs" / "operations.md"
WRITTEN = [
    path
    for path in [*DEPLOY.rglob("*"), OPERATIONS]
    if path.is_file() and path.suffix not in (".json", ".pyc") and "__pycache__" not in path.parts
]
# Read by others than the server: compose.yaml, cutaway-secure, the client, and where models are kept.
NOT_OPTIONS = {
    "CUTAWAY_PUBLISH", "CUTAWAY_MODELS", "CUTAWAY_STOP_GRACE", "CUTAWAY_NAMES", "CUTAWAY_SECRETS", "CUTAWAY_KEY_SCOPES",
    "CUTAWAY_ADDRESS", "CUTAWAY_API_KEY", "CUTAWAY_TLS_CA", "CUTAWAY_CACHE",
}  # fmt: skip
# Of docker, kubectl, tar, the client and `cutaway-server keys`.
OTHERS_OPTIONS = {
    "--address", "--cert", "--cpus", "--entrypoint", "--file", "--from-file", "--from-literal", "--help", "--key",
    "--profile", "--rm", "--runtime", "--scopes", "--tail", "--target", "--tenant", "--tls-ca", "--user", "--wait",
}  # fmt: skip


def test_every_alert_is_explained_to_operators() -> None:
    explained = re.findall(r"^### (Cutaway\w+)\n\n\*(Page|Ticket)\.\* \S", OPERATIONS.read_text(), re.MULTILINE)
    alerts = [(rule["alert"], rule["labels"]["severity"].capitalize()) for rule in rules() if "alert" in rule]
    assert explained == alerts


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_named_is_one(path: Path) -> None:
    settings = set(re.findall(r"\bCUTAWAY_[A-Z_]+\b", path.read_text())) - NOT_OPTIONS
    assert settings <= {f"CUTAWAY_{name.upper()}" for name in Config.model_fields}


def test_every_option_that_operators_are_told_of_is_one() -> None:
    text = OPERATIONS.read_text() + (DEPLOY / "prometheus/rules/alerts.yml").read_text()
    options = {f"--{name.replace('_', '-')}" for name in Config.model_fields}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - OTHERS_OPTIONS <= options


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_image_is_of_this_version(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r"cutaway:([0-9][\w.]*)", text)) <= {PROJECT["version"]}
    assert set(re.findall(r"newTag: ([0-9][\w.]*)", text)) <= {PROJECT["version"]}
    assert set(re.findall(r"^ARG VERSION=(.*)$", text, re.MULTILINE)) <= {PROJECT["version"]}


def test_the_image_has_the_oldest_python_that_is_tested() -> None:
    oldest = PROJECT["requires-python"].split(",")[0].removeprefix(">=")
    assert base_image().startswith(f"python:{oldest}.")


def test_prometheus_in_compose_is_prometheus_elsewhere_but_for_the_target() -> None:
    files = (DEPLOY / "prometheus" / f"{name}.yml" for name in ("prometheus", "compose"))
    alone, composed = (yaml.safe_load(file.read_text()) for file in files)
    assert composed["scrape_configs"][0].pop("static_configs") == [{"targets": ["server:9464"]}]
    assert alone["scrape_configs"][0].pop("static_configs") == [{"targets": ["localhost:9464"]}]
    assert composed == alone


def test_every_tool_that_deploy_is_checked_with_is_pinned() -> None:
    pins = [line.split("==")[0] for line in (DEPLOY / "constraints.txt").read_text().split()]
    assert set(PROJECT["optional-dependencies"]["deploy"]) <= {
        name.replace(".", "-").replace("_", "-") for name in pins
    }


@pytest.mark.deploy
@pytest.mark.parametrize("path", ["deploy/Dockerfile", "tests/docker/prometheus.Dockerfile"])
def test_hadolint_finds_nothing(path: str) -> None:
    done = subprocess.run(["hadolint", "--no-color", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.deploy
@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="no CUDA build of torch")
def test_constraints_suit_what_torchs_cuda_build_asks_for() -> None:
    """Where the CPU's build is at hand, pip takes that, and does not see that CUDA's wants a Triton of its own."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "-c", "constraints.txt"]
    published = f"torch==={pins['torch']}"  # three signs: not 2.13.0+cpu
    done = subprocess.run([*command, published, "triton"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def secure(directory: Path, **environment: str) -> str:
    """Run what makes keys and certificates, on this machine; what it said."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", DEPLOY / "image/secure.sh"],
        env={**os.environ, "PATH": path, "CUTAWAY_SECRETS": str(directory), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def certificate(directory: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / "secrets/tls.crt").read_bytes())


@pytest.mark.deploy
def test_secrets_are_made_once_and_certificates_anew_for_new_names(tmp_path: Path) -> None:
    assert "made an authority" in secure(tmp_path)
    key = (tmp_path / "client/api-key").read_text()
    [(known, caller)] = read_credentials(tmp_path / "secrets/api-keys.toml").keys
    assert known == digest(key)
    assert caller.name == "operator"
    assert {"admin", "edit"}.isdisjoint(caller.scopes)
    for file in ("authority/ca.key", "secrets/tls.key", "secrets/api-keys.toml", "client/api-key"):
        assert (tmp_path / file).stat().st_mode & 0o077 == 0
    assert secure(tmp_path) == ""

    first = certificate(tmp_path)
    secure(tmp_path, CUTAWAY_NAMES="*.example.test,192.0.2.7,2001:db8::7")
    names = certificate(tmp_path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"*.example.test", "localhost"} <= set(names.get_values_for_type(x509.DNSName))
    assert {"192.0.2.7", "2001:db8::7"} <= {str(ip) for ip in names.get_values_for_type(x509.IPAddress)}
    assert certificate(tmp_path).serial_number != first.serial_number
    assert (tmp_path / "client/api-key").read_text() == key


@pytest.mark.deploy
def test_a_certificate_that_others_have_signed_stays(tmp_path: Path) -> None:
    secure(tmp_path)
    files = tmp_path / "secrets"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-subj", "/CN=x",
         "-days", "5", "-keyout", files / "tls.key", "-out", files / "tls.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert secure(tmp_path, CUTAWAY_NAMES="other.example.test") == ""
    assert certificate(tmp_path).subject.rfc4514_string() == "CN=x"


@pytest.mark.deploy
def test_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="'a;b' is no host name and no address"):
        secure(tmp_path, CUTAWAY_NAMES="ok.example.test,a;b")
    assert not (tmp_path / "secrets/tls.crt").exists()


@pytest.mark.deploy
def test_kubernetes_secrets_are_what_the_pods_mount(tmp_path: Path) -> None:
    """The commands of docs/operations.md, against no cluster."""
    secure(tmp_path)
    text = OPERATIONS.read_text().replace("\\\n", "").replace("made/", f"{tmp_path}/")
    made = {}
    for line in re.findall(r"^    (kubectl .* create secret .*)$", text, re.MULTILINE):
        command = [*line.split("#")[0].split(), "--dry-run=client", "-o", "yaml"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        secret = yaml.safe_load(done.stdout)
        made[secret["metadata"]["name"]] = set(secret["data"])
    assert made == {
        "cutaway-tls": {"tls.crt", "tls.key"},
        "cutaway-api-keys": {"api-keys.toml"},
        "cutaway-hub-token": {"token"},
    }
    deployment = (DEPLOY / "kubernetes/base/deployment.yaml").read_text()
    assert all(f": {name}" in deployment for name in made)
