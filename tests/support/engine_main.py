"""The engine process behind ``support.engine``: a job in, what was found out."""

import multiprocessing
from functools import partial
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.executor import multiproc_executor

from support.engine import NEW_TOKENS


def _buffer_sizes(model: torch.nn.Module) -> dict[str, int]:
    return {
        name: parameter.numel() * parameter.itemsize
        for name, parameter in model.named_parameters()
        if ".routed_experts." in name
    }


def _corrupt(model: torch.nn.Module, name: str, index: list[int], value: int) -> torch.Tensor:
    """Overwrite a part of a tensor of the first MoE layer; return what it was."""
    layer = next(module for module in model.modules() if hasattr(module, "moeq_layout"))
    part = getattr(layer, name)[tuple(index)]
    before = part.clone()
    part.fill_(value)
    return before


def _restore(model: torch.nn.Module, name: str, index: list[int], before: torch.Tensor) -> None:
    layer = next(module for module in model.modules() if hasattr(module, "moeq_layout"))
    getattr(layer, name)[tuple(index)].copy_(before)


def _generate(
    llm: LLM, job: dict[str, Any], adapter: LoRARequest | None = None
) -> list[dict[str, Any]]:
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in job["prompts"]],
        SamplingParams(
            temperature=0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            prompt_logprobs=job["prompt_logprobs"],
            logprobs=0,
        ),
        use_tqdm=False,
        lora_request=adapter,
    )
    return [fields_of(output) for output in outputs]


def fields_of(output: RequestOutput) -> dict[str, Any]:
    """Return the fields of ``support.engine.Completion``, ready for JSON."""
    chosen = output.outputs[0]
    prompt = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=False)
    generated = zip(chosen.token_ids, chosen.logprobs, strict=True)
    return {
        "tokens": list(chosen.token_ids),
        "prompt_logprobs": [values[token].logprob for token, values in prompt],
        "logprobs": [values[token].logprob for token, values in generated],
    }


def _act(llm: LLM, job: dict[str, Any], kind: str, path: str | None) -> list[dict[str, Any]]:
    adapter = None
    if kind == "reload":
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    elif kind == "adapter":
        adapter = LoRARequest(path, 1, path)
    elif kind == "add adapter":
        llm.llm_engine.add_lora(LoRARequest(path, 2, path))
    return _generate(llm, job, adapter)


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Generate; then once more for each corruption and for each action.

    Corruptions are (name, index, value) of the first MoE layer; each is undone. Actions are
    (kind, path) and stay: ``reload`` weights from a folder, generate with an ``adapter``,
    ``add adapter`` without using it, ``generate``.

    Returns:
        The fields of ``support.engine.EngineRun`` but the log, ready for JSON.
    """
    if not job["spawn_workers"]:
        # vLLM spawns them on CPUs because of OpenMP's threads, which are one a rank here.
        multiproc_executor.get_mp_context = partial(multiprocessing.get_context, "fork")
    llm = LLM(model=job["model"], **job["llm"])
    buffers = llm.apply_model(_buffer_sizes)
    completions = [_generate(llm, job)]
    for name, index, value in job["corruptions"]:
        (before,) = llm.apply_model(partial(_corrupt, name=name, index=index, value=value))
        completions.append(_generate(llm, job))
        llm.apply_model(partial(_restore, name=name, index=index, before=before))
    refusals = []
    for kind, path in job["actions"]:
        try:
            completions.append(_act(llm, job, kind, path))
        except Exception as error:
            refusals.append(f"{type(error).__name__}: {error}")
    metrics = {}
    if not job["llm"].get("disable_log_stats", True):
        metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    llm.llm_engine.engine_core.shutdown()  # at the end of the process it could abort
    return {
        "completions": completions,
        "refusals": refusals,
        "buffers": buffers,
        "metrics": metrics,
    }
