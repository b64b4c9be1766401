"""A run that was stopped anywhere and resumed equals the uninterrupted one bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from neuralode import training
from neuralode.callbacks import ExactResume
from neuralode.errors import Stopped
from tests.conftest import Finished, command, environment

# dropout, shuffling, image shifts and several batches an epoch; 3 epochs of 5 batches
DIGITS = ["data=digits", "data.batch_size=300", "model=resnet", "model.width=8", "model.dropout=0.3",
          "trainer.max_epochs=3", "logger=none", "optimizer.lr=0.003"]  # fmt: skip
VARIANTS = {
    "plain": [],
    "accumulation": ["trainer.accumulate_grad_batches=2"],
    "plateau": ["scheduler=plateau", "scheduler.patience=0", "scheduler.factor=0.1"],
    "validation_inside_the_epoch": ["trainer.val_check_interval=2"],
    "lbfgs": ["optimizer=lbfgs", "optimizer.max_iter=2", "scheduler=none"],
    "adam_then_lbfgs": ["optimizer=adam_lbfgs", "optimizer.adam_steps=6", "optimizer.max_iter=2", "scheduler=none"],
    "ode_net": ["model=conv_ode_net", "model.width=8", "solver.rtol=0.1", "solver.atol=0.1"],
}
# what a run measures of the machine, not of the model
TIMES = {"seconds"}


class StopAt(pl.Callback):
    """Sends the signal that a scheduler would send, in the given hook of the given batch (counted over epochs)."""

    def __init__(self, batch: int, hook: str = "on_train_batch_end"):
        self.batch, self.seen = batch, 0
        setattr(self, hook, self._hook)

    def _hook(self, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    make_config: Callable[..., Any], folder: Path, *overrides: str, stop: StopAt | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Final weights and result of a run, or None and {} if it was stopped."""
    cfg = make_config(*overrides, output=folder)
    built: list[pl.LightningModule] = []
    build, make = training.build_task, training.instantiate

    def remember(*args: Any) -> Any:
        built.append(build(*args))
        return built[-1]

    def with_stop(node: Any, key: str, **kwargs: Any) -> Any:
        if key == "trainer" and stop is not None:
            kwargs["callbacks"] = [*kwargs["callbacks"], stop]
        return make(node, key, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_task", remember)
        patch.setattr(training, "instantiate", with_stop)
        try:
            result = training.train(cfg, folder, list(overrides))
        except Stopped:
            result = {}
    return {k: v.clone() for k, v in built[0].state_dict().items()}, result


def assert_equal(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    for name, weight in one[0].items():
        assert torch.equal(weight, other[0][name]), name
    assert one[1]["metrics"] == other[1]["metrics"]
    assert one[1]["solver"] == other[1]["solver"]
    assert (one[1]["steps"], one[1]["epochs"]) == (other[1]["steps"], other[1]["epochs"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 5, 7, 14])
def test_resumed_run_equals_uninterrupted(variant: str, batch: int, make_config: Callable, tmp_path: Path) -> None:
    overrides = [*DIGITS, *VARIANTS[variant]]
    whole = fit(make_config, tmp_path / "whole", *overrides)
    _, stopped = fit(make_config, tmp_path / "part", *overrides, stop=StopAt(batch))
    assert not stopped, "the signal did not stop the run"
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    resumed = fit(make_config, tmp_path / "part", *overrides, f"ckpt_path='{last}'")
    assert_equal(whole, resumed)


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_train_epoch_end", "on_train_batch_start"])
def test_signal_in_any_hook(hook: str, make_config: Callable, tmp_path: Path) -> None:
    whole = fit(make_config, tmp_path / "whole", *DIGITS)
    _, stopped = fit(make_config, tmp_path / "part", *DIGITS, stop=StopAt(2, hook))
    assert not stopped
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    assert_equal(whole, fit(make_config, tmp_path / "part", *DIGITS, f"ckpt_path='{last}'"))


@pytest.mark.parametrize(("hook", "time"), [("on_validation_batch_start", 3), ("on_train_end", 1)])
def test_signal_after_the_last_batch(hook: str, time: int, make_config: Callable, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    whole = fit(make_config, tmp_path / "whole", *DIGITS)
    assert signal.getsignal(signal.SIGTERM) == before
    _, stopped = fit(make_config, tmp_path / "part", *DIGITS, stop=StopAt(time, hook))
    assert not stopped
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    assert_equal(whole, fit(make_config, tmp_path / "part", *DIGITS, f"ckpt_path='{last}'"))


def test_stopped_twice(make_config: Callable, tmp_path: Path) -> None:
    whole = fit(make_config, tmp_path / "whole", *DIGITS)
    last = f"ckpt_path='{tmp_path / 'part' / 'checkpoints' / 'last.ckpt'}'"
    fit(make_config, tmp_path / "part", *DIGITS, stop=StopAt(3))
    fit(make_config, tmp_path / "part", *DIGITS, last, stop=StopAt(4))
    assert_equal(whole, fit(make_config, tmp_path / "part", *DIGITS, last))


def test_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    class FullDisk:
        fast_dev_run = False

        def save_checkpoint(self, path: Path) -> None:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    last = tmp_path / "last.ckpt"
    last.write_bytes(b"whole")
    with pytest.raises(OSError, match="No space"):
        ExactResume(str(tmp_path))._save(FullDisk(), finished=False)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("last.ckpt", b"whole")]


def test_finished_run_goes_on_with_more_epochs(make_config: Callable, tmp_path: Path) -> None:
    constant = [*DIGITS, "scheduler=none"]
    whole = fit(make_config, tmp_path / "whole", *constant, "trainer.max_epochs=5")
    fit(make_config, tmp_path / "part", *constant)
    last = f"ckpt_path='{tmp_path / 'part' / 'checkpoints' / 'last.ckpt'}'"
    assert_equal(whole, fit(make_config, tmp_path / "part", *constant, "trainer.max_epochs=5", last))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_from_outside(signum: int, code: int, train_cli: Callable[..., Finished], tmp_path: Path) -> None:
    run = ["hydra.run.dir=run", "trainer.max_epochs=12", "callbacks.progress.every_seconds=0"]
    process = subprocess.Popen(
        command(*run), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    time.sleep(0.2)  # somewhere in the middle of an epoch
    process.send_signal(signum)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert "Traceback" not in output

    (told,) = [line for line in output.splitlines() if "ckpt_path=run/checkpoints/last.ckpt" in line]
    resumed = subprocess.run(shlex.split(told.partition(": ")[2]), cwd=tmp_path, env=environment(), timeout=300)
    assert resumed.returncode == 0
    whole = train_cli("hydra.run.dir=whole", "trainer.max_epochs=12")
    assert whole.code == 0, whole.output
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "whole")]
    assert results[0]["metrics"] == results[1]["metrics"]
    weights = [torch.load(tmp_path / n / "checkpoints" / "last.ckpt")["state_dict"] for n in ("run", "whole")]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
