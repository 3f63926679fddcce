"""The hidden folder in which one run alone works on an output, until that is complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moeq.checkpoint.atomic import check_output_is_free, sync_file, sync_folder
from moeq.checkpoint.disk_errors import disk_errors
from moeq.checkpoint.lock import locked
from moeq.checkpoint.resume import REMOVED, remove
from moeq.checkpoint.temporary import used_bytes
from moeq.errors import MoeqError


@dataclass(frozen=True, slots=True)
class Workspace:
    """A hidden folder beside an output, for one run alone.

    Attributes:
        output: Folder to create.
        plan: What is finished of a measured plan.
        calibration: Layers that a calibration has finished.
        partial: The output, until it is complete.
    """

    output: Path
    plan: Path
    calibration: Path
    partial: Path

    @classmethod
    @contextmanager
    def open(cls, output: Path, resume: bool) -> Iterator["Workspace"]:
        """Keep other runs away from an output.

        Args:
            output: Folder to create.
            resume: Keep what an unfinished run has left; otherwise it is removed.

        Raises:
            MoeqError: ``output`` exists, another run is writing it, or its folder is not to be
                written.
        """
        check_output_is_free(output)
        folder = output.with_name(f".{output.name}.moeq")
        workspace = cls(output, folder / "plan", folder / "calibration", folder / "output")
        busy = f"another `moeq quantize` is writing {output}"
        with disk_errors(f"cannot write {folder}"), locked(folder, busy):
            with disk_errors(f"cannot remove what an earlier run left in {folder}"):
                for path in folder.glob(f"*{REMOVED}"):
                    shutil.rmtree(path)
                workspace.clear(workspace.partial)
                if not resume:
                    workspace.clear()
                for path in folder.rglob("*"):  # half-written: ours, and those of safetensors
                    if path.suffix == ".unfinished" or path.name.startswith(".tmp"):
                        path.unlink()
            try:
                yield workspace
            finally:
                shutil.rmtree(workspace.partial, ignore_errors=True)
                for left in (workspace.plan, workspace.calibration):
                    with suppress(OSError):  # it is not empty: there is something to go on with
                        left.rmdir()

    def check_space(self, needed: int) -> None:
        """Check that the disk can take so many bytes.

        Raises:
            MoeqError: It cannot; says how much is missing.
        """
        # What an unfinished run left is either gone on with or removed.
        needed -= used_bytes(self.plan.parent)
        parent = self.output.parent
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise MoeqError(
                f"cannot write {self.output}: it takes {needed:,} bytes, {parent} has {free:,} "
                "bytes free"
            )

    def publish(self) -> None:
        """Make the output appear, all at once, and remove everything else.

        Raises:
            MoeqError: ``output`` has appeared meanwhile; or it is complete, but the disk has failed
                since.
            OSError: The disk fails before that.
        """
        sync_folder(self.partial)
        check_output_is_free(self.output)
        self.partial.rename(self.output)
        try:
            sync_file(self.output.parent)
            self.clear()
        except OSError as error:
            raise MoeqError(
                f"{self.output} is complete, but the disk has failed since: {error}. Check it with "
                f"`moeq verify`, and remove {self.partial.parent}"
            ) from error

    def clear(self, *folders: Path) -> None:
        """Remove what an earlier run has left: in these folders, or else in all."""
        for folder in folders or (self.plan, self.calibration, self.partial):
            if folder.exists():
                remove(folder)
