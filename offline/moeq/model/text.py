"""Text for calibration and evaluation, cut into sequences of tokens."""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from moeq.checkpoint.reader import read_json
from moeq.checkpoint.servable import text_config
from moeq.errors import MoeqError
from moeq.model.sequences import SourceAndTarget

logger = logging.getLogger(__name__)

DEFAULT_TEXT = "default"
"""Stands for text that every Python has: the reference manual inside ``pydoc``."""

_HUB_ROWS = 20_000  # of a dataset that are read at most


def read_texts(source: str) -> dict[str, str]:
    """Return texts by name.

    Args:
        source: ``default``; a text file; a folder of text files (``*.txt``, ``*.md``); a
            ``.jsonl`` file whose lines have a field "text"; or a dataset of the hub, whose split
            "train" has a column "text".

    Raises:
        MoeqError: It is none of these, or holds no text; names it.
    """
    path = Path(source)
    if source == DEFAULT_TEXT:
        from pydoc_data.topics import topics

        texts = {"default": "\n\n".join(topics[name] for name in sorted(topics))}
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".md"))
        stems = [file.stem for file in files]
        texts = {
            file.name if stems.count(file.stem) > 1 else file.stem: _read(file) for file in files
        }
    elif path.suffix == ".jsonl":
        texts = {path.stem: "\n\n".join(_json_lines(path))}
    elif path.is_file():
        texts = {path.stem: _read(path)}
    else:
        texts = {source: "\n\n".join(_hub_dataset(source))}
    if not any(text.strip() for text in texts.values()):
        raise MoeqError(f"{source} holds no text")
    return texts


def calibration_sequences(
    folder: Path, source: str, count: int, length: int, seed: int
) -> torch.Tensor:
    """Return int64 [n, length]: sequences drawn from a text without overlap, n <= count.

    Texts that are too short for one are left out, and named in a warning. Of a model with an
    encoder they are sources and targets: pairs, if the text is a ``.jsonl`` file of such, cut or
    filled; else a text and how it goes on. See :mod:`moeq.model.sequences`.

    Args:
        folder: A checkpoint, for its tokenizer.
        source: As :func:`read_texts` takes it.
        count: Sequences wanted; fewer come back if the text is too short for them.
        length: Tokens of each.
        seed: Of the draw.

    Raises:
        MoeqError: All texts are too short, or the checkpoint has no tokenizer.
    """
    windows = _windows_of_texts(folder, source, length)
    return _drawn(torch.cat(list(windows.values())), count, seed)


def evaluation_sequences(
    folder: Path, source: str, count: int, length: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return for each text int64 [n, length]: sequences without overlap, n <= count.

    Arguments and errors as those of :func:`calibration_sequences`.
    """
    windows = _windows_of_texts(folder, source, length)
    return {name: _drawn(sequences, count, seed) for name, sequences in windows.items()}


def _drawn(windows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)[:count]]


def _tokens(folder: Path, texts: Iterable[str], special: bool) -> list[torch.Tensor]:
    """Return the tokens of texts, int64 [T] each, with or without those of the tokenizer itself."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return [
            torch.tensor(
                tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"],
                dtype=torch.int64,
            )
            for text in texts
        ]
    except Exception as error:  # whatever its files lead to inside transformers and tokenizers
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise MoeqError(
            f"{folder}: cannot read its tokenizer, which text needs: {reason}"
        ) from error


