"""gRPC: the only room that sees the wire."""
