"""setuptools' command ``bdist_wheel``: a wheel holds the compiled CPU kernel where it can.

The build of a wheel has no torch, so setuptools loads this file by its path, and this file
``build.py`` in the same way: importing the packages around them would import torch.
"""

import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from setuptools.command.bdist_wheel import bdist_wheel


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


def _load(path: Path) -> ModuleType:
    """Import a file by its path; in the copy of the package, its paths are those of the copy."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
