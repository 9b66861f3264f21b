"""The script for SLURM: what it asks for, and what it does on a stand-in cluster.

The stand-ins are programs on PATH: `srun` runs one process, which gets the signals that srun would
pass on; `scontrol` and `sbatch` note how they were called.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from tiny_run import Place, environment

SCRIPT = Path("slurm/shapes_tiny.sh")
CALLS = "calls.txt"
STAND_INS = {
    # Notes the options and the meeting point, then runs $TRAINING, or else what it was given.
    "srun": """
        while [[ $1 == --* ]]; do options+=("$1"); shift; done
        echo "srun ${options[*]} at $MASTER_ADDR:$MASTER_PORT" >> "$CALLS"
        printf '%s\\n' "$@" > "$CALLS.arguments"
        if [ -n "$TRAINING" ]; then exec bash -c "$TRAINING"; fi
        exec "$@"
    """,
    "scontrol": """
        echo "scontrol $*" >> "$CALLS"
        if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; fi
    """,
    "sbatch": """
        echo "sbatch $*" >> "$CALLS"
        if [ -n "$REFUSAL" ]; then echo "$REFUSAL" >&2; exit 1; fi
        echo Submitted batch job 42
    """,
}


class Cluster:
    """A folder with a script of the command, and the programs that the script calls."""

    def __init__(self, place: Place) -> None:
        self.folder = place.folder
        self.bin = place.folder / "bin"
        self.bin.mkdir()
        for name, text in STAND_INS.items():
            (self.bin / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (self.bin / name).chmod(0o755)

    def start(self, training: str = "") -> subprocess.Popen[str]:
        """Start the job, as SLURM does on its first machine."""
        job = {
            "CALLS": str(self.folder / CALLS),
            "TRAINING": training,
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_CPUS_PER_TASK": "8",
            "PATH": f"{self.bin}:{os.environ['PATH']}",
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT)],
            cwd=self.folder,
            env=environment() | job,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def calls(self) -> list[str]:
        return (self.folder / CALLS).read_text().splitlines()


@pytest.fixture
def cluster(place: Place) -> Cluster:
    return Cluster(place)


def write(place: Place, *options: str) -> str:
    status, out, err = place.main("slurm", "shapes", "tiny", *options)
    assert (status, err) == (0, "")
    assert out == f"wrote {SCRIPT}\nnext: sbatch {SCRIPT}\n"
    return (place.folder / SCRIPT).read_text()


def wait_for(path: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists(), job.communicate()[0]


def requeued(cluster: Cluster) -> bool:
    return cluster.calls()[2:] == ["scontrol requeue 123456"]


def test_the_options_stand_in_the_script(place: Place) -> None:
    options = ("--nodes", "2", "--gpus-per-node", "8", "--cpus-per-task", "12")
    text = write(place, *options, "--time", "2-12:00", "--partition", "gpu,long")
    asked = {line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line}
    assert asked == {
        *("--job-name=shapes_tiny", "--output=slurm/shapes_tiny-%j.log", "--open-mode=append"),
        *("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12"),
        *("--time=2-12:00", "--partition=gpu,long", "--requeue", "--signal=B:USR1@120"),
    }


def test_what_is_not_asked_for_is_left_to_the_cluster(place: Place) -> None:
    text = write(place)
    assert "--time" not in text
    assert "--partition" not in text


def test_the_script_is_good_bash(place: Place) -> None:
    write(place, "-o", "TRAIN.save_path=it's `here` $HOME\n#SBATCH --nodes=9")
    path = place.folder / SCRIPT
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity", "warning", path], check=True)


def test_overrides_arrive_as_they_were_given(place: Place, cluster: Cluster) -> None:
    hostile = 'TRAIN.save_path="it\'s `here` $HOME; exit 3 #\nnext *"'
    write(place, "-o", hostile, "-o", "TRAIN.epochs=2")
    job = cluster.start("true")
    assert job.communicate()[0] == ""
    assert job.returncode == 0
    arguments = (cluster.folder / f"{CALLS}.arguments").read_text()
    command = ["-m", "sanctl", "train", "shapes", "tiny", "-o", hostile, "-o", "TRAIN.epochs=2"]
    assert arguments.partition("\n")[2] == "\n".join([*command, "--resume", "auto"]) + "\n"
    assert cluster.calls() == [
        "scontrol show hostnames node[7-8]",
        "srun --cpus-per-task=8 --kill-on-bad-exit=1 at node7:23456",
    ]


@pytest.mark.parametrize("status", [0, 1, 2, 130, 143])
def test_the_status_of_the_training_is_passed_on(
    place: Place, cluster: Cluster, status: int
) -> None:
    write(place)
    job = cluster.start(f"exit {status}")
    job.communicate()
    assert job.returncode == status
    assert not requeued(cluster)


SAVES = "trap 'sleep 0.3; touch saved; {end}' USR1; touch ready; while true; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("end", "goes_on"),
    [("exit 138", True), ("kill -KILL $$", True), ("exit 1", False), ("exit 0", False)],
)
def test_near_the_time_limit_it_has_the_training_save_and_goes_back_into_the_queue(
    place: Place, cluster: Cluster, end: str, goes_on: bool
) -> None:
    write(place)
    job = cluster.start(SAVES.format(end=end))
    wait_for(cluster.folder / "ready", job)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=60)
    assert (cluster.folder / "saved").exists()
    assert requeued(cluster) == goes_on
    assert ("back in the queue" in said) == goes_on
    assert job.returncode == (0 if goes_on else int(end.split()[1]))


def test_a_signal_to_the_processes_alone_does_the_same(place: Place, cluster: Cluster) -> None:
    write(place)
    job = cluster.start("kill -USR1 $$")
    job.communicate()
    assert requeued(cluster)


def test_a_job_that_ran_out_of_time_ends_the_training_the_next_time(
    place: Place, cluster: Cluster
) -> None:
    epochs = 25
    write(place, *("-o", f"TRAIN.epochs={epochs}", "-o", "TRAIN.workers=0"))
    first = cluster.start()
    wait_for(place.run / "metrics.csv", first)
    first.send_signal(signal.SIGUSR1)
    first.communicate(timeout=60)
    assert requeued(cluster)
    assert len(pd.read_csv(place.run / "metrics.csv")) < epochs
    second = cluster.start()
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    assert pd.read_csv(place.run / "metrics.csv").epoch.tolist() == list(range(1, epochs + 1))
    assert "on val images:" in said


def test_a_job_that_ran_out_of_time_while_starting(place: Place, cluster: Cluster) -> None:
    write(place, "-o", "TRAIN.workers=0")
    job = cluster.start()
    wait_for(cluster.folder / f"{CALLS}.arguments", job)
    time.sleep(0.5)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=60)
    assert requeued(cluster), said
    assert not list(place.model.glob("*.pth"))


def test_submitting_hands_the_script_to_sbatch(
    place: Place, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALLS", str(cluster.folder / CALLS))
    monkeypatch.setenv("PATH", f"{cluster.bin}:{os.environ['PATH']}")
    status, out, err = place.main("slurm", "shapes", "tiny", "--submit")
    assert (status, out, err) == (0, f"wrote {SCRIPT}\nSubmitted batch job 42\n", "")
    assert cluster.calls() == [f"sbatch {SCRIPT}"]
    monkeypatch.setenv("REFUSAL", "sbatch: error: invalid partition\nsbatch: error: sorry")
    status, out, err = place.main("slurm", "shapes", "tiny", "--submit")
    assert status == 1
    assert err == (
        f"error: sbatch {SCRIPT} failed with status 1: sbatch: error: invalid partition "
        "sbatch: error: sorry\n"
    )


def test_submitting_without_slurm(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    status, out, err = place.main("slurm", "shapes", "tiny", "--submit")
    assert (status, out) == (2, f"wrote {SCRIPT}\n")
    assert err == (
        f"error: sbatch: not found on this machine; on one of the cluster's: sbatch {SCRIPT}\n"
    )


def test_an_edited_script_is_not_written_over(place: Place) -> None:
    text = write(place)
    assert write(place) == text
    (place.folder / SCRIPT).write_text(text + "# mine\n")
    status, out, err = place.main("slurm", "shapes", "tiny")
    assert (status, out) == (2, "")
    assert err == (
        f"error: {SCRIPT}: exists already, with other options or edited; --force replaces it\n"
    )
    assert write(place, "--force") == text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--time", "tomorrow"), "--time tomorrow"),
        (("--time", "1:00:00\n#SBATCH --exclusive"), "--time"),
        (("--partition", "a b"), "--partition a b"),
        (("--nodes", "0"), "--nodes"),
        (("-o", "TRAIN.epoch=3"), "TRAIN.epochs"),
    ],
)
def test_a_wrong_option_is_told_and_nothing_is_written(
    place: Place, options: tuple[str, ...], words: str
) -> None:
    status, out, err = place.main("slurm", "shapes", "tiny", *options)
    assert (status, out) == (2, "")
    assert words in err
    assert not (place.folder / SCRIPT).exists()


@pytest.mark.parametrize("time_limit", ["90", "90:30", "24:00:00", "2-12", "2-12:30", "2-12:30:00"])
def test_the_ways_of_slurm_to_write_a_time(place: Place, time_limit: str) -> None:
    assert f"#SBATCH --time={time_limit}\n" in write(place, "--time", time_limit)


def test_a_name_that_means_something_to_slurm_or_to_the_shell(place: Place) -> None:
    name = "a%j b"
    folder = place.folder / "config" / "sha'pes"
    folder.mkdir()
    shutil.copy(place.config, folder / f"sha'pes_{name}.yaml")
    status, out, err = place.main("slurm", "sha'pes", name)
    assert (status, out, err) == (
        0,
        "wrote slurm/sha_pes_a_j_b.sh\nnext: sbatch slurm/sha_pes_a_j_b.sh\n",
        "",
    )
    text = (place.folder / "slurm/sha_pes_a_j_b.sh").read_text()
    assert "#SBATCH --output=slurm/sha_pes_a_j_b-%j.log\n" in text
    (line,) = [line for line in text.splitlines() if line.startswith("train=(")]
    assert shlex.split(line.removeprefix("train=(").removesuffix(")"))[4:6] == ["sha'pes", name]
