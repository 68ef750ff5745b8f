"""Every option of the server: read once from command line, environment and file, checked, and frozen.

The command line goes before the environment (`CUTAWAY_MAX_RUNNING`), that before the TOML file (`max-running = 64`),
that before the defaults. Names that no option has are refused. `Config` is plain data: no room reads it but at start.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import click
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

ENVIRONMENT = "CUTAWAY_"
# Not options: the client's, the model cache's, and what Kubernetes sets beside a service named "cutaway".
OTHERS = re.compile(
    r"CUTAWAY_(ADDRESS|API_KEY|TLS|TLS_CA|CERT|CERT_KEY|CACHE|CONFIG)|CUTAWAY_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT(_\d+_\w+)?)"
)
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]\s/]+):(?P<port>\d{1,5})")


class ConfigError(Exception):
    """An option is wrong. The message is one line and names the option, the value and the rule."""


def _to_bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b|)\s*", value.lower())
    if found is None:
        raise ValueError("must be a number of bytes, such as 2147483648, 2GiB or 512MB")
    return int(float(found[1]) * UNITS[found[2]])


def _check_listen(value: object) -> object:
    found = ADDRESS.fullmatch(str(value))
    if found is None or int(found["port"]) > 65535:
        raise ValueError("must be HOST:PORT with a port from 0 to 65535, such as 127.0.0.1:50051 or [::1]:0")
    return value


def _check_optional_listen(value: object) -> object:
    return None if value in ("", "none") else value if value is None else _check_listen(value)


def _check_page_size(size: int) -> int:
    if not 16 <= size <= 256 or size & (size - 1):
        raise ValueError("must be a power of two from 16 to 256")
    return size


Bytes = Annotated[int, BeforeValidator(_to_bytes)]
Count = Annotated[int, Field(ge=1, le=2**20)]
Context = Annotated[int, Field(ge=1, le=2**27)]
# Buffers are allocated at full size at start; those of more than this no machine would fill.
Rows = Annotated[int, Field(ge=1, le=65_536)]
Slots = Annotated[int, Field(ge=1, le=4096)]
Threads = Annotated[int, Field(ge=1, le=1024)]
FileName = Annotated[str, Field(min_length=1)]
LONGEST_AGE = 2_000_000  # seconds; gRPC counts milliseconds in 32 bits


class Config(BaseModel):
    """What the server is asked to be. Sizes in bytes take units: 512MB, 2GiB."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    model: str = Field("smollm2", min_length=1, description="What to serve: smollm2, gemma3-270m, a path or a hub id.")
    served_name: str | None = Field(
        None, min_length=1, description="Name told to clients. Default: --model; of a path, its last part."
    )
    listen: Annotated[str, BeforeValidator(_check_listen)] = Field(
        "127.0.0.1:50051", description="HOST:PORT to serve on; port 0 picks one."
    )
    insecure_listen: bool = Field(
        False, description="Let --listen be reached from other machines without TLS or without API keys."
    )
    tls_cert: FileName | None = Field(None, description="File of the certificate chain, PEM; read again on change.")
    tls_key: FileName | None = Field(None, description="File of the certificate's private key, PEM.")
    tls_client_ca: FileName | None = Field(
        None, description="File of the authority, PEM, that has signed the certificates clients must show."
    )
    api_keys: FileName | None = Field(
        None, description="File of API keys (hashed) and certificate names, and what each may do; reread on SIGHUP."
    )
    health_listen: Annotated[str | None, BeforeValidator(_check_optional_listen)] = Field(
        None, description="HOST:PORT that serves grpc.health.v1 alone, in plain text, for probes."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What to compute in; auto: bfloat16 where the machine has it."
    )
    quantize: Literal["none", "int8", "int4", "as-is"] = Field(
        "none", description="Round weights to 8 or 4 bits, or serve a GGUF file's quantised ones as they are."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to compute; auto: cuda if there is one.")
    kernels: Literal["auto", "reference", "cpu", "cuda"] = Field(
        "auto",
        description="Which operations compute; auto: cuda's on a GPU where Triton is found, the native ones on a CPU "
        "where a C compiler is found.",
    )
    batch_invariant: bool = Field(
        False, description="On a GPU too, no number may depend on who else is in the batch; slower."
    )
    threads: Threads | None = Field(None, description="CPU threads that compute. Default: the cores allowed.")
    kv_cache_memory: Annotated[Bytes, Field(ge=1)] | None = Field(
        None, description="Bytes of KV cache. Default: from --memory-utilization."
    )
    memory_utilization: float = Field(
        0.6, gt=0, le=1, description="Share of the memory free after loading that the KV cache may take, in (0, 1]."
    )
    max_context: Context | None = Field(
        None, description="Tokens of prompt and completion together. Default: the model's."
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"] = Field(
        "auto", description="What the KV cache holds; auto: what --dtype is. int8 and fp8 are rounded, with scales."
    )
    page_size: Annotated[int, AfterValidator(_check_page_size)] = Field(
        16, description="Tokens in a page of the KV cache: a power of two from 16 to 256."
    )
    max_batch_tokens: Rows = Field(512, description="Tokens computed in one step, at most.")
    max_stretch: float = Field(
        1.8,
        gt=1,
        le=1000,
        description="How many times as long a prompt may make the steps of completions that run beside it.",
    )
    max_running: Slots = Field(64, description="Completions computed at the same time, at most.")
    max_queued: Count = Field(1024, description="Requests that may wait; more are refused.")
    prefix_caching: bool = Field(True, description="Share pages between prompts that begin alike.")
    retain_bytes: Annotated[Bytes, Field(ge=0)] = Field(
        64 * 2**20,
        description="Bytes of KV cache in which each tenant's finished requests stay, to be read, forked and replayed, "
        "while nobody needs the room; 0 keeps none.",
    )
    retain_seconds: float = Field(300.0, ge=0, le=86400, description="Seconds that each of them stays, at most.")
    inspect_text: bool = Field(
        False, description="Tell those who observe their own requests the tokens and texts of these, too."
    )
    drain_timeout: float = Field(
        30.0, ge=0, le=86400, description="Seconds that running requests may go on after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged, on stderr.")
    log_format: Literal["text", "json"] = Field("text", description="How; json: an object a line, with request ids.")
    log_prompts: bool = Field(False, description="Also log what is asked: the text of every prompt.")
    audit_log: FileName | None = Field(
        None, description="File to append a line of JSON to for every call: who did what, and never its text."
    )
    max_message_bytes: Annotated[Bytes, Field(ge=1024, le=2**30)] = Field(
        4 * 2**20, description="Bytes of one message from a client, at most."
    )
    max_prompt_bytes: Annotated[Bytes, Field(ge=1)] = Field(
        2**20, description="Bytes of text (or of a conversation) to tokenise, at most."
    )
    max_backlog: Annotated[Bytes, Field(ge=2**16)] = Field(
        32 * 2**20, description="Bytes held for a reader that does not read; over it that request ends."
    )
    max_capture_bytes: Annotated[Bytes, Field(ge=0)] = Field(
        2**30, description="Bytes of captured values that one request may send, at most; 0 refuses all captures."
    )
    capture_memory: Annotated[Bytes, Field(ge=0)] = Field(
        4 * 2**30, description="Bytes of captured values that all requests at work may hold for their readers."
    )
    vectors: FileName | None = Field(
        None,
        description="File or directory of vectors, tuned lenses and SAELens's autoencoders that every tenant may use.",
    )
    stored_bytes: Annotated[Bytes, Field(ge=0)] = Field(
        2**29, description="Bytes that each tenant may put aside on the server (vectors, autoencoders); 0 keeps none."
    )
    serve_weights: bool = Field(False, description="Let those who have the scope weights read the model's weights.")
    max_streams: Count = Field(1024, description="Calls open on one connection, at most.")
    max_connections: Count = Field(1024, description="Connections open at the same time, at most.")
    max_connection_age: Annotated[float, Field(ge=1, le=LONGEST_AGE)] | None = Field(
        None, description="Seconds after which clients are asked to connect anew, give or take a tenth."
    )
    max_connection_age_grace: Annotated[float, Field(ge=0, le=LONGEST_AGE)] | None = Field(
        None, description="Seconds that calls on such a connection may still take. Default: until they end."
    )
    metrics_listen: Annotated[str | None, BeforeValidator(_check_optional_listen)] = Field(
        "127.0.0.1:9464", description="HOST:PORT of /metrics for Prometheus; port 0 picks one, none serves none."
    )
    metrics_compat: Literal["none", "vllm"] = Field(
        "none", description="Names that metrics also have: vllm, so that its dashboards and alerts work."
    )
    tokenizer_threads: Annotated[int, Field(ge=1, le=64)] = Field(2, description="Threads that tokenise and decode.")

    @property
    def name(self) -> str:
        """The name told to clients: of a path its last part, for where files lie is not theirs to know."""
        path = Path(self.model).name if self.model.startswith(("/", ".", "~")) else ""
        return self.served_name or path or self.model


@dataclass(frozen=True, slots=True)
class Given:
    """A value as it was written, and where: for messages."""

    value: object
    where: str


def read_config(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """The config from the command line's arguments (without the program's name) and the environment.

    Raises:
        ConfigError: an option is unknown or wrong.
        SystemExit: after `--help` and `--version`.
    """
    try:
        given: dict[str, object] = _command().main(list(arguments), "cutaway-server", standalone_mode=False)
    except click.ClickException as error:
        raise ConfigError(error.format_message().replace("\n", " ")) from None
    if not isinstance(given, dict):
        raise SystemExit(given)  # --help or --version has been printed
    file = given.pop("config", None) or environment.get(ENVIRONMENT + "CONFIG")
    from_file = _from_file(Path(str(file))) if file else {}
    _checked(from_file, strict=True)  # TOML has types of its own: true is no number there, and "7" neither
    values = {
        **from_file,
        **_from_environment(environment),
        **{name: Given(value, _option(name)) for name, value in given.items() if value is not None},
    }
    return _checked(values)


def _checked(values: Mapping[str, Given], *, strict: bool = False) -> Config:
    try:
        return Config.model_validate({name: given.value for name, given in values.items()}, strict=strict)
    except ValidationError as error:
        first = error.errors()[0]
        given = values[str(first["loc"][0])]
        rule = re.sub(r"^\w+ should ", "must ", first["msg"].removeprefix("Value error, "))
        raise ConfigError(f"{given.where}: {given.value!r} is not allowed: {rule}") from None


def _from_file(path: Path) -> dict[str, Given]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {str(path)!r} is not TOML: {error}") from None
    values: dict[str, Given] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in Config.model_fields or name in values:
            rule = "is given twice" if name in values else f"is no option; there are {_names()}"
            raise ConfigError(f"{path}: {key!r} {rule}")
        values[name] = Given(value, f"{path}: {key}")
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Given]:
    values: dict[str, Given] = {}
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT) or OTHERS.fullmatch(variable):
            continue
        name = variable.removeprefix(ENVIRONMENT).lower()
        if name not in Config.model_fields or variable != variable.upper():
            raise ConfigError(f"environment: {variable} is no option; there are {_names()}")
        values[name] = Given(value, f"environment: {variable}")
    return values


