"""Options: three sources in one order, and mistakes answered in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cutaway_server.config import Config, ConfigError, read_config
from pydantic import ValidationError


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_command_line_goes_before_the_environment_before_the_file_before_the_default(tmp_path: Path) -> None:
    file = written(tmp_path / "c.toml", "max-running = 1\nmax_queued = 1\npage-size = 32\n")
    environment = {"CUTAWAY_MAX_RUNNING": "2", "CUTAWAY_MAX_QUEUED": "2", "HOME": "/"}
    config = read_config(["--config", file, "--max-running", "3"], environment)
    assert (config.max_running, config.max_queued, config.page_size, config.max_batch_tokens) == (3, 2, 32, 512)


def test_the_file_may_be_named_in_the_environment(tmp_path: Path) -> None:
    file = written(tmp_path / "c.toml", 'kv-cache-memory = "512MB"\nprefix-caching = false\n')
    config = read_config([], {"CUTAWAY_CONFIG": file})
    assert (config.kv_cache_memory, config.prefix_caching) == (512_000_000, False)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("2GiB", 2 * 2**30),
        ("512MB", 512_000_000),
        ("1.5GiB", 3 * 2**29),
        ("4096", 4096),
        (" 3 kib ", 3072),
        ("1kb", 1000),
    ],
)
def test_bytes_take_units(text: str, n_bytes: int) -> None:
    assert read_config(["--kv-cache-memory", text], {}).kv_cache_memory == n_bytes


def test_flags_have_a_no_form_that_wins_over_the_environment() -> None:
    assert read_config([], {}).prefix_caching is True
    assert read_config([], {"CUTAWAY_PREFIX_CACHING": "false"}).prefix_caching is False
    assert read_config(["--prefix-caching"], {"CUTAWAY_PREFIX_CACHING": "0"}).prefix_caching is True
    assert read_config(["--no-prefix-caching"], {"CUTAWAY_PREFIX_CACHING": "1"}).prefix_caching is False


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["--page-size", "24"], {}, r"--page-size: '24' .* power of two from 16 to 256"),
        (["--page-size", "512"], {}, r"--page-size: '512' .* power of two from 16 to 256"),
        (["--listen", "50051"], {}, r"--listen: '50051' .* HOST:PORT"),
        (["--listen", "localhost:65536"], {}, r"--listen: 'localhost:65536' .* 0 to 65535"),
        (["--dtype", "int8"], {}, r"--dtype: 'int8' .* 'float32'"),
        (["--max-running", "0"], {}, r"--max-running: '0' .* greater than or equal to 1"),
        (["--max-running", "100000000"], {}, r"--max-running: '100000000' .* must be less than or equal to 4096"),
        (["--max-batch-tokens", "65537"], {}, r"--max-batch-tokens: '65537' .* less than or equal to 65536"),
        (["--max-context", "2147483647"], {}, r"--max-context: '2147483647' .* less than or equal to 134217728"),
        (["--max-queued", "2147483647"], {}, r"--max-queued: '2147483647' .* less than or equal to 1048576"),
        (["--threads", "100000"], {}, r"--threads: '100000' .* less than or equal to 1024"),
        (["--page-size", "many"], {}, r"--page-size: 'many' .* must be a valid integer"),
        (["--model", ""], {}, r"--model: '' is not allowed: must have at least 1 character$"),
        (["--max-queued", "many"], {}, r"--max-queued: 'many' .* integer"),
        (["--memory-utilization", "nan"], {}, r"--memory-utilization: 'nan' .* finite"),
        (["--memory-utilization", "1.5"], {}, r"--memory-utilization: '1.5' .* less than or equal to 1"),
        (["--kv-cache-memory", "2 gigs"], {}, r"--kv-cache-memory: '2 gigs' .* 2GiB or 512MB"),
        (["--drain-timeout", "-1"], {}, r"--drain-timeout: '-1' .* greater than or equal to 0"),
        (["--max-runing", "3"], {}, r"--max-runing.*--max-running"),
        (["smollm2"], {}, r"unexpected extra argument \(smollm2\)"),
        (["--config", "/nowhere.toml"], {}, r"--config: '/nowhere.toml' cannot be read: No such file"),
        ([], {"CUTAWAY_MAX_RUNING": "3"}, r"environment: CUTAWAY_MAX_RUNING is no option; there are model, .*max-run"),
        ([], {"CUTAWAY_THREADS": "two"}, r"environment: CUTAWAY_THREADS: 'two' .* integer"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_option_value_and_rule(
    arguments: list[str], environment: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        read_config(arguments, environment)
    assert re.search(told, str(raised.value))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max-runing = 3", "'max-runing' is no option"),
        ("threads = 1.5", "c.toml: threads: 1.5 is not allowed"),
        ("max-running = true", "c.toml: max-running: True is not allowed: must be a valid integer"),
        ("max-running = 7.0", "c.toml: max-running: 7.0 is not allowed: must be a valid integer"),
        ('max-running = "7"', "c.toml: max-running: '7' is not allowed: must be a valid integer"),
        ("page-size = true", "c.toml: page-size: True is not allowed: must be a valid integer"),
        ("max-backlog = true", "c.toml: max-backlog: True is not allowed: must be a valid integer"),
        ("drain-timeout = true", "c.toml: drain-timeout: True is not allowed: must be a valid number"),
        ("prefix-caching = 1", "c.toml: prefix-caching: 1 is not allowed: must be a valid boolean"),
        ("model = 7", "c.toml: model: 7 is not allowed: must be a valid string"),
        ("max-running = 1\nmax_running = 2", "'max_running' is given twice"),
        ("max-running", "is not TOML"),
        ("[server]\nthreads = 1", "'server' is no option"),
    ],
)
def test_mistakes_in_the_file_name_the_file_and_the_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        read_config(["--config", written(tmp_path / "c.toml", text)], {})


def test_the_file_takes_whole_numbers_for_others_and_bytes_either_way(tmp_path: Path) -> None:
    text = (
        'drain-timeout = 3\nmax-backlog = 1048576\nmax-prompt-bytes = "2MiB"\nlisten = "[::1]:0"\ndtype = "float32"\n'
    )
    config = read_config(["--config", written(tmp_path / "c.toml", text)], {"CUTAWAY_MAX_RUNNING": "7"})
    assert (config.drain_timeout, config.max_backlog, config.max_prompt_bytes) == (3.0, 2**20, 2**21)
    assert (config.listen, config.dtype, config.max_running) == ("[::1]:0", "float32", 7)


def test_what_kubernetes_sets_beside_a_service_named_cutaway_is_no_mistake() -> None:
    environment = {
        "CUTAWAY_SERVICE_HOST": "10.0.0.1",
        "CUTAWAY_SERVICE_PORT": "50051",
        "CUTAWAY_SERVICE_PORT_GRPC": "50051",
        "CUTAWAY_PORT": "tcp://10.0.0.1:50051",
        "CUTAWAY_PORT_50051_TCP_ADDR": "10.0.0.1",
        "CUTAWAY_ADDRESS": "127.0.0.1:50051",
    }
    assert read_config([], environment) == Config()


def test_the_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().threads = 3


def test_help_names_every_option_with_its_default_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom cutaway_server.__main__ import main\nsys.argv = ['cutaway-server', '--help']\n"
        "try: main()\nfinally: assert not {'torch', 'grpc', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    words = " ".join(done.stdout.split())
    for name, field in Config.model_fields.items():
        assert "--" + name.replace("_", "-") in words
        assert str(field.description) in words.replace("- ", "-")
    for default in ("smollm2", "127.0.0.1:50051", "auto", "16", "true", "30", "0.6", "4MiB", "info"):
        assert f"[default: {default}]" in words
    assert words.count("[default: ") == sum(field.default is not None for field in Config.model_fields.values())


def test_the_program_tells_a_mistake_in_one_line_and_exits_2(tmp_path: Path) -> None:
    for arguments in (["--page-size", "17"], ["--model", str(tmp_path / "none.gguf"), "--listen", "127.0.0.1:0"]):
        done = subprocess.run(
            [sys.executable, "-m", "cutaway_server", *arguments, "--log-level", "error"],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ,
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("cutaway-server: ")
        assert done.stderr.count("\n") == 1, done.stderr
