"""What the client shows, to whom, and what it refuses to send."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from certificates import Authority
from click.testing import CliRunner, Result
from cutaway import AsyncClient, Client, Unauthenticated
from cutaway.channel import is_loopback
from cutaway.cli import main
from secured import write_keys
from serving import serving
from tiny import save_tiny

KEY = "cutaway_" + "k" * 43


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server with TLS that asks for a certificate and a key, and the files a client of it has."""
    directory = tmp_path_factory.mktemp("secured")
    save_tiny("llama", directory / "tiny")
    authority = Authority(directory)
    server, client = authority.sign("server"), authority.sign("client", "me")
    keys = write_keys(directory / "keys.toml", {"me": (["generate"], "t")})
    files = {"tls_cert": server.cert, "tls_key": server.key, "tls_client_ca": authority.file}
    with serving(directory / "tiny", api_keys=str(directory / "keys.toml"), **files) as live:
        yield SimpleNamespace(address=live.address, key=keys["me"], ca=authority.file, cert=client)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.0.0.1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/tmp/socket", True),
        ("127.0.0.1.example.com:1", False),
        ("127.example.com:1", False),
        ("localhost.example.com:1", False),
        ("localhost:1@example.com", False),
        ("localhost/example.com:1", False),
        ("dns:///localhost:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("10.0.0.1:1", False),
        ("[2001:db8::1]:1", False),
        ("", False),
    ],
)
def test_what_is_not_plainly_this_machine_is_the_network(address: str, local: bool) -> None:
    assert is_loopback(address) is local


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_is_not_sent_over_the_network_in_plain_text(kind: Any) -> None:
    for tls in (None, False):
        with pytest.raises(ValueError, match=r"api_key: would go to example\.com:1 in plain text") as raised:
            kind("example.com:1", api_key=KEY, tls=tls)
        assert KEY not in str(raised.value)
    kind("example.com:1", api_key=KEY, tls=True)
    kind("127.0.0.1:1", api_key=KEY)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_wrong_arguments_are_named_and_the_key_is_not(kind: Any, tmp_path: Path) -> None:
    for key in ("", "with blank", KEY + "\n", "é"):
        with pytest.raises(ValueError, match=r"^api_key: must be of printable ASCII characters without blanks$"):
            kind(api_key=key)
    with pytest.raises(ValueError, match="cert: a certificate is shown over TLS only"):
        kind(tls=False, cert=("a", "b"))
    with pytest.raises(FileNotFoundError):
        kind(tls=str(tmp_path / "none.pem"))


async def test_both_clients_prove_themselves_to_a_server_that_asks_for_everything(secured: SimpleNamespace) -> None:
    with Client(secured.address, api_key=secured.key, tls=secured.ca, cert=secured.cert.both()) as client:
        answer = client.complete("Hi", max_tokens=4, temperature=0, ignore_eos=True)
        assert client.health().name == "SERVING"
        assert client.model().architecture.n_layers == 3
    async with AsyncClient(secured.address, api_key=secured.key, tls=secured.ca, cert=secured.cert.both()) as client:
        same = await client.complete("Hi", max_tokens=4, temperature=0, ignore_eos=True)
        assert (await client.tokenize("Hi")).ids
    assert same.token_ids == answer.token_ids
    async with AsyncClient(secured.address, tls=secured.ca, cert=secured.cert.both()) as client:
        with pytest.raises(Unauthenticated):
            await client.model()


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(main, arguments)


def test_the_command_line_takes_options_before_and_behind_the_commands_name_and_variables(
    secured: SimpleNamespace,
) -> None:
    cert, key = secured.cert.both()
    options = ["--address", secured.address, "--tls-ca", secured.ca, "--cert", cert, "--cert-key", key]
    asked = ["--max-tokens", "3", "--temperature", "0", "--ignore-eos"]
    results = [
        run(*options, "--api-key", secured.key, "generate", "Hi", *asked),
        run("generate", "Hi", *asked, *options, "--api-key", secured.key),
        run("--api-key", "wrong", "generate", "Hi", *asked, *options, CUTAWAY_API_KEY=secured.key),
        run(
            "generate",
            "Hi",
            *asked,
            CUTAWAY_ADDRESS=secured.address,
            CUTAWAY_API_KEY=secured.key,
            CUTAWAY_TLS_CA=secured.ca,
            CUTAWAY_CERT=cert,
            CUTAWAY_CERT_KEY=key,
        ),
    ]
    assert [result.exit_code for result in results] == [0, 0, 1, 0]
    assert results[0].stdout == results[1].stdout == results[3].stdout
    assert results[2].stderr.startswith("Error: authorization: not 'Bearer' and an API key that this server knows")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (
            ["--address", "example.com:1", "--api-key", KEY],
            1,
            "Error: api_key: would go to example.com:1 in plain text",
        ),
        (["--cert", "c"], 2, "--cert and --cert-key: one needs the other"),
        (["--tls-ca", "/none", "--no-tls"], 2, "--tls-ca: does nothing with --no-tls"),
        (["--tls-ca", "/none"], 1, "Error: '/none' cannot be read: No such file or directory"),
    ],
)
def test_the_command_line_refuses_in_one_line(arguments: list[str], code: int, told: str) -> None:
    result = run("model", *arguments)
    assert result.exit_code == code
    assert told in result.stderr
    assert KEY not in result.output


def test_help_shows_no_key_that_stands_in_the_environment() -> None:
    for arguments in (["--help"], ["generate", "--help"]):
        assert KEY not in run(*arguments, CUTAWAY_API_KEY=KEY).output


def test_the_client_package_alone_needs_nothing_new() -> None:
    code = "import sys, cutaway, cutaway.client, cutaway.aio\n"
    code += "assert not {'torch', 'pydantic', 'cryptography', 'cutaway_server'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
