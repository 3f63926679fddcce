"""What a calibration has finished, on disk: a run that was killed goes on from there."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moeq.checkpoint.atomic import replace_file
from moeq.checkpoint.mapped import MappedFiles
from moeq.checkpoint.resume import begin, read_note, remove
from moeq.errors import MoeqError

_STATE, _FINGERPRINT = "state.json", "fingerprint.json"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Snapshots:
    """Finished layers, and the activations that the next one gets.

    Every file is either complete or not there.

    Attributes:
        folder: Where they lie.
    """

    folder: Path

    def start(self, fingerprint: dict[str, Any], resume: bool) -> None:
        """Create the folder, or check that what it holds comes from the same work.

        Args:
            fingerprint: Everything that the result depends on, by a name for users, as JSON.
            resume: Whether to go on with what is there; otherwise it is removed.

        Raises:
            MoeqError: What is there was made from something else; names it.
        """
        if self.folder.exists() and not resume:
            remove(self.folder)
        self.folder.mkdir(exist_ok=True)
        begin(self.folder / _FINGERPRINT, fingerprint)

    @property
    def has_finished(self) -> bool:
        """Whether there is something to go on with."""
        return (self.folder / _STATE).exists()

    def save_layer(self, index: int, tensors: Tensors) -> None:
        """Keep the packed weights of a layer."""
        replace_file(self._layer(index), lambda target: save_file(tensors, target))

    def save(self, done: int, activations: Tensors, facts: object) -> None:
        """Note that the layers before ``done`` are finished; a kill at any time loses only one.

        Args:
            done: Number of finished layers.
            activations: What the next layer gets.
            facts: To be given back, as JSON.
        """
        snapshot = self._activations(done)
        replace_file(snapshot, lambda target: save_file(activations, target))
        state = json.dumps({"done": done, "facts": facts})
        replace_file(self.folder / _STATE, lambda target: target.write_text(state))
        for old in self.folder.glob("activations-*.safetensors"):
            if old != snapshot:
                old.unlink()

    def restore(self, activations: Tensors) -> tuple[int, Any]:
        """Return how many layers are finished, and the facts; fill the activations."""
        if not self.has_finished:
            return 0, {}
        state = read_note(self.folder / _STATE)
        path = self._activations(state["done"])
        try:
            saved = load_file(path)
        except SafetensorError as error:
            raise MoeqError(
                f"{path} of the unfinished run is damaged ({error}); leave out `resume` to start "
                "again"
            ) from error
        for name, tensor in activations.items():
            tensor.copy_(saved[name])
        return int(state["done"]), state["facts"]

    def stored(self, indices: Iterable[int]) -> Callable[[Iterable[str]], Tensors]:
        """Return what reads tensors of these layers by their names."""
        files = MappedFiles()
        paths = [self._layer(index) for index in indices]
        path_of = {name: path for path in paths for name in files.open(path).keys()}  # noqa: SIM118

        def read(names: Iterable[str]) -> Tensors:
            return {name: files.tensor(path_of[name], name) for name in names}

        return read

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer-{index:05}.safetensors"

    def _activations(self, done: int) -> Path:
        return self.folder / f"activations-{done:05}.safetensors"
