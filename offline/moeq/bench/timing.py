"""Times the contenders, one call of each in turn."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from moeq.bench.contenders import Contender
from moeq.bench.machine import Machine, Memory
from moeq.bench.settings import Settings, Shape

_SEED = 0


@dataclass(frozen=True, slots=True)
class Round:
    """One call of every contender with the same tokens and the same routing.

    Attributes:
        experts: Those that the routing touches.
        seconds: What each contender took.
    """

    experts: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured, on what.

    Attributes:
        settings: What was asked for.
        machine: Where.
        activations: Precision of activations inside our kernel.
        reader: What read memory for ``bandwidths``.
        bandwidths: GB/s of reading memory, before, between and after the rounds.
        contenders: In the order of ``Round.seconds``.
        rounds: All rounds for each number of tokens.
    """

    settings: Settings
    machine: Machine
    activations: str
    reader: str
    bandwidths: list[float]
    contenders: list[Contender]
    rounds: dict[int, list[Round]]


@torch.inference_mode()
def measure(settings: Settings, machine: Machine, contenders: Sequence[Contender]) -> Measurement:
    """Time the contenders; changes the number of threads that torch uses.

    Args:
        settings: What to measure.
        machine: Where.
        contenders: Made by :func:`moeq.bench.prepare` for the same shape and widths.
    """
    torch.set_num_threads(settings.threads)
    generator = torch.Generator().manual_seed(_SEED)
    memory = Memory(machine.functions)
    bandwidths = memory.bandwidths()
    rounds: dict[int, list[Round]] = {}
    total = settings.runs * len(settings.tokens)
    with tqdm(total=total, desc="measure", unit="round", disable=None) as progress:
        for tokens in settings.tokens:
            rounds[tokens] = []
            for done in _rounds(settings, tokens, contenders, memory, generator):
                rounds[tokens].append(done)
                progress.update()
            bandwidths += memory.bandwidths()
    return Measurement(
        settings=settings,
        machine=machine,
        activations=machine.activations,
        reader=memory.reader,
        bandwidths=bandwidths,
        contenders=list(contenders),
        rounds=rounds,
    )


def _rounds(
    settings: Settings,
    tokens: int,
    contenders: Sequence[Contender],
    memory: Memory,
    generator: torch.Generator,
) -> Iterator[Round]:
    inputs = draw_inputs(settings.shape, tokens, generator)
    for contender in contenders:
        contender.run(*inputs)
    for index in range(settings.runs):
        inputs = draw_inputs(settings.shape, tokens, generator)
        seconds = [0.0] * len(contenders)
        # Each round starts with another one: no contender always follows the same state of the
        # machine.
        for turn in range(len(contenders)):
            place = (index + turn) % len(contenders)
            memory.flush()
            start = time.perf_counter()
            contenders[place].run(*inputs)
            seconds[place] = time.perf_counter() - start
        yield Round(tuple(set(inputs[2].flatten().tolist())), tuple(seconds))


def draw_inputs(
    shape: Shape, tokens: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw tokens, and for each of them different experts, all equally likely.

    Returns:
        What :data:`moeq.bench.contenders.RunExperts` takes.
    """
    x = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
    chosen = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k)
    return x, chosen.values.softmax(-1), chosen.indices.int()