def _names() -> str:
    return ", ".join(_option(name).removeprefix("--") for name in Config.model_fields)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _command() -> click.Command:
    """The command line: one option for each field, as text; `Config` does the checking."""
    config = click.Option(["--config"], metavar="FILE", help="TOML file with options. [env: CUTAWAY_CONFIG]")
    version = click.version_option(package_name="cutaway")
    return version(
        click.Command(
            "cutaway-server",
            params=[config, *(_click_option(name, field) for name, field in Config.model_fields.items())],
            callback=lambda **given: given,
            context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
            help="Serve a language model over gRPC. `cutaway-server keys` makes API keys.\n\n"
            "Every option may also stand in the environment "
            "(--max-running as CUTAWAY_MAX_RUNNING) and in the TOML file (max-running = 64); the command line "
            "goes first, then the environment. Bytes take units: 512MB, 2GiB.",
        )
    )


def _click_option(name: str, field: FieldInfo) -> click.Option:
    flag = field.annotation is bool
    declaration = f"{_option(name)}/--no-{name.replace('_', '-')}" if flag else _option(name)
    return click.Option([declaration, name], default=None, metavar=None if flag else _kind(field), help=_help(field))


def _help(field: FieldInfo) -> str:
    shown = field.default
    known = shown is not None and shown is not PydanticUndefined
    if known and _kind(field) == "BYTES":
        shown = f"{shown / 2**20:g}MiB"
    return f"{field.description} [default: {_shown(shown)}]" if known else str(field.description)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else format(value, "g" if isinstance(value, float) else "")


def _kind(field: FieldInfo) -> str:
    shape = str(field.annotation)
    if "Literal" in shape:
        return "|".join(re.findall(r"'([\w-]+)'", shape))
    if "_to_bytes" in shape + str(field.metadata):
        return "BYTES"
    return next((word for kind, word in (("int", "N"), ("float", "X")) if kind in shape), "TEXT")