def tokenized(folder: Path, texts: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return the tokens of texts, int64 [T] each.

    Raises:
        MoeqError: The checkpoint has no tokenizer that transformers can read.
    """
    return dict(zip(texts, _tokens(folder, texts.values(), special=False), strict=True))


def _windows_of_texts(folder: Path, source: str, length: int) -> dict[str, torch.Tensor]:
    """Cut every text into sequences int64 [n, length]; leave out those that have none."""
    config = read_json(folder / "config.json")
    sequences = _sequences(folder, SourceAndTarget.of(config), source, length)
    known = text_config(config).get("vocab_size")
    largest = max(int(tokens.max()) for tokens in sequences.values())
    if isinstance(known, int) and largest >= known:
        raise MoeqError(
            f"{folder}: the tokenizer gives the token {largest}, but the model has {known} of them "
            "(vocab_size in config.json): get the files of its tokenizer again"
        )
    return sequences


def _sequences(
    folder: Path, parts: SourceAndTarget | None, source: str, length: int
) -> dict[str, torch.Tensor]:
    if parts is not None:
        pairs = _pairs(Path(source))
        if pairs:
            return {Path(source).stem: _joined(folder, parts, pairs, length)}
        parts.source_length(length)  # first, whether it is long enough
        texts = _windows(folder, source, length - 1)
        return {name: parts.split(windows) for name, windows in texts.items()}
    return _windows(folder, source, length)


def _joined(
    folder: Path, parts: SourceAndTarget, pairs: list[tuple[str, str]], length: int
) -> torch.Tensor:
    """Return the sequences of pairs, with the special tokens that the tokenizer adds to each."""
    texts = [text for pair in pairs for text in pair]
    tokens = [ids.tolist() for ids in _tokens(folder, texts, special=True)]
    sequences = [
        parts.joined(*pair, length) for pair in zip(tokens[::2], tokens[1::2], strict=True)
    ]
    return torch.tensor(sequences, dtype=torch.int64)


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Return pairs of ``source`` and ``target`` of a ``.jsonl`` file; none if it has texts instead.

    Raises:
        MoeqError: A line lacks one of them, or they are no text; names it.
    """
    if path.suffix != ".jsonl" or not path.is_file():
        return []
    pairs: list[tuple[str, str]] = []
    for number, row in _rows(path):
        # Texts of a corpus may have a "source", too: where they come from.
        if not pairs and ("text" in row or not {"source", "target"} & row.keys()):
            return []
        source, target = row.get("source"), row.get("target")
        if not all(isinstance(text, str) and text.strip() for text in (source, target)):
            raise MoeqError(f'{path}, line {number}: "source" and "target" must both be text')
        pairs.append((str(source), str(target)))
    return pairs


def _windows(folder: Path, source: str, length: int) -> dict[str, torch.Tensor]:
    windows = {
        name: tokens[: len(tokens) // length * length].view(-1, length)
        for name, tokens in tokenized(folder, read_texts(source)).items()
    }
    short = [name for name, sequences in windows.items() if not len(sequences)]
    if len(short) == len(windows):
        raise MoeqError(
            f"{source}: no text in it has the {length} tokens of one sequence; give more text or a "
            "smaller `seqlen`"
        )
    if short:
        names = ", ".join(short[:5]) + (", ..." if len(short) > 5 else "")
        logger.warning(
            "%s: %d of %d texts left out, for they have less than the %d tokens of one sequence: "
            "%s", source, len(short), len(windows), length, names,
        )  # fmt: skip
    return {name: sequences for name, sequences in windows.items() if len(sequences)}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoeqError(f"cannot read the text {path}: {error}") from error


def _json_lines(path: Path) -> Iterator[str]:
    for number, row in _rows(path):
        text = row.get("text")
        if not isinstance(text, str):
            raise MoeqError(f'{path}, line {number}: no JSON object with a string "text"')
        yield text


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the JSON objects of a file, with the numbers of their lines; others are empty."""
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # halves of characters are no text
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else {}


def _hub_dataset(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise MoeqError(
            f"{name} is no file or folder here; for a dataset of the hub, pip install datasets"
        ) from error
    try:
        rows = load_dataset(name, split="train", streaming=True)
        texts = [row["text"] for row, _ in zip(rows, range(_HUB_ROWS), strict=False)]
    except (OSError, ValueError, KeyError) as error:
        raise MoeqError(f"{name} is no dataset with a column text: {error}") from error
    yield from texts
