"""Packs the wheels of vLLM for CUDA, and of what it needs, into one file for a GPU machine.

    gpu_bundle.py WHEELS BUNDLE         WHEELS: a folder; BUNDLE: a .tar.xz to be written

What an H100 or H200 does not run is left out, or emptied, so that 304 MB become some 50. The plugin
of this clone is announced to vLLM, which finds it by an installed package's entry points.
"""

import struct
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from re import compile as pattern
from typing import NamedTuple
from zipfile import ZipFile

from vllm_moeq._version import __version__

LARGEST_BUNDLE = 60 * 1000 * 1000
ARCHITECTURE = 90
"""Compute capability of the GPUs."""
LEFT_OUT = pattern(
    r"/vllm_flash_attn/.*\.so$|/_(flashmla|qutlass|rust_tool)\w*\.abi3\.so$|^vllm/vllm-rs$"
    r"|^vllm/third_party/(fmha_sm100/|.*\.so$|deep_gemm/include/cut)|^vllm/grpc/"
    r"|fused_moe/configs/(?!.*NVIDIA_H[12]00)|^mistral_common/data/|^pycountry/locales/"
    r"|^tvm_ffi/3rdparty/|/tests?/|\.pyi$|\.map$"
)
"""FlashAttention and other libraries of kernels that are not measured, a server in Rust, sources of
CUTLASS, tiles for other GPUs, data that is read when it is asked for."""
EMPTIED = ("vllm/_C_stable_libtorch.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so")
"""Libraries with code for many GPUs."""
STAND_IN = "vllm/vllm_flash_attn/_vllm_fa2_C.py"
"""An empty module instead of FlashAttention's library, which vLLM imports even if another attention
backend is chosen."""

_MAGIC = struct.pack("<I", 0xBA55ED50)
_PTX, _MACHINE_CODE = 1, 2


class _Code(NamedTuple):
    """Code for one GPU in a fat binary: its kind, compute capability, and where it lies."""

    kind: int
    architecture: int
    place: int
    size: int


def keep_architecture(library: bytes, architecture: int = ARCHITECTURE) -> bytes:
    """Empty the code that a GPU does not run in a library compiled by nvcc.

    The library keeps its length, so nothing in it moves; what is empty compresses to nothing. Of a
    fat binary without machine code for the GPU the newest PTX that it can compile stays.

    Args:
        library: An ELF file.
        architecture: Compute capability without the point.
    """
    result = bytearray(library)
    for binary in _fat_binaries(library):
        exact = [c for c in binary if (c.kind, c.architecture) == (_MACHINE_CODE, architecture)]
        older = [c for c in binary if c.kind == _PTX and c.architecture <= architecture]
        kept = exact or sorted(older, key=lambda code: code.architecture)[-1:]
        for code in binary:
            if code not in kept:
                result[code.place : code.place + code.size] = bytes(code.size)
    return bytes(result)


def _fat_binaries(library: bytes) -> Iterator[list[_Code]]:
    """Yield what each fat binary has: a header of 16 bytes, then code with a header each."""
    place = library.find(_MAGIC)
    while place >= 0:
        version, header, size = struct.unpack_from("<HHQ", library, place + 4)
        end = place + header + size
        if version != 1 or header != 16 or end > len(library):  # chance, not a fat binary
            place = library.find(_MAGIC, place + 1)
            continue
        entry, found = place + header, []
        while entry < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", library, entry)
            (architecture,) = struct.unpack_from("<I", library, entry + 28)
            found.append(_Code(kind, architecture, entry + header, size))
            entry += header + size
        yield found
        place = library.find(_MAGIC, end)


def unpack(wheel: Path, site: Path) -> None:
    """Extract what is needed of a wheel; programs stay programs."""
    with ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.is_dir() or LEFT_OUT.search(member.filename):
                continue
            path = Path(archive.extract(member, site))
            if member.filename in EMPTIED:
                path.write_bytes(keep_architecture(path.read_bytes()))
            if mode := member.external_attr >> 16:  # Humming brings a program that it runs
                path.chmod(mode & 0o777)


def announce_plugin(site: Path, root: Path) -> None:
    """Write what vLLM finds the plugin by, as an installation of the clone ``root`` would."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = site / f"vllm_moeq-{__version__}.dist-info"
    folder.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: vllm-moeq\nVersion: {__version__}\n"
    (folder / "METADATA").write_text(metadata, encoding="utf-8")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Pack all wheels of a folder."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    wheels, bundle = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as work:
        site = Path(work)
        for wheel in sorted(wheels.glob("*.whl")):
            unpack(wheel, site)
        stand_in = site / STAND_IN
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.touch()
        announce_plugin(site, Path(__file__).parents[2])
        bundle.parent.mkdir(parents=True, exist_ok=True)
        part = bundle.with_name(f"{bundle.name}.part")
        with tarfile.open(part, "w:xz", preset=9) as archive:
            archive.add(site, ".")
    size = part.stat().st_size
    if size > LARGEST_BUNDLE:
        part.unlink()
        sys.exit(f"gpu_bundle.py: the bundle has {size} bytes, more than {LARGEST_BUNDLE}")
    part.replace(bundle)
    print(f"wrote {bundle}, {size} bytes")


if __name__ == "__main__":
    main()
