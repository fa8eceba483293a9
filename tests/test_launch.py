"""How runs are started on several machines: the Makefile's commands, the host file, and the Slurm script.

Slurm is a few shell scripts here, which write down what they are asked.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "experiments" / "launch"


def clean(**more) -> dict[str, str]:
    """The environment without what a `make test` hands down."""
    given = (
        "MAKE",
        "MFLAGS",
        "ARGS",
        "MODEL",
        "DATA",
        "OUT",
        "SEED",
        "NUM_",
        "RUN",
        "CUDA_VISIBLE",
        "NODE_",
        "MASTER_",
    )
    return {k: v for k, v in os.environ.items() if not k.startswith((*given, "HOSTFILE", "OFFLOAD", "SLURM_"))} | more


def make(*arguments: str, fails: bool = False, **environment: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "-n", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=clean(**environment), capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else " ".join(done.stdout.replace("\\\n", " ").split())


def test_offload_is_zero3_on_any_number_of_gpus_and_machines():
    """On one GPU too, which is otherwise plain training: the optimiser can leave it only under DeepSpeed."""
    config = yaml.safe_load((LAUNCH / "zero3_8gpu_offload.yaml").read_text())
    plain = yaml.safe_load((LAUNCH / "zero3_8gpu.yaml").read_text())
    assert config["deepspeed_config"].pop("offload_optimizer_device") == "cpu"
    assert plain["deepspeed_config"].pop("offload_optimizer_device") == "none"
    assert config["deepspeed_config"].pop("deepspeed_multinode_launcher") == "standard"
    assert config["deepspeed_config"] == plain["deepspeed_config"]
    for gpus in ("1", "8"):
        command = make("train-adaptthink-7b", f"NUM_GPUS={gpus}", "OFFLOAD=1")
        assert f"zero3_8gpu_offload.yaml --num_processes {gpus} -m" in command
    nodes = ("NUM_GPUS=8", "NUM_NODES=2", "NODE_RANK=1", "MASTER_ADDR=a", "OFFLOAD=1")
    assert "zero3_8gpu_offload.yaml --num_machines 2" in make("train-adaptthink-7b", *nodes)
    assert "offload" not in make("train-adaptthink-7b", "NUM_GPUS=8", "OFFLOAD=0")
    assert "launch" not in make("train-adaptthink-7b", "NUM_GPUS=1")


def test_offload_is_planned_too():
    """`make plan-... OFFLOAD=1` had planned the run with the optimiser on the GPUs."""
    assert "--preflight --gpu h100 --num_gpus 8 --num_nodes 1 --offload true" in make(
        "plan-adaptthink-7b", "NUM_GPUS=8", "OFFLOAD=1"
    )
    assert "--num_gpus 1 --num_nodes 1 --offload true" in make("plan-adaptthink-1.5b", "NUM_GPUS=1", "OFFLOAD=1")
    for word in ((), ("OFFLOAD=0",)):
        assert "offload" not in make("plan-adaptthink-7b", "NUM_GPUS=8", *word)


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_no_visible_gpu_is_none(value):
    """-1 and NoDevFiles had counted as one GPU each, on which the run then failed."""
    command = make("train-adaptthink-7b", CUDA_VISIBLE_DEVICES=value)
    assert "ACCELERATE_USE_CPU=true" in command and "launch" not in command
    assert "--num_processes 2 " in make("train-adaptthink-7b", CUDA_VISIBLE_DEVICES="0,3")


def test_two_runs_on_one_machine_have_a_port_each():
    """MASTER_PORT was dropped on one machine: the second of two runs, on other GPUs, met the first on port 29500."""
    for words in (("NUM_GPUS=4",), ("NUM_GPUS=1", "OFFLOAD=1")):
        command = make("train-adaptthink-7b", *words, "MASTER_PORT=1234")
        assert "--main_process_port 1234 -m adaptive_reasoning.adaptthink" in command
        assert command == make("train-adaptthink-7b", *words, MASTER_PORT="1234"), "the environment is as good"
        assert "main_process_port" not in make("train-adaptthink-7b", *words)
    many = make("train-adaptthink-7b", "NUM_GPUS=8", "NUM_NODES=2", "NODE_RANK=1", "MASTER_ADDR=a")
    assert "--main_process_port 29500 -m" in many


def test_a_host_file_tells_each_machine_its_place(tmp_path):
    hosts = tmp_path / "hosts"
    me = socket.gethostname()
    hosts.write_text(f"# leader first\nfirst.example slots=8\n\n{me} slots=8\nthird.example\n")
    command = make("train-adaptthink-7b", "NUM_GPUS=8", f"HOSTFILE={hosts}")
    assert "--num_machines 3 --num_processes $((3 * 8)) --machine_rank 1 --main_process_ip first.example" in command
    command = make("train-adaptthink-7b", "NUM_GPUS=4", f"HOSTFILE={hosts}", "NUM_NODES=2", "MASTER_PORT=1234")
    assert "--num_machines 2 --num_processes $((2 * 4)) --machine_rank 1" in command
    assert "--main_process_port 1234 -m adaptive_reasoning.adaptthink" in command
    given = make("train-adaptthink-7b", "NUM_GPUS=8", f"HOSTFILE={hosts}", "NODE_RANK=0", "MASTER_ADDR=10.0.0.1")
    assert "--machine_rank 0 --main_process_ip 10.0.0.1" in given, "what is typed wins over what is found"
    hosts.write_text(f"{me}\n")
    assert "zero3_8gpu.yaml --num_processes 8" in make("train-adaptthink-7b", "NUM_GPUS=8", f"HOSTFILE={hosts}")


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        (None, "", "no such file. Write a machine a line into it."),
        ("elsewhere.example\n", "", "is none of the first 1 in HOSTFILE"),
        ("a\nb\n", "NUM_NODES=3", "NUM_NODES=3, but HOSTFILE="),
        ("", "", "names 0 machines"),
    ],
)
def test_a_host_file_that_does_not_help(tmp_path, text, number, message):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    told = make("train-adaptthink-7b", "NUM_GPUS=8", f"HOSTFILE={tmp_path / 'hosts'}", *number.split(), fails=True)
    assert message in told and "does not tell which machine this is" in told


# --- Slurm


@pytest.fixture
def slurm(tmp_path):
    """A folder to submit from, with srun, scontrol and make that write what they are asked into `asked`."""
    programs = {
        "scontrol": 'echo "scontrol $*" >> asked\nif [ "$1 $2" = "show hostnames" ]; then echo node7; echo node8; fi',
        # srun: options first, then the command, which it starts once a machine
        "srun": 'echo "srun $*" >> asked\nwhile [[ $1 == --* ]]; do shift; done\n'
        'for node in 0 1; do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done\n'
        'trap "kill $tasks" TERM\nfor task in $tasks; do wait $task || exit $?; done',
        "make": 'printf "make"  >> asked.$SLURM_NODEID\nprintf " [%s]" "$@" >> asked.$SLURM_NODEID\n'
        "stop() { echo stopped >> asked.$SLURM_NODEID; kill $nap; exit 143; }\ntrap stop TERM\n"
        "if [ -f slow ]; then sleep 30 & nap=$!; wait; fi\n"
        "exit $(cat code 2>/dev/null || echo 0)",
    }
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


def submit(folder: Path, *arguments: str, **more: str) -> subprocess.Popen:
    job = {"SLURM_JOB_ID": "20042", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"} | more
    environment = clean(PATH=f"{folder / 'bin'}:{os.environ['PATH']}", SLURM_SUBMIT_DIR=str(folder), **job)
    command = ["bash", str(LAUNCH / "slurm.sh"), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=folder)


def test_a_job_starts_the_target_once_on_every_machine(slurm):
    job = submit(slurm, "train-adaptthink-7b", "ARGS=--max_steps 2 --seed 1", "OFFLOAD=1")
    out, err = job.communicate(timeout=30)
    assert job.returncode == 0, err
    assert "make train-adaptthink-7b" in out and "node7:20042" in out
    asked = (slurm / "asked").read_text().splitlines()
    assert asked[0] == "scontrol show hostnames node[7-8]"
    assert asked[1].startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c")
    for node in (0, 1):
        words = (slurm / f"asked.{node}").read_text()
        assert words == (
            "make [train-adaptthink-7b] [ARGS=--max_steps 2 --seed 1] [OFFLOAD=1] [NUM_NODES=2] [MASTER_ADDR=node7] "
            f"[MASTER_PORT=20042] [NODE_RANK={node}]"
        )
    assert "requeue" not in (slurm / "asked").read_text()


def test_a_task_has_the_cpus_of_the_job(slurm):
    """Since Slurm 22.05 srun does not read SLURM_CPUS_PER_TASK: each task had one CPU of the 64 that were reserved."""
    job = submit(slurm, "train-adaptthink-7b", SLURM_CPUS_PER_TASK="64")
    _, err = job.communicate(timeout=30)
    assert job.returncode == 0, err
    assert "--kill-on-bad-exit=1 --cpus-per-task=64 bash -c" in (slurm / "asked").read_text()
    assert "[train-adaptthink-7b]" in (slurm / "asked.1").read_text()


def test_what_a_job_asks_for_becomes_the_launch_command():
    """The words of the test above, given to the real Makefile."""
    words = ["train-adaptthink-7b", "NUM_NODES=2", "MASTER_ADDR=node7", "MASTER_PORT=20042", "NODE_RANK=1"]
    command = make(*words, "NUM_GPUS=8")
    assert "--machine_rank 1 --main_process_ip node7 --main_process_port 20042" in command


def test_a_failed_run_fails_the_job_and_is_not_queued_again(slurm):
    (slurm / "code").write_text("2")
    job = submit(slurm, "train-adaptthink-7b")
    job.communicate(timeout=30)
    assert job.returncode == 2 and "requeue" not in (slurm / "asked").read_text()


def test_near_the_time_limit_the_run_is_stopped_and_queued_again(slurm):
    (slurm / "slow").touch()
    job = submit(slurm, "train-adaptthink-7b")
    for _ in range(300):
        if all((slurm / f"asked.{node}").is_file() for node in (0, 1)):
            break
        time.sleep(0.1)
    time.sleep(0.3)  # both tasks have set their traps
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=30)
    assert job.returncode == 0, err
    assert "goes back into the queue" in out
    assert (slurm / "asked").read_text().splitlines()[-1] == "scontrol requeue 20042"
    assert all("stopped" in (slurm / f"asked.{node}").read_text() for node in (0, 1))


def test_a_job_without_a_target_or_an_install_says_so(slurm):
    job = submit(slurm)
    assert "usage: sbatch" in job.communicate(timeout=30)[1] and job.returncode == 2
    (slurm / ".venv" / ".installed").unlink()
    job = submit(slurm, "train-adaptthink-7b")
    assert "Run make install first" in job.communicate(timeout=30)[1] and job.returncode == 2
    assert not (slurm / "asked").exists()


def test_the_script_asks_for_what_it_relies_on():
    """One task a machine, a signal before the end to the script alone (B:), the same log after a requeue."""
    options = [
        line.removeprefix("#SBATCH ") for line in (LAUNCH / "slurm.sh").read_text().split("\n") if "#SBATCH" in line
    ]
    assert {"--ntasks-per-node=1", "--requeue", "--open-mode=append", "--signal=B:USR1@120"} <= set(options)
    for script in LAUNCH.glob("*.sh"):
        assert subprocess.run(["bash", "-n", script]).returncode == 0 and os.access(script, os.X_OK)
