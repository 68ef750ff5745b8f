"""What Prometheus scrapes: the engine's own counters, read when it asks, and not before."""

from cutaway_server.service.metrics.catalog import CATALOG
from cutaway_server.service.metrics.metrics import Metrics

__all__ = ["CATALOG", "Metrics"]
