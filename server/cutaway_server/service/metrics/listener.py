"""An HTTP listener on threads of its own, for what no gRPC client asks: /metrics, and what else stands beside it."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from collections.abc import Iterable, Mapping
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client.exposition import ThreadingWSGIServer

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16
IO_SECONDS = 10.0  # a connection may be silent, or not read, for so long
POLL_SECONDS = 0.1  # how soon stop() is heard


class HttpListener:
    """Serves each path of `routes` by its application. Takes the port at once, and answers from then on.

    Raises:
        OSError: the address is taken or not ours.
    """

    def __init__(self, host: str, port: int, routes: Mapping[str, WSGIApplication]) -> None:
        plain = host.strip("[]")
        family = socket.getaddrinfo(plain, port, type=socket.SOCK_STREAM)[0][0]
        kind = type("Listener", (_Listener,), {"address_family": family})
        self._server: WSGIServer = make_server(plain, port, _routed(routes), kind, handler_class=_Handler)
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_SECONDS,), name="metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Close the port; what is being answered may end by itself."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Listener(ThreadingWSGIServer):
    """A thread for each connection, up to `MAX_CONNECTIONS`: further ones are closed unanswered."""

    def __init__(self, *arguments: Any) -> None:
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*arguments)

    def server_bind(self) -> None:
        """Bind, without the library's question to a name server who we are."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a thread, if one is left."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and give the place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  (the library's signature)
        """Note what went wrong with one connection: a scraper that hangs up is none of the operator's business."""
        log.debug("an HTTP request failed", exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = IO_SECONDS

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  (the library's signature)
        log.debug(format, *arguments)


def _routed(routes: Mapping[str, WSGIApplication]) -> WSGIApplication:
    def routed(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        application = routes.get(environ["PATH_INFO"])
        if application is not None:
            return application(environ, respond)
        respond("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"there are {', '.join(sorted(routes))}\n".encode()]

    return routed
