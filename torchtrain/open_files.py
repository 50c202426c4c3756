"""How many files a process may have open, which connections to many ranks take.

A gloo group of R ranks keeps R + 3 files open on each of them, most of them sockets.
"""

import resource

from torchtrain.errors import UserError

GROUP_FILES = 3
"""What a group keeps open beside one file per rank."""
GROUPS = 2
"""Of all ranks, in any run: that of training, and the patient one of the main thread."""
MOST_GROUPS = 5
"""One more is for the thread that saves; those of a mesh have fewer ranks, and cost less than two
of all ranks."""
OTHER_FILES = 512
"""Room for libraries, data, logs, the device and an accelerator's own connections."""
ADVICE = (
    "have the hard limit raised (ulimit -Hn; LimitNOFILE of a systemd service, --ulimit nofile of "
    "a container)"
)


def allow_open_files(ranks: int) -> str | None:
    """Raise this process' soft limit, which its children inherit, to what `ranks` may need.

    Only an administrator can raise the hard limit.

    Returns:
        A warning, or None: the hard limit is high enough.

    Raises:
        UserError: it is too low for any run of so many ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_GROUPS * (ranks + GROUP_FILES) + OTHER_FILES
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return None
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    needed = GROUPS * (ranks + GROUP_FILES)
    if allowed < needed:
        raise UserError(
            f"each of {ranks:,} ranks needs at least {needed:,} open files for its connections to "
            f"the others, and a process may have {hard:,} here: {ADVICE}"
        )
    if allowed == wanted:
        return None
    return (
        f"each of {ranks:,} ranks may need up to {wanted:,} open files, and a process may have "
        f'{hard:,} here: should one fail with "Too many open files", {ADVICE}'
    )
