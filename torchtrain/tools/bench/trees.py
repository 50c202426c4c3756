"""Another commit of this repository, checked out beside it."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtrain.errors import UserError
from torchtrain.installation import PROGRAM


@contextmanager
def other_commit(revision: str) -> Iterator[Path]:
    """Check `revision` out into a temporary folder, and remove that again.

    Raises:
        UserError: this is not a git checkout, or it has no such commit.
    """
    with tempfile.TemporaryDirectory(prefix="torchtrain-against-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--quiet", "--detach", str(tree), revision)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*words: str) -> None:
    try:
        subprocess.run(["git", *words], cwd=PROGRAM, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("--against needs git, and there is none on the PATH") from None
    except subprocess.CalledProcessError as fault:
        raise UserError(f"--against: git {words[0]} failed: {fault.stderr.strip()}") from None
