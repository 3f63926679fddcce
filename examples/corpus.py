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


def documents() -> list[str]:
    """Return all documents in a fixed order: manual topics first, then docstrings by file."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if "site-packages" in parts or "test" in parts or "tests" in parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # lib2to3 keeps files that are broken on purpose
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= _SHORTEST:
                    texts.append(text)
    return list(dict.fromkeys(texts))


def source_code() -> str:
    """Return the modules at the top of Python's library, in a fixed order."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)


def c_headers() -> str:
    """Return the headers of Python's C interface, in a fixed order; empty if there are none."""
    paths = sorted(Path(sysconfig.get_path("include")).rglob("*.h"))
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)


def split() -> tuple[list[str], list[str]]:
    """Return (training documents, held-out documents)."""
    texts = documents()
    held_out = texts[::_HELD_OUT_EVERY]
    kept = set(held_out)
    return [text for text in texts if text not in kept], held_out


if __name__ == "__main__":
    print("\n\n".join(split()[0 if "--training" in sys.argv else 1]))
