"""setuptools' commands: a wheel holds the compiled CPU kernel where it can.

The same sources, with the same modes, give the same bytes, wherever, when and by whom they are
built. Files bear the time ``SOURCE_DATE_EPOCH``; where that is not set, the first of a zip file.

The build of a wheel has no torch, so setuptools loads this file by its path, and this file
``build.py`` in the same way: importing the packages around them would import torch.
"""

import gzip
import os
import shutil
import tarfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

_TIME = os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")  # which bdist_wheel reads, too


class Sdist(sdist):
    """Leaves out of the archive who built it, and when."""

    def make_archive(
        self, base_name: str, format: str, root_dir: str | None = None,
        base_dir: str | None = None, owner: str | None = None, group: str | None = None,
    ) -> str:  # fmt: skip
        """Write a folder to an archive; return its name."""
        if format != "gztar":
            return str(super().make_archive(base_name, format, root_dir, base_dir, owner, group))
        name = f"{base_name}.tar.gz"
        with (
            open(name, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(_TIME)) as compressed,
            tarfile.open(fileobj=compressed, mode="w") as archive,
        ):
            archive.add(base_dir or os.curdir, filter=_anonymous)
        return name


class BdistWheel(bdist_wheel):
    """Adds the kernel compiled for every instruction set; without a compiler, the wheel is pure.

    A compiler that fails leads to a pure wheel too: the kernel is then compiled at first use, or
    the reference kernel takes its place, and one warning tells why.
    """

    def run(self) -> None:
        """Build the wheel."""
        self.run_command("build")
        package = __name__.split(".")[:-1]
        build = _load(Path(self.get_finalized_command("build").build_lib, *package, "build.py"))
        shutil.rmtree(build.PREBUILT, ignore_errors=True)  # of an earlier build in this folder
        try:
            build.compile_packaged()
        except build.BuildError as error:
            shutil.rmtree(build.PREBUILT, ignore_errors=True)
            self.warn(f"this wheel has no compiled CPU kernel: {error}")
        else:
            # Two places ask: this command, and `install`, which it runs.
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag: any Python 3 can call the kernel, since ctypes does."""
        _, _, platform = super().get_tag()
        return self.python_tag, "none", platform


def _anonymous(file: tarfile.TarInfo) -> tarfile.TarInfo:
    file.uid = file.gid = 0
    file.uname = file.gname = ""
    file.mtime = int(_TIME)
    return file


def _load(path: Path) -> ModuleType:
    """Import a file by its path; in the copy of the package, its paths are those of the copy."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
