"""What is installed, from where it can be imported, and that the commands, launch files and run files fit together."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "experiments" / "launch"

# Imports the package in a process that sees only `where`, and says which files it got.
PROBE = """
import importlib.util, json
import adaptive_reasoning, adaptive_reasoning.kernels
from adaptive_reasoning.kernels.token_logprobs import token_logprobs
top = importlib.util.find_spec("kernels")
print(json.dumps([adaptive_reasoning.__file__, adaptive_reasoning.kernels.__file__, top and top.origin]))
"""

# Forgets an editable installation of this very checkout, which would answer first, and treats `where` as site-packages.
FORGET = """
import site, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "_EditableFinder"]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, where)
site.addsitedir(where)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what packaging reads, so that no build folder appears in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("adaptive_reasoning", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The built wheel, unpacked: what a normal installation puts into site-packages."""
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, "."], cwd=source)
    (archive,) = out.glob("*.whl")
    site = out / "site"
    zipfile.ZipFile(archive).extractall(site)
    return site


def run(command, **options) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def imported(where: Path, folder: Path, site: bool = False) -> list[str]:
    """Return the files of package and kernels, and of a top-level `kernels`, as seen with `where` on the path.

    With `site` the folder is treated as site-packages: its .pth files are executed.
    """
    code = (f"where = {str(where)!r}\n{FORGET}" if site else "") + PROBE
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}
    if not site:
        environment["PYTHONPATH"] = str(where)
    return json.loads(run([sys.executable, "-c", code], cwd=folder, env=environment).splitlines()[-1])


# --- installation


def test_wheel_holds_every_module_and_no_top_level_kernels(wheel):
    """`kernels` is the name of a Hugging Face package: a top-level folder of ours would overwrite its files."""
    assert {p.name.split("-")[0] for p in wheel.iterdir()} == {"adaptive_reasoning"}
    expected = {p.relative_to(ROOT / "adaptive_reasoning") for p in (ROOT / "adaptive_reasoning").rglob("*.py")}
    expected |= {Path("kernels") / p.relative_to(ROOT / "kernels") for p in (ROOT / "kernels").rglob("*.py")}
    package = wheel / "adaptive_reasoning"
    assert {p.relative_to(package) for p in package.rglob("*.py")} == expected


def test_wheel_holds_every_data_file(wheel):
    found = (ROOT / "adaptive_reasoning").rglob("*")
    data = [p for p in found if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts]
    assert any(p.suffix == ".j2" for p in data)
    missing = [p for p in data if not (wheel / p.relative_to(ROOT)).is_file()]
    assert not missing, "name them in package_data of setup.py"


def test_wheel_metadata(wheel):
    (folder,) = wheel.glob("*.dist-info")
    metadata = (folder / "METADATA").read_text()
    for line in ("Name: adaptive-reasoning", "Requires-Python: >=3.10", "Provides-Extra: gpu", "Provides-Extra: bench"):
        assert line in metadata
    assert list(folder.rglob("LICENSE"))


def test_import_from_an_installed_wheel(wheel, tmp_path):
    package, kernels, top = imported(wheel, tmp_path)
    assert Path(package) == wheel / "adaptive_reasoning" / "__init__.py"
    assert Path(kernels) == wheel / "adaptive_reasoning" / "kernels" / "__init__.py"
    assert top is None or ROOT not in Path(top).parents


def test_import_from_an_editable_installation(source, tmp_path):
    """Two folders of a checkout become one package; the edited files are those that are imported."""
    build = "import sys, setuptools.build_meta as b; b.build_editable(sys.argv[1])"
    run([sys.executable, "-c", build, tmp_path], cwd=source)
    (archive,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(archive).extractall(site)
    package, kernels, top = imported(site, tmp_path, site=True)
    assert Path(package) == source / "adaptive_reasoning" / "__init__.py"
    assert Path(kernels) == source / "kernels" / "__init__.py"
    assert top is None or source not in Path(top).parents


def test_import_from_a_plain_checkout(source, tmp_path):
    package, kernels, _ = imported(source, tmp_path)
    assert Path(package) == source / "adaptive_reasoning" / "__init__.py"
    assert Path(kernels) == source / "kernels" / "__init__.py"


def test_version_is_read_without_torch(source, tmp_path):
    """pip asks for the version before anything is installed."""
    for name in ("torch", "transformers", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not there yet')\n")
    version = run([sys.executable, "setup.py", "--version"], cwd=source, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    (expected,) = re.findall(r'__version__ = "(.*)"', (ROOT / "adaptive_reasoning" / "__init__.py").read_text())
    assert version.splitlines()[-1] == expected


# --- exact versions


def pins(python: str) -> dict[str, str]:
    """Return {name: version} of constraints.txt for a version of Python."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                (only,) = pin.specifier
                assert only.operator == "==" and pin.name not in found, line
                found[pin.name] = only.version
    return found


def requirements(wheel: Path) -> list[Requirement]:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    lines = [line for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist: ")]
    return [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_has_a_version_in_its_range(wheel, python):
    versions = pins(python)
    for requirement in requirements(wheel):
        if requirement.name != "flash-attn":  # compiled where it is used
            assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_torch_is_named_without_a_build():
    """`torch==2.13.0+cpu` would not be found on a machine with GPUs, nor the CUDA build on one without."""
    assert "+" not in pins("3.11")["torch"]


# --- launch files


@pytest.mark.parametrize(
    ("name", "machines", "processes"), [("zero3_8gpu", 1, 8), ("zero3_2nodes", 2, 16), ("zero3_cpu", 1, 2)]
)
def test_launch_files(name, machines, processes):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.distributed_type == "DEEPSPEED" and not config.use_cpu
    deepspeed = config.deepspeed_config
    assert deepspeed["zero_stage"] == 3 and deepspeed["zero3_init_flag"]
    assert deepspeed["offload_optimizer_device"] == deepspeed["offload_param_device"] == "none"
    assert "gradient_clipping" not in deepspeed, "the learner fills in --max_grad_norm"


# --- commands


@pytest.fixture(scope="module")
def make():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")

    def dry(*arguments: str) -> str:
        # `make test ARGS=...` hands its own variables down to the tests.
        given = ("MAKE", "MFLAGS", "ARGS", "MODEL", "DATA", "OUT", "SEED", "NUM_", "RUN", "CUDA_VISIBLE_DEVICES")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(given)}
        return run(["make", "-n", "--no-print-directory", *arguments], cwd=ROOT, env=environment)

    return dry


def test_every_target_says_what_it_does():
    text = (ROOT / "Makefile").read_text()
    targets = [target for line in re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE) for target in line.split()]
    assert {"quickstart", "test", "bench", "toy-adaptthink", "train-adaptthink-1.5b"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:.*  ## \S", text, re.MULTILINE), target


def test_train_on_the_cpu(make):
    text = make("train-adaptthink-1.5b", "NUM_GPUS=0", "MODEL=some/model", "DATA=q.jsonl", "ARGS=--max_steps 2")
    command = text.split("adaptive_reasoning.adaptthink")[1].replace("\\\n", " ").split()
    assert "ACCELERATE_USE_CPU=true" in text and "launch" not in text.split("-m adaptive_reasoning")[0].splitlines()[-1]
    assert command[command.index("--dtype") + 1] == "fp32"
    assert (
        command[command.index("--model") + 1] == '"some/model"' and command[command.index("--data") + 1] == '"q.jsonl"'
    )
    assert command[-2:] == ["--max_steps", "2"], "ARGS comes last, so that it wins"


def test_train_on_gpus(make):
    one = make("train-adaptthink-1.5b", "NUM_GPUS=1")
    assert "launch" not in one and "--dtype" not in one and "--model" not in one and "--data" not in one
    eight = make("train-adaptthink-1.5b", "NUM_GPUS=4")
    assert "launch --config_file experiments/launch/zero3_8gpu.yaml --num_processes 4" in eight.replace("\\\n    ", "")
    nodes = make("train-adaptthink-7b", "NUM_GPUS=8", "NUM_NODES=2", "NODE_RANK=1", "MASTER_ADDR=10.0.0.1")
    assert "zero3_2nodes.yaml --num_machines 2" in nodes and "--machine_rank 1" in nodes and "10.0.0.1" in nodes


def test_toy_runs_start_from_the_cold_start_unless_told_otherwise(make):
    own = make("toy-adaptthink", "SEED=3", "MODEL=other")
    assert "adaptive_reasoning.sft" not in own and "--seed 3" in own and "runs/toy-adaptthink-seed3" in own
    assert '--model "runs/cold-start-adaptthink/model"' in make("toy-adaptthink")


def test_every_run_has_its_file(make):
    """Folder and YAML file follow from the name of a target: every such target, dry, names a file that exists."""
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^((?:train|eval|sft|warmup|toy|quickstart)[\w.-]*):", text, re.MULTILINE)
    assert len(targets) > 20
    for target in targets:
        commands = make(target, "MODEL=given", "NUM_GPUS=0")
        named = re.findall(r"adaptive_reasoning\.\w+ --config (\S+)", commands)
        assert named and all((ROOT / name).is_file() for name in named), (target, named)


# --- run files


RUN_FILES = sorted(p for p in (ROOT / "experiments").glob("*.yaml") if p.stem != "laboratories")


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda p: p.stem)
def test_run_files_hold_options_only(path):
    from adaptive_reasoning.run.options import read_yaml

    starts = {
        "cold_start": "sft",
        "words_cold_start": "sft",
        "sft": "sft",
        "warmup": "sft",
        "eval": "benchmark.__main__",
    }
    module = next((m for start, m in starts.items() if path.stem.startswith(start)), "")
    if not module:  # <algorithm>_<size>, toy_<algorithm>, ...
        names = (
            "ada_grpo degrpo grpo dpo overthink dast tlmre o1_pruner rft merge thinker adaptthink quickstart".split()
        )
        module = next(name for name in names if name in path.stem)
        module = {"quickstart": "adaptthink", "overthink": "dpo", "dast": "dpo"}.get(module, module)
    loaded = importlib.import_module(f"adaptive_reasoning.{module}")
    read_yaml(path, loaded.Args)


def test_the_official_run_is_the_default():
    """The YAML file writes out what the options say anyway; where they differ one of them is wrong."""
    from adaptive_reasoning.adaptthink import Args

    written = yaml.safe_load((ROOT / "experiments" / "adaptthink_1_5b.yaml").read_text())
    where = {"output_dir", "eval_data", "seed"}
    assert {k: v for k, v in written.items() if k not in where and getattr(Args(), k) != v} == {}


# --- the real launch path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_launch_on_cpu_processes(tmp_path, machines):
    """`accelerate launch` with our files starts ZeRO-3 over gloo; two machines are two launches that meet at a port.

    Without the gloo backend accelerate believes in one process each, and both would train alone.
    """
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    script = tmp_path / "probe.py"
    script.write_text(
        "from pathlib import Path\n"
        "from adaptive_reasoning.learner.runtime import is_zero3, make_accelerator\n"
        "from adaptive_reasoning.run.options import RunArgs\n"
        "from adaptive_reasoning.run.shapes import shapes_of\n"
        "from transformers import Qwen2Config\n"
        "accelerator = make_accelerator(RunArgs(dtype='fp32'))\n"
        "sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1)\n"
        "shapes = shapes_of(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1))\n"
        "found = [is_zero3(accelerator), accelerator.num_processes, shapes.parameters]\n"
        "Path(__file__).with_name(f'{accelerator.process_index}.txt').write_text(repr(found))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    if machines == 1:
        commands = [[*launch, LAUNCH / "zero3_cpu.yaml", "--main_process_port", "0", script]]
    else:
        many = [*launch, LAUNCH / "zero3_2nodes.yaml", "--num_machines", "2", "--num_processes", "2"]
        many += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--machine_rank"]
        commands = [[*many, rank, script] for rank in (0, 1)]
    started = [subprocess.Popen([str(c) for c in command], env=environment) for command in commands]
    assert [process.wait(240) for process in started] == [0] * machines
    # Tied embeddings 50 x 16; q, o, k, v with biases; MLP; three norms. Counted whole although ZeRO-3 is on.
    parameters = 2 * 50 * 16 + (2 * 16 * 16 + 16) + 2 * (16 * 8 + 8) + 3 * 16 * 32 + 3 * 16
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.txt").read_text() == repr([True, 2, parameters])
