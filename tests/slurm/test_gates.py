"""The shipped scripts on a real SLURM of three nodes, with what happens to jobs on shared clusters.

The first test runs wherever SLURM is; the others take minutes:  python -m pytest -m slurm tests/slurm
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import NEEDS_SLURM, ROOT, Cluster, cluster, wait_until
from tests.slurm.runs import steps_done, write_config
from tests.train.runs import recorded

pytestmark = [NEEDS_SLURM, pytest.mark.timeout(900)]

SCRIPTS = ROOT / "examples" / "slurm"
STEPS, SAVE_STEPS = 60, 7
PATIENCE = 600.0
# What differs between these nodes and a real cluster's, all of it in the environment of sbatch.
NODES_HERE = {
    "PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "GPUS_PER_NODE": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


class Runs:
    """Submits runs of one configuration."""

    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.config = write_config(folder, max_steps=STEPS, save_steps=SAVE_STEPS)

    def submit(self, name: str, script: str = "multi-node.sbatch", *options: str) -> str:
        """The job's number; its log is `<name>.log`, its run directory `<name>`."""
        log = f"--output={self.folder / name}.log"
        arguments = (str(self.config), f"run_dir={self.folder / name}")
        command = ("sbatch", "--parsable", log, *options, str(SCRIPTS / script), *arguments)
        return self.slurm.run(*command, **NODES_HERE)

    def nodes(self, job: str) -> list[str]:
        """Those that the job has or had last."""
        return self.slurm.run("scontrol", "show", "hostnames", self.slurm.job(job, "NodeList")).split()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_for_step(self, name: str, step: int) -> None:
        wait_until(lambda: steps_done(self.folder / name) >= step, PATIENCE, f"step {step} of {name}")

    def end(self, name: str, job: str) -> str:
        """State at the end; a job that did not complete shows its log."""
        state = self.slurm.wait_for_end(job, PATIENCE)
        assert state == "COMPLETED", self.log(name)
        return state


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder / "cluster", nodes=3) as slurm:
        yield Runs(slurm, folder)


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> list[dict[str, Any]]:
    runs.end("undisturbed", runs.submit("undisturbed"))
    return recorded(runs.folder, "undisturbed")


def test_two_nodes_run_the_shipped_script(runs: Runs, undisturbed: list[dict[str, Any]]) -> None:
    assert [step["step"] for step in undisturbed] == list(range(1, STEPS + 1))
    assert "2 cpu processes: TP 1 x PP 1 x CP 1 x DP 2" in runs.log("undisturbed")


@pytest.mark.slurm
def test_a_preempted_job_saves_is_queued_again_and_ends_the_same(runs: Runs, undisturbed: list[Any]) -> None:
    job = runs.submit("preempted")
    runs.wait_for_step("preempted", 10)
    runs.slurm.run("scancel", "--batch", "--signal=USR1", job)
    runs.end("preempted", job)
    log = runs.log("preempted")
    assert runs.slurm.job(job, "Restarts") == "1"
    assert log.count("asked to stop: saving") == log.count("stopped by SIGUSR1") == 1, log
    assert recorded(runs.folder, "preempted") == undisturbed


@pytest.mark.slurm
@pytest.mark.parametrize("dead", [1, 0], ids=["a-node", "the-node-of-the-batch-script"])
def test_a_job_whose_node_died_moves_to_the_spare_node_and_ends_the_same(
    runs: Runs, undisturbed: list[Any], dead: int
) -> None:
    name = f"dead-node-{dead}"
    job = runs.submit(name)
    runs.wait_for_step(name, 2 * SAVE_STEPS + 1)
    node = runs.nodes(job)[dead]
    runs.slurm.cut_power(node)
    wait_until(lambda: runs.slurm.job(job, "Restarts") == "1", PATIENCE, "the requeue")
    runs.end(name, job)
    assert len(runs.nodes(job)) == 2 and node not in runs.nodes(job)
    assert recorded(runs.folder, name) == undisturbed
    runs.slurm.restore_power(node)


@pytest.mark.slurm
def test_a_cancelled_job_stays_cancelled_and_the_next_one_goes_on(runs: Runs, undisturbed: list[Any]) -> None:
    job = runs.submit("cancelled")
    runs.wait_for_step("cancelled", SAVE_STEPS + 1)
    runs.slurm.run("scancel", job)
    assert runs.slurm.wait_for_end(job, PATIENCE) == "CANCELLED"
    runs.end("cancelled", runs.submit("cancelled"))
    assert (runs.slurm.job(job, "JobState"), runs.slurm.job(job, "Restarts")) == ("CANCELLED", "0")
    assert recorded(runs.folder, "cancelled") == undisturbed


@pytest.mark.slurm
def test_a_chain_of_jobs_goes_on_where_the_one_before_stopped(runs: Runs, undisturbed: list[Any]) -> None:
    run_dir = runs.folder / "chain"
    command = (str(SCRIPTS / "chain.sh"), "4", str(SCRIPTS / "multi-node.sbatch"), str(runs.config))
    environment = NODES_HERE | {"SBATCH_OUTPUT": str(runs.folder / "chain-%j.log")}
    jobs = runs.slurm.run(*command, f"run_dir={run_dir}", **environment).split()
    assert len(jobs) == 4
    runs.wait_for_step("chain", 5)
    runs.slurm.run("scancel", "--batch", "--signal=USR1", jobs[0])
    assert runs.slurm.wait_for_end(jobs[0], PATIENCE) == "COMPLETED"
    saved = (run_dir / "checkpoints" / "latest").read_text()
    runs.wait_for_step("chain", 2 * SAVE_STEPS + 3)
    assert runs.slurm.job(jobs[2], "JobState") == "PENDING"
    runs.slurm.run("scancel", jobs[1])  # without a chance to save in the end
    assert runs.slurm.wait_for_end(jobs[1], PATIENCE) == "CANCELLED"
    for job in jobs[2:]:
        assert runs.slurm.wait_for_end(job, PATIENCE) == "COMPLETED"
    assert saved < (run_dir / "checkpoints" / "latest").read_text() == f"iter_{STEPS:07d}\n"
    assert recorded(runs.folder, "chain") == undisturbed
