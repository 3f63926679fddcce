"""The entry point: harmless, repeatable, and quiet where vLLM does not fit."""

import json
import subprocess
import sys
from typing import Any

import pytest

from support.checkpoints import plan_dict
from support.engine import in_fork


def _register_and_list(version: str | None = None, moved: str | None = None) -> None:
    import vllm
    from vllm.model_executor.layers import fused_moe
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader

    import vllm_moeq

    if version is not None:
        vllm.__version__ = version
    if moved is not None:
        owner = fused_moe if hasattr(fused_moe, moved) else RunaiModelStreamerLoader
        delattr(owner, moved)
    vllm_moeq.register()
    vllm_moeq.register()
    print("registered", QUANTIZATION_METHODS.count("moeq"))


def test_packages_import_without_vllm() -> None:
    # An entry of None makes every import of vllm fail.
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import moeq, moeq.cli, moeq.checkpoint.writer\n"
        "import vllm_moeq, vllm_moeq.format, vllm_moeq.kernels\n"
        "import vllm_moeq.expert_buffers\n"
        "assert 'transformers' not in sys.modules\n"
        "import vllm_moeq.hf"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.vllm
def test_registers_once() -> None:
    done = in_fork(_register_and_list)
    assert done.returncode == 0, done.log
    assert "registered 1" in done.log


@pytest.mark.vllm
@pytest.mark.parametrize("version", ["0.29.0", "0.34.0", "dev"])
def test_another_vllm_gets_one_clear_line(version: str) -> None:
    done = in_fork(_register_and_list, version)
    assert done.returncode == 0, done.log
    assert "registered 0" in done.log
    assert version in done.log


@pytest.mark.vllm
def test_a_moved_interface_gets_one_clear_line() -> None:
    done = in_fork(_register_and_list, None, "RoutedExperts")
    assert done.returncode == 0, done.log
    assert "registered 0" in done.log
    assert "lacks an interface that it uses" in done.log


@pytest.mark.vllm
def test_what_older_releases_lack_is_done_without() -> None:
    done = in_fork(_register_and_list, None, "get_all_weights")
    assert done.returncode == 0, done.log
    assert "registered 1" in done.log


def _give_lies(config: dict[str, Any]) -> None:
    from support.hostile import every_lie, guarded
    from vllm_moeq.config import MoeqConfig
    from vllm_moeq.format import FormatError

    MoeqConfig.from_config(config)
    taken = refused = 0
    for text in every_lie(config):
        try:
            lying = json.loads(text)
        except (ValueError, RecursionError):
            continue  # vLLM does not get as far as to us
        with guarded():
            try:
                MoeqConfig.from_config(lying)
                taken += 1
            except FormatError as error:
                assert str(error)
                refused += 1
    print("taken", taken, "refused", refused)


@pytest.mark.vllm
def test_lies_of_a_config_are_refused_in_words() -> None:
    plan = plan_dict(provenance={"strategy": "auto", "details": {"tried": []}})
    linear = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [],
        "config_groups": {
            "group_0": {
                "targets": ["model.layers.0.self_attn.q_proj"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group",
                            "group_size": 64},
            },
        },
    }  # fmt: skip
    done = in_fork(_give_lies, {"quant_method": "moeq", **plan, "linear": linear})
    assert done.returncode == 0, done.log
    assert "refused" in done.log


def _map_names(config: dict[str, Any]) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_moeq.config import MoeqConfig

    found = MoeqConfig.from_config(config)
    # As of Qwen3-VL: names of layers alone do not begin like those of tensors.
    found.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"lm_head.": "language_model.lm_head."})
    )
    print("mapped", "language_model.lm_head" in found._linear)


@pytest.mark.vllm
def test_layers_are_known_by_what_models_call_their_tensors() -> None:
    plan = plan_dict()
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group"}
    linear = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [],
        "config_groups": {
            "group_0": {
                "targets": ["lm_head"],
                "weights": weights | {"group_size": plan["group_size"]},
            },
        },
    }  # fmt: skip
    done = in_fork(_map_names, {"quant_method": "moeq", **plan, "linear": linear})
    assert done.returncode == 0, done.log
    assert "mapped True" in done.log
