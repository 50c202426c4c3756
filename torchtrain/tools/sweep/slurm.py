"""A sweep as a Slurm array: a script that runs each run as one job of one node."""

import os
import shlex
import sys
from pathlib import Path

import torchtrain
from torchtrain.errors import TRY_AGAIN, UserError
from torchtrain.tools.sweep.plan import Sweep
from torchtrain.tools.sweep.running import ELSEWHERE
from torchtrain.utils import make_folder, write_durably, writing

CORES_PER_GPU = 8
"""As in slurm/train.sbatch; what stands on sbatch's command line goes before it."""
SCRIPT = """\
#!/bin/bash
# Written by python -m torchtrain.tools.sweep {file} --slurm. What your cluster needs beside it goes
# on the command line: sbatch --time=... --partition=... {script}
#SBATCH --job-name={job}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node={processes}
#SBATCH --cpus-per-task={cores}
#SBATCH --requeue
#SBATCH --signal=B:USR2@300
#SBATCH --open-mode=append
#SBATCH --output={output}

runs=(
{names}
)
cd {here} || exit 1
export NGPU={processes}
export PYTHONPATH={package}${{PYTHONPATH:+:$PYTHONPATH}}
{python} -m torchtrain.tools.sweep {file} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}" &
sweep=$!

# Slurm tells this shell that the end is near; the run saves and stops. Where it has just ended
# there is nobody to tell.
asked=
trap 'asked=USR2; kill -USR2 "$sweep" || true' USR2
trap 'asked=TERM; kill -TERM "$sweep" || true' TERM
while kill -0 "$sweep" 2>/dev/null; do
    wait "$sweep" # a signal ends this, too
done
wait "$sweep"
status=$?

# {try_again}: the run has seen that its time ends. 140: it was told so. It goes on in another job.
# {elsewhere}: another job has it, and no further one is needed.
if [ "$status" = {try_again} ] || {{ [ "$status" = 140 ] && [ "$asked" = USR2 ]; }}; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$status"
"""


def write_script(sweep: Sweep, processes: int) -> Path:
    """Write the script into the sweep's folder, and return where it is.

    Args:
        sweep: checked for so many ranks.
        processes: per run, on the GPUs of one node.

    Raises:
        UserError: the folder cannot be written, or Slurm could not read its name.
    """
    script = sweep.folder / "sweep.sbatch"
    output = str(Path(sweep.folder).absolute() / "slurm-%A_%a.log")
    if any(character.isspace() for character in output):
        raise UserError(f"folder = {str(sweep.folder)!r}: Slurm takes no spaces in a log's name")
    text = SCRIPT.format(
        file=shlex.quote(str(sweep.file)),
        script=shlex.quote(str(script)),
        job=sweep.file.stem.replace(" ", "-"),
        last=len(sweep.runs) - 1,
        processes=processes,
        output=output,
        names="\n".join(f"    {shlex.quote(run.name)}" for run in sweep.runs),
        here=shlex.quote(os.getcwd()),
        package=shlex.quote(str(Path(torchtrain.__file__).parents[1])),
        python=shlex.quote(sys.executable),
        try_again=TRY_AGAIN,
        elsewhere=ELSEWHERE,
        cores=CORES_PER_GPU * processes,
    )
    with writing(script):
        make_folder(sweep.folder)
        write_durably(script, text)
    return script
