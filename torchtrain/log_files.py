"""What a run logs into its folder, and a disk that is full meanwhile.

A run does not end for want of a log line. A line that cannot be written waits in memory until there
is room again; TensorBoard's files end where they cannot be written.
"""

import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torchtrain.config.schema import Metrics
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import (
    describe_os_error,
    expand_user,
    fsync_folder,
    import_package,
    plural,
    require_package,
    write_durably,
    writing,
)

ASKS_FOR_WANDB = "metrics.enable_wandb = true"


class LogFile:
    """A file to which lines are added, each whole or not at all.

    Raises:
        UserError: it cannot be written at the start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []
        """Lines that could not be written yet."""
        if path.exists():
            with writing(path):
                open(path, "ab").close()

    def append(self, lines: Iterable[str]) -> None:
        """Write those that wait, and then these; say once if it cannot be done."""
        waited = len(self.waiting)
        self.waiting += lines
        try:
            _append_whole(self.path, "".join(f"{line}\n" for line in self.waiting).encode())
        except OSError as fault:
            if not waited:
                logger.warning(
                    f"{self.path} cannot be written: {describe_os_error(fault)}. Training goes on, "
                    "and the lines wait in memory until there is room"
                )
            return
        self.waiting.clear()
        if waited:
            logger.info(f"{self.path} can be written again: {plural(waited, 'line')} had waited")

    def amend(self, change: Callable[[str], str]) -> None:
        """Change the last line, all of it or nothing."""
        try:
            *before, last = self.path.read_text("utf-8", "surrogateescape").splitlines()
            write_durably(self.path, "".join(f"{line}\n" for line in [*before, change(last)]))
        except OSError as fault:
            logger.warning(f"{self.path} cannot be amended: {describe_os_error(fault)}")

    def sync(self) -> None:
        """Make safe from a power cut what was appended."""
        if self.waiting:
            self.append(())
        if not self.path.exists():
            return
        try:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())
            fsync_folder(self.path.parent)
        except OSError as fault:
            logger.warning(f"{self.path} cannot be synced: {describe_os_error(fault)}")

    def close(self) -> None:
        """Try once more to write the lines that wait, and say how many are lost."""
        if self.waiting:
            self.append(())
        if self.waiting:
            lost = plural(len(self.waiting), "line")
            logger.warning(f"{self.path} lacks its last {lost}, which could not be written")


def _append_whole(path: Path, data: bytes) -> None:
    """Append `data`; where only a part can be written, take that back.

    A half line would be the beginning of the next one.
    """
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


class TensorBoard:
    """TensorBoard's files of one process of a run.

    Args:
        run_folder: `job.dump_folder`.
        name: of the folder in it.
        first_step: what was written of it and later steps is hidden.

    Raises:
        UserError: they cannot be written at the start.
    """

    def __init__(self, run_folder: Path, name: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = run_folder / expand_user(name)
        _keep_quiet_about_its_thread()
        with writing(self.folder):
            # purge_step hides what an interrupted run wrote past the step it resumes from: one
            # curve, no doubling back.
            self.writer: Any = SummaryWriter(str(self.folder), purge_step=first_step)
            self.writer.flush()

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write numbers by their tags."""
        with self._ending_on_fault():
            for tag, value in scalars.items() if self.writer is not None else ():
                self.writer.add_scalar(tag, value, step)

    def add_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write texts, which are Markdown, by their tags."""
        with self._ending_on_fault():
            for tag, value in texts.items() if self.writer is not None else ():
                self.writer.add_text(tag, value, step)

    @contextmanager
    def _ending_on_fault(self) -> Iterator[None]:
        try:
            yield
            if self.writer is not None:
                self.writer.flush()  # a killed run then lacks nothing up to its last checkpoint
        except OSError as fault:  # its thread has ended, and writes nothing any more
            self.writer = None
            logger.warning(
                f"{self.folder} cannot be written: {describe_os_error(fault)}. Training goes on, "
                "and TensorBoard's curves end here until the run is resumed"
            )

    def close(self) -> None:
        """Write out what is buffered."""
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()


def _keep_quiet_about_its_thread() -> None:
    """Print no traceback of an OSError in TensorBoard's thread: the next flush raises it."""
    show = threading.excepthook

    def show_others(fault: threading.ExceptHookArgs) -> None:
        is_its = type(fault.thread).__module__.startswith("tensorboard.")
        if not (is_its and isinstance(fault.exc_value, OSError)):
            show(fault)

    threading.excepthook = show_others


def check_packages(section: Metrics) -> None:
    """Check that TensorBoard and Weights & Biases can be used.

    Raises:
        UserError: the package is missing, or Weights & Biases finds no key of the user.
    """
    if section.enable_tensorboard:
        require_package("tensorboard", "metrics.enable_tensorboard = true")
    if section.enable_wandb:
        wandb = import_package("wandb", ASKS_FOR_WANDB)
        try:
            wandb.login()  # which knows all the places of a key, and asks for none offline
        except wandb.Error as fault:
            raise UserError(
                f"{ASKS_FOR_WANDB}: {fault} Or set WANDB_API_KEY, or WANDB_MODE=offline"
            ) from fault


def open_wandb(run_folder: Path, description: Mapping[str, Any]) -> Any:
    """Open the run at Weights & Biases; the same folder goes on with the same run's curves.

    Args:
        run_folder: where `wandb/` goes, with the run's id.
        description: what the run's page says of it.

    Raises:
        UserError: it cannot be opened.
    """
    wandb = import_package("wandb", ASKS_FOR_WANDB)
    folder = run_folder / "wandb"
    id_file = folder / "run-id"
    with writing(id_file):
        folder.mkdir(exist_ok=True)
        if not id_file.exists():
            write_durably(id_file, uuid.uuid4().hex)
    try:  # project, entity and mode come from WANDB_* variables
        return wandb.init(
            dir=str(run_folder),
            id=id_file.read_text(),
            resume="allow",
            config=dict(description),
        )
    except wandb.Error as fault:
        raise UserError(f"{ASKS_FOR_WANDB}: {fault}") from fault
