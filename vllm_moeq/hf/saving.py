"""``save_pretrained`` of a model with packed experts."""

import json
from pathlib import Path
from typing import Any

from vllm_moeq.format import guarded, write_manifest


def save_pretrained(model: Any, save_directory: Any, *args: Any, **options: Any) -> None:
    """Save as transformers does, with the guard in ``config.json`` and a manifest.

    It stands in the place of the model's own method; arguments are the same.

    Raises:
        ValueError: The folder is the one that the model was loaded from, from which the packed
            experts are copied; or ``push_to_hub``, which would come before the guard; or a
            ``state_dict``, which has no packed experts.
    """
    folder = Path(save_directory)
    if options.pop("push_to_hub", False):
        raise ValueError("call `model.push_to_hub(...)` instead of `push_to_hub=True`")
    if options.get("state_dict") is not None or any(args[1:2]):
        raise ValueError("packed experts are saved from the model: give no `state_dict`")
    if folder.resolve() == model.hf_quantizer.source.resolve():
        raise ValueError(
            f"{folder} is where the model was loaded from, and its packed experts are copied from "
            "there: save into another folder"
        )
    # The tensors come under their names on disk; nothing is left to be converted.
    options["save_original_format"] = False
    type(model).save_pretrained(model, save_directory, *args, **options)
    path = folder / "config.json"
    if (args[0] if args else options.get("is_main_process", True)) and path.is_file():
        config = guarded(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_manifest(folder)
