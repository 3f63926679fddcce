"""Does independent work in this process or on a cluster: which of them never shows in results."""

from moeq.workers.cluster import Cluster, connected
from moeq.workers.local import OneByOne, Threads, Workers, on_devices

__all__ = ["Cluster", "OneByOne", "Threads", "Workers", "connected", "on_devices"]
