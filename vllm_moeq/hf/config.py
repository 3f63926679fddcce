"""The ``quantization_config`` of a packed checkpoint, as transformers holds it."""

import copy
from typing import Any

from transformers import Mxfp4Config

from vllm_moeq.format import QUANT_METHOD, CheckpointConfig


# transformers takes options from the caller's object for classes of its own only. This is the one
# of them that has the same single option and nothing else.
class MoeqConfig(Mxfp4Config):
    """What ``from_pretrained`` is told beside what ``config.json`` says.

    Args:
        dequantize: Make an ordinary model, in the type asked for, instead of packed experts.
        checkpoint: ``quantization_config`` of a ``config.json``; transformers puts it in.

    Raises:
        FormatError: A checkpoint that this version cannot read.
    """

    def __init__(self, dequantize: bool = False, **checkpoint: Any) -> None:
        super().__init__(dequantize=dequantize)
        self.quant_method = QUANT_METHOD
        self.checkpoint = checkpoint
        if checkpoint:
            CheckpointConfig.from_dict(checkpoint)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` said, to the last field."""
        return copy.deepcopy(self.checkpoint)
