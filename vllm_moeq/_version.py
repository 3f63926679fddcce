"""The version of the distribution that holds both packages."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vllm-moeq")
except PackageNotFoundError:  # a source tree that is on the path but not installed
    __version__ = "0+source"
