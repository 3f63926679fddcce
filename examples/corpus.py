"""English text that every Python has: the reference manual of ``pydoc`` and stdlib docstrings.

python examples/corpus.py > heldout.txt            # the part that training never sees
python examples/corpus.py --training > text.txt    # the rest
"""

import ast
import sys
import sysconfig
from pathlib import Path

_HELD_OUT_EVERY = 20
"""One document in so many is held out."""
_SHORTEST = 200
"""Characters below which a docstring is not worth training on."""


def manual() -> list[str]:
    """Return the topics of the manual, which `moeq quantize` calibrates with by default."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def library_files() -> list[Path]:
    """Return the files of the standard library without its tests, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    return [
        path
        for path in sorted(library.rglob("*.py"))
        if not {"site-packages", "test", "tests"} & {*path.relative_to(library).parts}
    ]


def docstrings() -> list[str]:
    """Return the docstrings of the standard library in a fixed order, by file."""
    texts = []
    for path in library_files():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # lib2to3 keeps files that are broken on purpose
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= _SHORTEST:
                    texts.append(text)
    return texts


def split() -> tuple[list[str], list[str]]:
    """Return (training documents, held-out documents), in a fixed order.

    Nothing of the manual is held out: what judges a model must not be what it was calibrated with.
    """
    topics = manual()
    others = [text for text in dict.fromkeys(docstrings()) if text not in set(topics)]
    held_out = others[::_HELD_OUT_EVERY]
    kept = set(held_out)
    return [text for text in (*topics, *others) if text not in kept], held_out


if __name__ == "__main__":
    print("\n\n".join(split()[0 if "--training" in sys.argv else 1]))
