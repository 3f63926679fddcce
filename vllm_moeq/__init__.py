"""vLLM plugin for Mixture-of-Experts checkpoints with one bit-width per expert.

Importing this package needs torch only. vLLM calls :func:`register` through the entry point group
``vllm.general_plugins`` in every one of its processes.
"""

import logging

from vllm_moeq._version import __version__

__all__ = ["__version__", "register"]

_logger = logging.getLogger("vllm.moeq")


def register() -> None:
    """Make ``--quantization moeq`` known to vLLM.

    Safe to call again. An unsuitable vLLM leads to one log line, not to an exception: an exception
    here would take down every ``vllm`` command, also those that have nothing to do with moeq.
    """
    from vllm_moeq.versions import unsupported_reason

    reason = unsupported_reason()
    if reason is not None:
        _logger.warning("vllm-moeq %s is not active: %s", __version__, reason)
        return
    try:
        from vllm_moeq.config import register_config

        register_config()
    except (ImportError, AttributeError) as error:
        _logger.warning(
            "vllm-moeq %s is not active: this vLLM lacks an interface that it uses (%s)",
            __version__,
            error,
        )
