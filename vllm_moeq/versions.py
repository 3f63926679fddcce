"""Which vLLM the plugin fits."""

from packaging.version import InvalidVersion, Version

# The CPU needs vLLM's modular CPU router (0.30); with CUDA the experts' interface is there since
# 0.25.1. The upper end is the last release whose interface was read and found to be the same.
_FIRST_CPU = Version("0.30.0")
_FIRST_CUDA = Version("0.25.1")
_AFTER_LAST = Version("0.34.0.dev0")


def unsupported_reason() -> str | None:
    """Return why the installed vLLM does not fit, or None if it does."""
    import vllm
    from vllm.platforms import current_platform

    try:
        installed = Version(vllm.__version__)
    except InvalidVersion:  # a source tree without its generated version file
        return f"vLLM's version {vllm.__version__!r} is no version number"
    first = _FIRST_CPU if current_platform.is_cpu() else _FIRST_CUDA
    if first <= installed < _AFTER_LAST:
        return None
    return (
        f"it supports vLLM {first} up to, but not including, {_AFTER_LAST.base_version}; "
        f"found {installed}"
    )
