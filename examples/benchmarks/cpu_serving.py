"""Measures what 2.5 bits change for vLLM on a CPU: speed, resident memory and start-up time.

    python examples/benchmarks/cpu_serving.py

Makes a model of the shape of OLMoE-1B-7B with random weights, which cost the time and memory of
trained ones, quantizes it with ``moeq quantize``, its experts alone and its dense layers too, and
measures all under ``LLM.generate`` and ``vllm serve``, in turns and each in a process of its own.
Models that --work has are used again.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
from results import RESULTS
from serving_figures import (
    BF16,
    CONCURRENT,
    DECODE,
    FIRST_START,
    KV_CACHE_GIB,
    MEMORY,
    MEMORY_PEAK,
    MEMORY_READY,
    PREFILL,
    SHORT_PROMPT,
    START,
    Figures,
    Report,
    verdict,
    write_report,
)
from serving_models import fitting_layers, make_variants
from transformers import OlmoeConfig

from moeq.checkpoint.reader import CheckpointReader

sys.path.append(str(Path(__file__).resolve().parents[1]))

from perplexity import call
from serving import ServerError, exit_on_sigterm, vllm_server

Generate = Callable[[list[list[int]], int], float]
"""Completes prompts, all at once, by a number of tokens; returns the seconds that it took."""
Start = Callable[[Path, str, Path], AbstractContextManager[Generate]]
"""Starts vLLM with a model, a dtype and a log file; is entered when vLLM is ready."""

MODEL = "OLMoE-1B-7B"
INNER = 1024  # its intermediate size; all else of its shape is the default of OlmoeConfig
LLM_OPTIONS = {
    "max_model_len": 1024,
    "max_num_seqs": 8,
    # vLLM warms up with as many at every start; its thousands take minutes without AVX-512.
    "max_num_batched_tokens": 512,
}
STOP_SECONDS = 30.0


def forget_files(folder: Path) -> None:
    """Drop a checkpoint from the page cache, so that every start reads it from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tree_memory() -> tuple[float, float]:
    """Return the resident memory of all processes below this one in GB: now, and at its peak.

    Shared memory counts once: each process has its share of it (Pss). The peak adds to that what
    each was once larger (VmHWM).
    """
    now = above = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(OSError):  # it has just ended
            now += _kib(process.pid, "smaps_rollup", "Pss")
            above += _kib(process.pid, "status", "VmHWM") - _kib(process.pid, "status", "VmRSS")
    return 1024 * now / 1e9, 1024 * (now + above) / 1e9


def _kib(pid: int, file: str, field: str) -> int:
    text = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0  # a process that is ending has none


