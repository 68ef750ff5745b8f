"""Which options must stand together before a server may listen: what others can reach asks who they are, encrypted."""

from __future__ import annotations

from ipaddress import ip_address

from cutaway_server.config import Config, ConfigError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. Names other than localhost are taken for the network's."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(config: Config) -> None:
    """Refuse what would stand open by mistake, and options that do nothing without another.

    Raises:
        ConfigError: names the options and what to do.
    """
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key: one needs the other")
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ConfigError("--tls-client-ca: needs --tls-cert and --tls-key")
    if config.tls_client_ca is not None and config.api_keys is None:
        raise ConfigError("--tls-client-ca: needs --api-keys, a file that says what each certificate's name may do")
    if config.max_connection_age_grace is not None and config.max_connection_age is None:
        raise ConfigError("--max-connection-age-grace: does nothing without --max-connection-age")
    if config.insecure_listen or is_loopback(config.listen.rpartition(":")[0]):
        return
    missing = [
        option
        for option, value in (("--tls-cert and --tls-key", config.tls_cert), ("--api-keys", config.api_keys))
        if value is None
    ]
    if missing:
        raise ConfigError(
            f"--listen: {config.listen!r} can be reached from other machines: give {' and '.join(missing)}, "
            "or --insecure-listen if the network itself keeps others out"
        )
