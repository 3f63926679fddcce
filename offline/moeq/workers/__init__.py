"""Does independent work in this process or on a cluster: which of them never shows in results."""

from moeq.workers.cluster import PROCESS_BYTES, Cluster, connected
from moeq.workers.local import OneByOne, Threads, Workers, on_devices

__all__ = [
    "PROCESS_BYTES",
    "Cluster",
    "OneByOne",
    "Threads",
    "Workers",
    "connected",
    "on_devices",
]