def _offline_main(connection: Connection, model: Path, dtype: str, log: Path) -> None:
    """Run prompts with ``vllm.LLM`` until nobody is left to ask."""
    os.setsid()
    with log.open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    from vllm import LLM, SamplingParams

    with connection, suppress(EOFError, BrokenPipeError):
        llm = LLM(
            str(model),
            dtype=dtype,
            **LLM_OPTIONS,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        connection.send("ready")
        while True:
            prompts, tokens = connection.recv()
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
            sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
            started = time.perf_counter()
            llm.generate(inputs, sampling, use_tqdm=False)
            connection.send(time.perf_counter() - started)
    llm.llm_engine.engine_core.shutdown()  # or multiprocessing would wait for it for ever


@contextmanager
def offline(model: Path, dtype: str, log: Path) -> Iterator[Generate]:
    """Run a model with ``vllm.LLM`` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_offline_main, args=(there, model, dtype, log))
    process.start()
    there.close()

    def generate(prompts: list[list[int]], tokens: int) -> float:
        here.send((prompts, tokens))
        return float(here.recv())

    try:
        here.recv()
        yield generate
    except EOFError:
        raise ServerError(f"vllm.LLM ended early, see {log}") from None
    finally:
        here.close()
        process.join(STOP_SECONDS)
        with suppress(ProcessLookupError):  # its workers form one process group with it
            if process.pid is not None:
                os.killpg(process.pid, signal.SIGKILL)
        process.join()


@contextmanager
def serve(model: Path, dtype: str, log: Path) -> Iterator[Generate]:
    """Run a model with ``vllm serve``; every prompt is an HTTP request of its own."""
    arguments = [f"--{name}={value}" for name, value in LLM_OPTIONS.items()]
    arguments += [f"--dtype={dtype}", "--no-enable-prefix-caching", "--skip-tokenizer-init"]
    pool = ThreadPoolExecutor(max(CONCURRENT))
    with pool, vllm_server(model, log, *arguments) as address:

        def generate(prompts: list[list[int]], tokens: int) -> float:
            body = {"model": str(model), "max_tokens": tokens, "ignore_eos": True}
            bodies = [{**body, "prompt": prompt} for prompt in prompts]
            started = time.perf_counter()
            list(pool.map(partial(call, f"{address}/v1/completions"), bodies))
            return time.perf_counter() - started

        yield generate


OFFLINE = "LLM.generate"
MODES: dict[str, Start] = {OFFLINE: offline, "vllm serve": serve}


def measure(
    start: Start, model: Path, dtype: str, log: Path, options: argparse.Namespace
) -> Figures:
    """Start vLLM and measure.

    Decoding is the difference between answers of one token and longer ones, so that neither the
    prompts nor the way to the server count. Both ways sample at temperature 1: greedy answers of
    random weights may repeat one token, and so the same experts, for ever.
    """
    vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]

    def seconds(count: int, length: int, tokens: int) -> float:
        prompts = [[random.randrange(vocabulary) for _ in range(length)] for _ in range(count)]
        return generate(prompts, tokens)

    figures: Figures = {PREFILL: [], **{name: [] for name in DECODE.values()}}
    forget_files(model)
    started = time.perf_counter()
    with start(model, dtype, log) as generate:
        figures[START] = [time.perf_counter() - started]
        figures[MEMORY_READY] = [tree_memory()[0]]
        seconds(max(CONCURRENT), SHORT_PROMPT, 2)  # warms up
        for _ in range(options.repeats):
            length, tokens = options.prompt_tokens, options.new_tokens
            figures[PREFILL].append(length / seconds(1, length, 1))
            for count, name in DECODE.items():
                first = seconds(count, SHORT_PROMPT, 1)
                decoding = seconds(count, SHORT_PROMPT, 1 + tokens) - first
                figures[name].append(count * tokens / decoding)
        now, peak = tree_memory()
    return figures | {MEMORY: [now], MEMORY_PEAK: [peak]}


def kernel(log: Path) -> str:
    """Return vLLM's own words about the kernels of the experts and the dense layers."""
    words = r"moeq (?:experts|linear layers) run on the \S+ kernel|Using \w+Experts MoE backend"
    found = re.findall(words, log.read_text(encoding="utf-8", errors="replace"))
    return ", ".join(sorted(set(found))) or "no word about the kernel"


def measure_all(
    folders: dict[str, Path], work: Path, options: argparse.Namespace
) -> Iterator[Report]:
    """Measure all variants in turns, so that a slower hour of the machine hits all.

    Yields:
        After each round, all figures so far.
    """
    report: Report = {mode: {variant: {} for variant in folders} for mode in options.modes}
    shutil.rmtree(work / "caches", ignore_errors=True)
    for number in range(options.rounds):
        for variant, folder in folders.items():
            # Its own: it shall not profit from what was compiled for the other.
            cache = str(work / "caches" / folder.name)
            dtype = "bfloat16" if variant == BF16 else options.packed_dtype
            os.environ["VLLM_CACHE_ROOT"] = os.environ["MOEQ_CACHE_DIR"] = cache
            for mode in options.modes:
                start = MODES[mode]
                log = log_file(folder, start)
                figures = measure(start, folder, dtype, log, options)
                if number == 0 and mode == OFFLINE:
                    figures[FIRST_START] = figures.pop(START)
                for name, values in figures.items():
                    report[mode][variant].setdefault(name, []).extend(values)
                print(f"== {mode}, {variant}: {kernel(log)}\n{json.dumps(figures)}", flush=True)
        yield report


def log_file(folder: Path, start: Start) -> Path:
    """Return where vLLM's words about a model go."""
    return folder.with_name(f"{folder.name}-{start.__name__}.log")


def main() -> None:
    """Make the models, measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/cpu_serving"), help="folder")
    parser.add_argument("--layers", type=int, help="default: all, or as many as fit")
    parser.add_argument("--config", type=json.loads, default={}, help="changes of OlmoeConfig")
    parser.add_argument(
        "--packed-dtype", default="bfloat16", help="vLLM's --dtype for packed (default bfloat16)"
    )
    parser.add_argument(
        "--dense-bits",
        choices=["8", "4", "8e", "4e"],
        nargs="*",
        default=["8", "4e"],
        help="widths of dense layers, with e of embeddings too, each a model (default 8 4e)",
    )
    available = sorted(os.sched_getaffinity(0))
    # vLLM's scheduler polls all the time, and threads that wait for each other stand still while it
    # has the core of one of them. vLLM by itself leaves a core to it, too.
    parser.add_argument(
        "--no-polling", action="store_true",
        help="run the model in the scheduler's process (VLLM_ENABLE_V1_MULTIPROCESSING=0)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int,
        help="OpenMP threads (default: all cores, but one if vLLM's scheduler polls there)",
    )  # fmt: skip
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both"
    )
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind (default 2)")
    parser.add_argument("--repeats", type=int, default=2, help="in each process (default 2)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="for prefill (default 512)")
    parser.add_argument("--new-tokens", type=int, default=64, help="for decode (default 64)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    exit_on_sigterm()
    polls = not options.no_polling
    cores = available[: options.threads or max(1, len(available) - polls)]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(polls))
    os.environ["OMP_NUM_THREADS"] = str(len(cores))  # vLLM sets it in a process of its own only
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(KV_CACHE_GIB)
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(len(cores))
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)

    changes = {"intermediate_size": INNER} | options.config
    config = OlmoeConfig(architectures=["OlmoeForCausalLM"], dtype="bfloat16", **changes)
    layers = options.layers or fitting_layers(config, work)
    why = "as asked" if options.layers else "as many as fit into memory and disk"
    choice = f"{layers} of {config.num_hidden_layers} layers ({why})"
    config.num_hidden_layers = layers
    shape = MODEL + (f" with {json.dumps(options.config)}" if options.config else "")
    avx512 = "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    title = f"vLLM on a CPU{' with AVX-512' * avx512}: {shape}, "
    title += f"{len(cores)} thread{'s' * (len(cores) > 1)}"
    if not polls:
        title += ", nothing polls"
    if options.packed_dtype != "bfloat16":
        title += f", packed in {options.packed_dtype}"
    print(f"== {shape}, {choice}", flush=True)
    folders = make_variants(config, work, options.dense_bits)
    weights = {
        variant: sum(info.num_bytes for info in CheckpointReader(folder).tensors.values())
        for variant, folder in folders.items()
    }

    start = MODES[options.modes[0]]
    # After each round: a run that is stopped has its figures.
    for rounds, report in enumerate(measure_all(folders, work, options), start=1):
        (work / "figures.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        kernels = (f"{v}: {kernel(log_file(folder, start))}" for v, folder in folders.items())
        set_up = (
            f"The shape of {shape}, random weights, {choice}, on a CPU "
            f"{'with' if avx512 else 'WITHOUT'} AVX-512. vLLM compiled (its default), {len(cores)} "
            f"thread(s), {'' if polls else 'scheduler and model in one process, '}"
            f"{KV_CACHE_GIB} GiB of KV cache, packed with "
            f"`dtype={options.packed_dtype}`, "
            f"{', '.join(f'`{name}={value}`' for name, value in LLM_OPTIONS.items())}, no prefix "
            f"caching. {'; '.join(kernels)}."
        )
        packed = [variant for variant in folders if variant != BF16]
        verdicts = [verdict(report, variant, weights) for variant in packed]
        write_report(report, title, [*verdicts, set_up], rounds, options)


if __name__ == "__main__":
    main()
