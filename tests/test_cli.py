"""The command line as a person meets it: exit codes, one clear sentence, the folder that a run leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from neuralode import load
from tests.conftest import Finished, command, environment

Cli = Callable[..., Finished]
SHORT = ["trainer.max_epochs=2", "data.samples=64"]

MISTAKES = {
    "experiment": (["+experiment=moonz"], ["unknown experiment 'moonz'", "did you mean 'moons'"]),
    "experiment without plus": (["experiment=moons"], ["+experiment=moons"]),
    "key": (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean 'optimizer.lr'"]),
    "added key": (["+solver.foo=3"], ["solver.foo", "Allowed"]),
    "group": (["optimizer=adamm"], ["unknown optimizer 'adamm'", "did you mean 'adam'"]),
    "method": (["solver.method=dopri"], ["did you mean 'dopri5'"]),
    "tolerance": (["solver.rtol=-1"], ["solver.rtol", "positive"]),
    "type": (["data.samples=few"], ["data.samples", "few"]),
    "syntax": (["data.samples=[1"], ["data.samples=[1", "key=value"]),
    "device": (["trainer.accelerator=abacus"], ["trainer", "abacus"]),
    "missing checkpoint": (["ckpt_path=nowhere.ckpt"], ["nowhere.ckpt", "checkpoint"]),
    "test without checkpoint": (["fit=false"], ["ckpt_path"]),
    "nothing to do": (["fit=false", "test=false"], ["fit", "test"]),
    "metric": (["monitor.metric=val/acuracy"], ["monitor.metric", "did you mean 'val/accuracy'"]),
    "metric of another task": (["data=spiral", "model=trajectory", "task=trajectory"], ["monitor.metric", "val/mae"]),
    "metric of the scheduler": (["scheduler=plateau", "scheduler.monitor=val/lss"], ["scheduler.monitor", "val/loss"]),
    "windows for a field of t": (
        ["data=spiral", "model=trajectory", "task=trajectory", "monitor=trajectory", "model.field_args.time=true"],
        ["data.segment=20", "depends on t", "data.segment=null"],
    ),
    "folder below a file": (["paths.runs=/etc/passwd/runs"], ["paths.runs=/etc/passwd/runs", "written to"]),
    "folder that is a file": (["hydra.run.dir=/etc/passwd"], ["hydra.run.dir=/etc/passwd", "written to"]),
    "folder not to be made": (["paths.runs=/proc/runs"], ["paths.runs=/proc/runs", "written to"]),
    "model for other data": (["model=conv_ode_net"], ["conv_ode_net", "image"]),
    "field argument": (["model.field_args.hiden=[3]"], ["hiden", "did you mean 'hidden'"]),
    "own field": (["model.field=nowhere.MyField"], ["nowhere", "Python path"]),
    "csv": (["data=csv", "data.path=no.csv", "model=trajectory", "task=trajectory"], ["no.csv", "CSV"]),
    "csv without a path": (["data=csv", "model=trajectory", "task=trajectory"], ["data.path", "data=lynx_hare"]),
    "optimizer argument": (["optimizer.lr=-1"], ["learning rate", "-1"]),
    "optimizer type": (["optimizer.lr=fast"], ["optimizer.lr", "'fast'", "float"]),
    "trainer type": (["trainer.max_epochs=many"], ["trainer.max_epochs", "'many'", "int"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_with_one_sentence(mistake: str, train_cli: Cli) -> None:
    overrides, words = MISTAKES[mistake]
    done = train_cli(*overrides)
    assert done.code not in (0, None), done.output
    assert "Traceback" not in done.output
    for word in words:
        assert word.lower() in done.output.lower(), done.output
    assert len([line for line in done.output.splitlines() if line.strip()]) <= 3, done.output


def test_interrupt_during_the_imports_is_quiet(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")


def test_help_lists_the_experiments(train_cli: Cli) -> None:
    done = train_cli("--help")
    assert done.code == 0
    for name in ("moons", "digits", "spiral", "lynx_hare", "linear_regression", "concentric", "mnist", "cifar10"):
        assert f"  {name} " in done.output


def test_a_run_and_what_can_be_done_with_it(train_cli: Cli, tmp_path: Path) -> None:
    done = train_cli(*SHORT, "hydra.run.dir=run")
    assert done.code == 0, done.output
    for line in ("run:         run", "checkpoint:  run/checkpoints/best.ckpt", "tensorboard --logdir run"):
        assert line in done.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"config", "seed", "metrics", "parameters", "solver", "seconds", "versions", "device"} <= set(result)
    for figure in ("phase_portrait.png", "learning.png"):
        assert (tmp_path / "run" / "figures" / figure).stat().st_size > 1000

    model = load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert not model.training

    for which in ("last", "best"):
        tested = train_cli("fit=false", f"ckpt_path=run/checkpoints/{which}.ckpt")
        assert tested.code == 0, tested.output
        assert f"checkpoint:  run/checkpoints/{which}.ckpt" in tested.output
    again = json.loads((tmp_path / "run" / "test.json").read_text())["metrics"]
    assert again == {k: v for k, v in result["metrics"].items() if k.startswith("test/")}

    longer = train_cli("ckpt_path=run/checkpoints/last.ckpt", "trainer.max_epochs=3")
    assert longer.code == 0, longer.output
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 3
    assert json.loads((tmp_path / "run" / "result.json").read_text())["config"]["data"]["samples"] == 64

    for change in ("optimizer=sgd", "model.augment=2"):
        other = train_cli("ckpt_path=run/checkpoints/last.ckpt", change)
        assert other.code == 2
        assert "start a new run" in other.output
        assert "keeping" not in other.output

    (tmp_path / "run" / "checkpoints" / "bad.ckpt").write_bytes(b"PK\x03\x04 torn")
    torn = train_cli("ckpt_path=run/checkpoints/bad.ckpt")
    assert torn.code == 2
    assert "bad.ckpt" in torn.output
    assert "Traceback" not in torn.output


def test_own_field_and_own_csv(train_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(
        "import torch\n\n\nclass MyField(torch.nn.Module):\n"
        "    def __init__(self, features, width=4):\n"
        "        super().__init__()\n"
        "        self.net = torch.nn.Sequential(torch.nn.Linear(features, width), torch.nn.Linear(width, features))\n\n"
        "    def forward(self, t, y):\n        return self.net(y)\n"
    )
    rows = "\n".join(f"{0.1 * i:.1f},{1 - 0.05 * i},{0.5 + 0.02 * i}" for i in range(12))
    (tmp_path / "mine.csv").write_text(f"# measured\ntime,a,b\n{rows}\n")
    series = ["data=csv", "data.path=mine.csv", "data.time=time", "data.columns=[a,b]", "model=trajectory",
              "task=trajectory", "monitor=trajectory", "trainer.max_epochs=3", "hydra.run.dir=run"]  # fmt: skip
    done = train_cli(*series, "model.field=my_module.MyField", "model.field_args.width=8")
    assert done.code == 0, done.output
    assert "test/mae" in done.output
    assert (tmp_path / "run" / "figures" / "phase_portrait.png").is_file()


def test_nan_in_the_data(train_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "holes.csv").write_text("time,a\n0,1\n1,nan\n2,3\n")
    done = train_cli("data=csv", "data.path=holes.csv", "model=trajectory", "task=trajectory", "monitor=trajectory")
    assert done.code == 2
    assert "NaN" in done.output
    assert "Traceback" not in done.output


def test_diverging_loss(train_cli: Cli) -> None:
    done = train_cli(*SHORT, "optimizer=sgd", "optimizer.lr=1e30", "solver=euler", "hydra.run.dir=run")
    assert done.code != 0
    assert "lower" in done.output  # the learning rate, or the step size
    assert "Traceback" not in done.output


def test_arms_and_seeds_in_one_command(train_cli: Cli, tmp_path: Path) -> None:
    short = [*SHORT, "seeds=[0,1]", "trainer.max_epochs=1", "data.batch_size=64", "hydra.run.dir=run"]
    done = train_cli("+experiment=concentric", *short)
    assert done.code == 0, done.output
    results = sorted(p.parent.relative_to(tmp_path / "run").as_posix() for p in tmp_path.rglob("result.json"))
    assert results == ["augmented/seed_0", "augmented/seed_1", "plain/seed_0", "plain/seed_1"]
    assert (tmp_path / "run" / "figures" / "comparison.png").is_file()
    assert [line.split("│")[2].strip() for line in done.output.splitlines() if "│" in line] == ["2", "2"]
    augment = json.loads((tmp_path / "run/augmented/seed_1/result.json").read_text())["config"]["model"]["augment"]
    assert augment == 1

    resumed = train_cli("ckpt_path=run/augmented/seed_1/checkpoints/last.ckpt", "trainer.max_epochs=2")
    assert resumed.code == 0, resumed.output
    result = json.loads((tmp_path / "run/augmented/seed_1/result.json").read_text())
    assert (result["arm"], result["seed"], result["epochs"]) == ("augmented", 1, 2)


def test_a_mistake_in_the_last_arm_is_said_before_the_first_trains(train_cli: Cli, tmp_path: Path) -> None:
    done = train_cli("+experiment=digits", "model.field_args.activation_name=relu", "hydra.run.dir=run")
    assert done.code == 2
    assert "unknown key 'model.field_args'" in done.output
    assert not (tmp_path / "run" / "ode_net").exists()


def test_sweep(train_cli: Cli, tmp_path: Path) -> None:
    done = train_cli("-m", *SHORT, "trainer.max_epochs=1", "optimizer.lr=0.01,0.02", "hydra.sweep.dir=sweep")
    assert done.code == 0, done.output
    rates = [json.loads(p.read_text())["config"]["optimizer"]["lr"] for p in sorted(tmp_path.rglob("result.json"))]
    assert rates == [0.01, 0.02]
    wrong = train_cli("-m", "solver.method=dopri5,dopr5", *SHORT, "trainer.max_epochs=1")
    assert wrong.code == 2
    assert "did you mean 'dopri5'" in wrong.output


def test_two_processes(train_cli: Cli, tmp_path: Path) -> None:
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    done = train_cli(*SHORT, *ddp, "hydra.run.dir=run", "data.batch_size=16")
    assert done.code == 0, done.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 4  # 64 samples, 2 processes with 16 each, 2 epochs
    assert done.output.count("run:  ") == 1
    assert "sync_dist" not in done.output


def test_saved_config_outlives_changed_files(train_cli: Cli, tmp_path: Path) -> None:
    assert train_cli(*SHORT, "hydra.run.dir=run").code == 0
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(saved.read_text().replace("weight_decay: 0.0", "weight_decay: 0.125"))  # what the files once said
    done = train_cli("ckpt_path=run/checkpoints/last.ckpt", "trainer.max_epochs=3")
    assert done.code == 0, done.output
    assert "keeping 0.125" in done.output
    assert json.loads((tmp_path / "run" / "result.json").read_text())["config"]["optimizer"]["weight_decay"] == 0.125
    # what the command line names is as it says, also where the files say the same
    named = train_cli("ckpt_path=run/checkpoints/last.ckpt", "trainer.max_epochs=4", "optimizer.weight_decay=0.0")
    assert named.code == 0, named.output
    assert "keeping" not in named.output
    assert json.loads((tmp_path / "run" / "result.json").read_text())["config"]["optimizer"]["weight_decay"] == 0.0
