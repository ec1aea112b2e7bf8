"""What is read from the environment of a task of Slurm."""

import pytest

from gemini.initialize.slurm import SlurmTask, first_host, is_task, tasks_per_node

# Task 3 of 5, on the second of three nodes.
TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",  # of the job; the step may have fewer
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_JOB_NODELIST": "gpu[01-08]",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_TASKS_PER_NODE": "1(x8)",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "ENVIRONMENT": "BATCH",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[01-08]",
    "ENVIRONMENT": "BATCH",
}


def test_a_task_is_that_of_its_step() -> None:
    task = SlurmTask.of(TASK)
    assert (task.rank, task.world_size, task.local_rank, task.local_world_size) == (3, 5, 1, 2)
    assert task.host == "gpu03"


def test_all_tasks_of_a_step_have_one_port_and_other_steps_have_others() -> None:
    other_task = {**TASK, "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    others = [{**TASK, "SLURM_STEP_ID": "1"}, {**TASK, "SLURM_JOB_ID": "4712"}, {**TASK, "SLURM_JOB_ID": "99999999"}]
    ports = [SlurmTask.of(environment).port for environment in (TASK, *others)]
    assert SlurmTask.of(other_task).port == ports[0]
    assert len(set(ports)) == len(ports)
    assert all(10_000 <= port < 30_000 for port in ports)


def test_the_variables_of_the_job_do_where_those_of_the_step_are_missing() -> None:
    names = ("JOB_ID", "PROCID", "LOCALID", "NTASKS", "JOB_NODELIST")
    task = SlurmTask.of({f"SLURM_{name}": TASK[f"SLURM_{name}"] for name in names})
    assert (task.rank, task.world_size, task.local_rank, task.host) == (3, 8, 1, "gpu01")
    assert task.local_world_size == 8


def test_a_batch_script_is_no_task() -> None:
    # It would wait for seven others, which nobody has started.
    assert is_task(TASK)
    assert not is_task(BATCH_SCRIPT)
    assert not is_task({})
    for environment in (BATCH_SCRIPT, {}):
        with pytest.raises(ValueError, match="start the script with srun"):
            SlurmTask.of(environment)


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_LOCALID"])
def test_a_missing_or_wrong_variable_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SlurmTask.of({**TASK, name: ""})
    with pytest.raises(ValueError, match=name):
        SlurmTask.of({**TASK, name: "x"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login1", "login1"),
        ("gpu-a.example.org,gpu-b", "gpu-a.example.org"),
        ("gpu[03-05,09],login1", "gpu03"),
        ("gpu[9,03-05]", "gpu9"),
        ("gpu[007]", "gpu007"),
        ("rack[1-2]node[03-05]", "rack1node03"),
        ("n[1-3]-ib,m2", "n1-ib"),
        ("10.0.0.[7-9]", "10.0.0.7"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "gpu[03-05", "gpu03-05]", "gpu[]", "gpu[a-c]", "gpu[1]]"])
def test_a_malformed_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(ValueError, match="expected a node list"):
        first_host(nodes)


def test_tasks_of_each_node() -> None:
    assert list(tasks_per_node("4")) == [4]
    assert list(tasks_per_node("2(x3),1")) == [2, 2, 2, 1]
    assert list(tasks_per_node("1,12(x2)")) == [1, 12, 12]
    for wrong in ("", "x3", "2(x3", "2(3)", "2,,1"):
        with pytest.raises(ValueError, match="numbers of tasks"):
            list(tasks_per_node(wrong))
