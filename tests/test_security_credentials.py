"""The file of credentials, the keys in it, and the options that must stand together."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cutaway_server.config import Config, ConfigError, read_config
from cutaway_server.exposure import check_exposure, is_loopback
from cutaway_server.service.caller import Scope
from cutaway_server.service.credentials import CredentialsError, CredentialStore, new_key, read_credentials
from cutaway_server.service.keys import keys as keys_command
from secured import write_keys

HASH = "0" * 64
FINE = f'[[key]]\nname = "ci"\nsha256 = "{HASH}"\nscopes = ["generate"]\ntenant = "t"\n'


def test_a_key_is_found_with_its_name_scopes_tenant_and_limit_and_a_changed_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    keys = write_keys(
        file,
        {"web": (["generate", "observe"], "shop"), "ci": (["admin"], "build")},
        '[[tenant]]\nname = "shop"\nmax_calls = 7\nshare = 2.5\n'
        '[[certificate]]\nname = "batch"\nscopes = ["generate"]\ntenant = "shop"\npriority = -3\n',
    )
    known = read_credentials(file)
    web = known.of_key(keys["web"])
    assert web is not None
    assert (web.name, web.tenant, web.max_calls) == ("web", "shop", 7)
    assert web.scopes == {Scope.GENERATE, Scope.OBSERVE}
    ci = known.of_key(keys["ci"])
    assert ci is not None
    assert (ci.name, ci.max_calls) == ("ci", None)
    batch = known.of_names(["batch"])
    assert batch is not None
    assert [(c.share, c.priority) for c in (web, ci, batch)] == [(2.5, 0), (1.0, 0), (2.5, -3)]
    last = "A" if keys["web"][-1] != "A" else "B"
    for wrong in (keys["web"][:-1] + last, keys["web"] + "A", keys["web"].upper(), "", "é", new_key()):
        assert known.of_key(wrong) is None


def test_what_does_not_look_generated_is_no_key_even_if_its_hash_is_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(FINE.replace(HASH, hashlib.sha256(b"hunter2").hexdigest()))
    assert read_credentials(file).of_key("hunter2") is None


def test_a_certificate_is_found_by_one_of_its_names_and_not_if_its_names_are_two_entries(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    entry = '[[certificate]]\nname = "{}"\nscopes = ["generate"]\ntenant = "t"\n'
    file.write_text(entry.format("a.test") + entry.format("spiffe://b/c"))
    known = read_credentials(file)
    found = known.of_names(["other.test", "a.test", "a.test"])
    assert found is not None
    assert (found.name, found.proof) == ("a.test", "certificate")
    assert known.of_names(["other.test"]) is None
    assert known.of_names(["A.test"]) is None
    assert known.of_names(["a.test", "spiffe://b/c"]) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (FINE.replace('"generate"', '"everything"'), "key.1.scopes.1: Input should be 'generate'"),
        (FINE.replace('["generate"]', "[]"), "key.1.scopes: List should have at least 1"),
        (FINE.replace('tenant = "t"\n', ""), "key.1.tenant: Field required"),
        (FINE.replace('"t"', '"a/b"'), "key.1.tenant: String should match"),
        (FINE.replace('"t"', r'"t\n"'), "key.1.tenant: String should match"),
        (FINE.replace(HASH, "deadbeef"), "key.1.sha256: String should match"),
        (FINE + 'admin = true\n', "key.1.admin: Extra inputs"),
        (FINE + FINE, "two key entries have one name: ci"),
        (FINE + FINE.replace("ci", "cd"), "two key entries have one sha256"),
        ("[[keys]]\n", "keys: Extra inputs"),
        ('[[tenant]]\nname = "t"\nmax_calls = 0\n', "tenant.1.max_calls: Input should be greater"),
        ('[[tenant]]\nname = "t"\nshare = 0\n', "tenant.1.share: Input should be greater"),
        (FINE + 'priority = 101\n', "key.1.priority: Input should be less"),
        ("key = ", "is not TOML"),
        ("\xff", "is not TOML"),
        (None, "cannot be read: No such file"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_line_that_shows_no_hash(tmp_path: Path, text: str | None, told: str) -> None:
    file = tmp_path / "keys.toml"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(CredentialsError) as raised:
        read_credentials(file)
    message = str(raised.value)
    assert told in message
    assert "\n" not in message
    assert HASH not in message
    assert "deadbeef" not in message


def test_a_file_that_anybody_may_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(FINE)
    file.chmod(0o666)
    with pytest.raises(CredentialsError, match="written by anybody"):
        read_credentials(file)


def test_a_reload_that_fails_keeps_what_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.toml"
    keys = write_keys(file, {"ci": (["generate"], "t")})
    store = CredentialStore(str(file))
    file.write_text("[[key]]\n")
    store.reload()
    assert store.current.of_key(keys["ci"]) is not None
    assert "stay as they were" in caplog.text


def make(*arguments: str) -> Result:
    return CliRunner().invoke(keys_command, ["new", *arguments])


def test_a_new_key_and_its_entry_fit_together(tmp_path: Path) -> None:
    result = make("web", "--scopes", "generate, observe")
    key, entry = result.stdout.split("\n\n", 1)
    file = tmp_path / "keys.toml"
    file.write_text(entry)
    caller = read_credentials(file).of_key(key)
    assert caller is not None
    assert (caller.name, caller.tenant, caller.scopes) == ("web", "web", {Scope.GENERATE, Scope.OBSERVE})


def test_new_keys_are_added_to_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    made = [make(name, "--scopes", "generate", "--tenant", "t", "--file", str(file)) for name in ("one", "two")]
    lines = [result.stdout.splitlines() for result in made]
    assert [len(each) for each in lines] == [1, 1]
    known = read_credentials(file)
    assert [known.of_key(each[0]).name for each in lines] == ["one", "two"]  # type: ignore[union-attr]
    assert file.stat().st_mode & 0o777 == 0o600
    assert all(each[0] not in file.read_text() for each in lines)
    again = make("one", "--scopes", "generate", "--file", str(file))
    assert (again.exit_code, "already" in again.output) == (1, True)
    assert len(tomllib.loads(file.read_text())["key"]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("a", "--scopes", "root"), "'root' is no scope; there are generate, introspect"),
        (("a b", "--scopes", "edit"), "NAME: 'a b' must be"),
        (("a\n", "--scopes", "edit"), "NAME: 'a\\n' must be"),
        (("a", "--scopes", "edit", "--tenant", "x/y"), "--tenant: 'x/y' must be"),
        (("a",), "Missing option '--scopes'"),
    ],
)
def test_wrong_keys_are_not_made(arguments: tuple[str, ...], told: str) -> None:
    result = make(*arguments)
    assert result.exit_code == 2
    assert told in result.output


def test_the_servers_command_makes_keys() -> None:
    command = [sys.executable, "-m", "cutaway_server", "keys", "new", "web", "--scopes", "generate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert (done.returncode, done.stdout.startswith("cutaway_"), done.stderr) == (0, True, "")


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.0.0.1", False),
        ("127.0.0.1.example.com", False),
        ("myhost", False),
    ],
)
def test_only_this_machines_own_addresses_are_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


TLS = {"tls_cert": "c", "tls_key": "k"}
OUT = {"listen": "0.0.0.0:50051"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"listen": "[::1]:1"},
        {"api_keys": "f"},
        TLS,
        {**OUT, **TLS, "api_keys": "f"},
        {**OUT, **TLS, "api_keys": "f", "tls_client_ca": "ca"},
        {**OUT, "insecure_listen": True},
        {"health_listen": "0.0.0.0:8081"},
    ],
)
def test_these_options_may_listen(options: dict[str, object]) -> None:
    check_exposure(Config(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (OUT, "--listen: '0.0.0.0:50051' .*: give --tls-cert and --tls-key and --api-keys, or --insecure-listen"),
        ({"listen": "example.com:1"}, "give --tls-cert"),
        ({**OUT, **TLS}, "other machines: give --api-keys, or --insecure-listen"),
        ({**OUT, "api_keys": "f"}, "other machines: give --tls-cert and --tls-key, or --insecure-listen"),
        ({"tls_cert": "c"}, "--tls-cert and --tls-key: one needs the other"),
        ({"tls_key": "k"}, "one needs the other"),
        ({"tls_client_ca": "ca", "api_keys": "f"}, "--tls-client-ca: needs --tls-cert"),
        ({**TLS, "tls_client_ca": "ca"}, "--tls-client-ca: needs --api-keys"),
        ({"max_connection_age_grace": 1}, "does nothing without --max-connection-age"),
    ],
)
def test_these_options_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_exposure(Config(**options))  # type: ignore[arg-type]


def test_the_program_refuses_to_stand_open_before_it_loads_a_model() -> None:
    command = [sys.executable, "-m", "cutaway_server", "--model", "/nowhere", "--listen", "0.0.0.0:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cutaway-server: --listen: '0.0.0.0:0' can be reached from other machines")
    assert done.stderr.count("\n") == 1


def test_the_clients_variables_are_none_of_the_servers_business() -> None:
    read_config([], {f"CUTAWAY_{name}": "x" for name in ("API_KEY", "TLS", "TLS_CA", "CERT", "CERT_KEY")})
