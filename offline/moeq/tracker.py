"""Records routers during training, so that `base_router` knows where they started."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

_ROUTER_NAMES = ("gate", "router")
_INSIDE = "classifier"
"""Where a Switch Transformer's router has its weight."""
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


class RouterNormTracker(TrainerCallback):  # type: ignore[misc]
    """Saves the initial routers of a model and the history of their row norms.

    In a plain PyTorch loop::

        tracker = RouterNormTracker("routers.safetensors", model)
        for batch in batches:
            ...
            tracker.step()
        tracker.save()

    With transformers: ``Trainer(..., callbacks=[RouterNormTracker("routers.safetensors")])``.

    The file holds, for each router, its initial weight float32 [experts, hidden] under its own
    name, and ``{name}.norm_history`` float32 [records, experts]; ``norm_history.steps`` int64
    [records] are the steps of the records. It is written when training starts and again by each
    :meth:`save`, so that a killed training still leaves the initial routers.

    A resumed training goes on with its file: transformers' by itself, a plain loop's with
    ``resume_step``. With several processes, use the tracker in one of them; under transformers
    only the main process writes.

    Args:
        path: File to write.
        model: The model, before its first step; may be None if transformers calls.
        every: Steps between two records of the norms.
        resume_step: Steps that the model has behind it; 0 starts a new file.

    Raises:
        ValueError: The model has no router: no module with ``experts`` beside a ``gate`` or
            ``router``, that of a Switch Transformer included; ``every`` is not positive; or the
            file exists although training starts, or does not fit although it resumes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        every: int = 100,
        resume_step: int = 0,
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self.path = Path(path)
        self.every = every
        self._step = 0
        self._steps: list[int] = []
        self._routers: dict[str, nn.Parameter] = {}
        self._initial: dict[str, torch.Tensor] = {}
        self._norms: dict[str, list[torch.Tensor]] = {}
        self._writes = True
        if model is not None:
            self.attach(model, resume_step)

    def attach(self, model: nn.Module, resume_step: int = 0) -> None:
        """Watch the model's routers; they are the initial ones unless training resumes."""
        routers = dict(_routers(model))
        if not routers:
            raise ValueError(
                f"{type(model).__name__} has no router: no module that holds 'experts' beside a "
                "'gate' or 'router' with a weight [experts, hidden]"
            )
        self._step = resume_step
        if resume_step:
            self._resume(routers)
        else:
            if self._writes and self.path.exists():
                raise ValueError(
                    f"{self.path} exists and may hold the initial routers of an earlier training; "
                    "remove it, or pass resume_step to go on with it"
                )
            self._initial = {name: _snapshot(weight) for name, weight in routers.items()}
            self._norms = {name: [] for name in routers}
            self._steps = []
        self._routers = routers
        self.save()

    def _resume(self, routers: dict[str, nn.Parameter]) -> None:
        try:
            stored = load_file(self.path)
            steps = stored["norm_history.steps"]
            # A checkpoint may be older than the last record.
            past = steps < self._step
            self._steps = steps[past].tolist()
            self._initial = {name: stored[name] for name in routers}
            self._norms = {
                name: list(stored[f"{name}.norm_history"][past].unbind()) for name in routers
            }
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"training resumes at step {self._step}, but {self.path} does not hold this "
                f"model's initial routers ({error!r})"
            ) from error

    def step(self) -> None:
        """Count one optimizer step; record the norms every so many."""
        self._require_model()
        self._step += 1
        if self._step % self.every == 0:
            self._record()

    def save(self) -> None:
        """Write the file; a reader never sees a half-written one."""
        self._require_model()
        if not self._writes:
            return
        if self._steps[-1:] != [self._step]:
            self._record()
        tensors = {"norm_history.steps": torch.tensor(self._steps)}
        for name, initial in self._initial.items():
            tensors[name] = initial
            tensors[f"{name}.norm_history"] = torch.stack(self._norms[name])
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        save_file(tensors, partial, metadata={"written_by": "moeq.RouterNormTracker"})
        partial.replace(self.path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by transformers when training starts or resumes."""
        self._writes = state.is_world_process_zero
        if not self._routers:
            self.attach(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by transformers after each optimizer step."""
        self.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by transformers: write the file."""
        self.save()

    def _record(self) -> None:
        self._steps.append(self._step)
        for name, weight in self._routers.items():
            self._norms[name].append(_snapshot(weight).norm(dim=1))

    def _require_model(self) -> None:
        if not self._routers:
            raise ValueError("RouterNormTracker has no model yet; pass it or call attach(model)")


def _routers(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (parameter name without wrappers, weight) of every router."""
    for name, module in model.named_modules():
        if not hasattr(module, "experts"):
            continue
        for router_name in _ROUTER_NAMES:
            router, path = getattr(module, router_name, None), router_name
            if hasattr(router, _INSIDE):
                router, path = getattr(router, _INSIDE), f"{router_name}.{_INSIDE}"
            weight = getattr(router, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 2:
                full_name = f"{name}.{path}.weight"
                for wrapper in _WRAPPERS:
                    full_name = full_name.replace(wrapper, "")
                yield full_name.removeprefix("."), weight


def _snapshot(weight: nn.Parameter) -> torch.Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)
