"""A SLURM job that trains a run on many machines, and puts itself back in the queue in time."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sanctl.errors import SanctlError, UserError

FOLDER = Path("slurm")
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d(:\d\d)?)?")
_PARTITIONS = re.compile(r"[\w.+-]+(,[\w.+-]+)*")

_HEAD = """\
#!/usr/bin/env bash
# Written by `sanctl slurm`; add here what the cluster wants besides (an account, modules). Submit
# it with sbatch from the folder in which you would train: the one that holds config/ and exp/.
"""
_BODY = r"""
set -u

# The first machine of the job is where all processes meet. Jobs that share it differ in the port.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# srun starts a process for every GPU; each finds its number in SLURM_PROCID and SLURM_LOCALID.
# Where one fails, the others end too. In the background, since bash handles a signal only between
# two commands, or while it waits.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 "${train[@]}" &
processes=$!

# The time is nearly up: have the processes save. They leave at the next step.
time_is_up=no
trap 'time_is_up=yes; kill -USR1 "$processes"' USR1

wait "$processes"
status=$?
if [ "$time_is_up" = yes ]; then
    wait "$processes" # the signal ended the first wait, not the processes
    status=$?
fi

# A process that was asked to save leaves with 138 (128 + 10, SIGUSR1). One that was still leaving
# when srun ended it has another status above 128. Failures of its own (1, 2) are no reason to try
# again, and 0 is the end of the training.
if [ "$status" -eq 138 ] || { [ "$time_is_up" = yes ] && [ "$status" -gt 128 ]; }; then
    echo "back in the queue; the job goes on from what was saved"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


@dataclass(frozen=True)
class Job:
    """What a job asks of SLURM.

    Attributes:
        dataset, name: what is trained, as in `sanctl train DATASET NAME`.
        overrides: settings `SECTION.key=value` of the run.
        nodes: machines.
        gpus_per_node: GPUs of each machine, and so processes on it.
        cpus_per_task: cores for each process, its data workers included.
        time: limit as SLURM writes it (`24:00:00`, `2-12`); None for the partition's.
        partition: where it waits; None for the default one.
    """

    dataset: str
    name: str
    overrides: Sequence[str]
    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    time: str | None
    partition: str | None

    @property
    def path(self) -> Path:
        """The script's file."""
        return FOLDER / f"{self.file_name}.sh"

    @property
    def file_name(self) -> str:
        """Dataset and name without what means something in a path, or to SLURM."""
        return re.sub(r"[^\w.-]", "_", f"{self.dataset}_{self.name}")

    def check(self) -> None:
        """Make sure that the options are such as SLURM takes, and stay on their line.

        Raises:
            UserError: one is not.
        """
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise UserError(
                f"--time {self.time}: no time limit; write minutes, as 90, or 24:00:00, or 2-12:00"
            )
        if self.partition is not None and not _PARTITIONS.fullmatch(self.partition):
            raise UserError(f"--partition {self.partition}: no name of a partition")

    def script(self) -> str:
        """The text of the script."""
        overrides = [word for override in self.overrides for word in ("-o", override)]
        train = [sys.executable, "-m", "sanctl", "train", self.dataset, self.name, *overrides]
        command = shlex.join([*train, "--resume", "auto"])
        return f"{_HEAD}\n{self._options()}\n\ntrain=({command})\n{_BODY}"

    def _options(self) -> str:
        options = {
            "job-name": self.file_name,
            "partition": self.partition,
            "nodes": self.nodes,
            "ntasks-per-node": self.gpus_per_node,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            "output": f"{FOLDER}/{self.file_name}-%j.log",
        }
        lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
        lines += [
            "# One log, also when the job is started again.",
            "#SBATCH --open-mode=append",
            "# It may be put back in the queue: by itself below, or after a machine has failed.",
            "#SBATCH --requeue",
            "# This script (B:) hears of the time limit two minutes before it.",
            "#SBATCH --signal=B:USR1@120",
        ]
        return "\n".join(lines)


def write_script(job: Job, force: bool) -> None:
    """Write the script of a job, with the folder above it.

    Args:
        job: what to write.
        force: replace a script that is there and says something else.

    Raises:
        UserError: an option is wrong, or another script is there.
        SanctlError: it cannot be written.
    """
    job.check()
    path, text = job.path, job.script()
    try:
        if path.exists() and not force and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{path}: exists already, with other options or edited; --force replaces it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SanctlError(f"{path}: cannot be written ({error.strerror})") from error


def submit(script: Path) -> str:
    """Hand a script to SLURM.

    Returns:
        What sbatch says, which names the job.

    Raises:
        UserError: there is no SLURM on this machine.
        SanctlError: sbatch refuses it; the message is its own.
    """
    try:
        done = subprocess.run(
            ["sbatch", str(script)], capture_output=True, text=True, check=False, errors="replace"
        )
    except FileNotFoundError:
        raise UserError(
            f"sbatch: not found on this machine; on one of the cluster's: sbatch {script}"
        ) from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise SanctlError(f"sbatch {script} failed with status {done.returncode}: {said}")
    return done.stdout.strip()
