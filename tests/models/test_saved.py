"""From a checkpoint back to the model, or one sentence saying why not; never code from the checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neuralode import load, register_field
from neuralode.errors import UsageError
from neuralode.models import FIELDS, build_model
from neuralode.models.saved import FORMAT, KEY, PREFIX, describe
from neuralode.ode import SolverConfig

X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))


def model_args() -> dict[str, Any]:
    solver = SolverConfig(method="heun3", step_size=0.25, t_span=[0.0, 2.0], gradient="adjoint")
    return {"features": 2, "classes": 3, "augment": 1, "field_args": {"hidden": [4], "time": True}, "solver": solver}


def checkpoint(name: str = "ode_classifier", args: dict[str, Any] | None = None) -> tuple[dict[str, Any], nn.Module]:
    args = args or model_args()
    model = build_model(name, args)
    weights = {PREFIX + key: value for key, value in model.state_dict().items()}
    return {KEY: describe(name, args), "state_dict": weights, "epoch": 3}, model


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip(tmp_path: Path) -> None:
    content, model = checkpoint()
    loaded = load(write(tmp_path / "a.ckpt", content))
    assert torch.equal(loaded(X), model(X))
    assert not loaded.training
    assert loaded.block.solver == model_args()["solver"]
    assert type(loaded) is type(model)
    assert torch.equal(load(str(tmp_path / "a.ckpt"))(X), model(X)), "a path may be a string"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("linear", {"features": 2}),
        ("two_weights", {"a": 1.5}),
        ("mlp", {"features": 2, "classes": 3, "hidden": [5]}),
        ("trajectory", {"features": 2, "scale": [1.0, 3.0], "learn_initial_state": True, "solver": SolverConfig()}),
        ("conv_ode_net", {"image": [1, 8, 8], "classes": 4, "width": 8, "solver": SolverConfig()}),
        ("resnet", {"image": [1, 8, 8], "classes": 4, "width": 8, "blocks": 1}),
    ],
)
def test_round_trip_of_every_model(name: str, args: dict[str, Any], tmp_path: Path) -> None:
    content, model = checkpoint(name, args)
    loaded = load(write(tmp_path / "a.ckpt", content))
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }


def test_type_of_the_weights_is_kept(tmp_path: Path) -> None:
    content, model = checkpoint()
    content["state_dict"] = {key: value.double() for key, value in content["state_dict"].items()}
    final = load(write(tmp_path / "a.ckpt", content))(X.double())
    assert final.dtype == torch.float64
    torch.testing.assert_close(final, model.double()(X.double()))


def test_description_is_plain() -> None:
    args = checkpoint()[0][KEY]["args"]
    assert isinstance(args["solver"], dict)
    assert args["solver"]["method"] == "heun3"


def test_weights_beside_the_model_are_left_alone(tmp_path: Path) -> None:
    content, model = checkpoint()
    content["state_dict"]["metric.total"] = torch.zeros(1)
    assert torch.equal(load(write(tmp_path / "a.ckpt", content))(X), model(X))


def test_no_such_file(tmp_path: Path) -> None:
    assert "there is no checkpoint" in refusal(tmp_path / "none.ckpt")
    assert "there is no checkpoint" in refusal(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.ckpt", checkpoint()[0]).read_bytes()
    for damaged in (b"", b"not a checkpoint", b"\x80\x02}q\x00.", whole[:100], whole[: len(whole) // 2], whole[:-20]):
        path = tmp_path / "damaged.ckpt"
        path.write_bytes(damaged)
        assert "is not a checkpoint of neuralode, or it is damaged" in refusal(path)


def test_damaged_pickle(tmp_path: Path) -> None:
    (tmp_path / "damaged.ckpt").write_bytes(b".")
    assert "is not a checkpoint of neuralode, or it is damaged" in refusal(tmp_path / "damaged.ckpt")


@pytest.mark.parametrize("found", [FORMAT + 1, None])
def test_wrong_format(found: int | None, tmp_path: Path) -> None:
    content, _ = checkpoint()
    content[KEY]["format"] = found
    message = refusal(write(tmp_path / "a.ckpt", content))
    assert f"format {found}; this version reads format {FORMAT}" in message


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.ones(2)], ids=["lightning", "list", "tensor"])
def test_foreign_checkpoint(content: object, tmp_path: Path) -> None:
    assert "not a checkpoint of neuralode" in refusal(write(tmp_path / "a.ckpt", content))


def test_unknown_names(tmp_path: Path) -> None:
    content, _ = checkpoint()
    content[KEY]["model"] = "ode_clasifier"
    assert "did you mean 'ode_classifier'?" in refusal(write(tmp_path / "a.ckpt", content))
    content, _ = checkpoint()
    content[KEY]["args"]["classs"] = 3
    assert "unknown argument 'classs'; did you mean 'classes'?" in refusal(write(tmp_path / "a.ckpt", content))


def _without_weights(content: dict[str, Any]) -> None:
    content["state_dict"] = {}


def _without_states(content: dict[str, Any]) -> None:
    del content["state_dict"]


def _other_size(content: dict[str, Any]) -> None:
    content[KEY]["args"]["classes"] = 7


def _other_solver(content: dict[str, Any]) -> None:
    content[KEY]["args"]["solver"]["tolerance"] = 1e-3


@pytest.mark.parametrize("change", [_without_weights, _without_states, _other_size, _other_solver])
def test_checkpoint_that_does_not_fit_its_description(change: Any, tmp_path: Path) -> None:
    content, _ = checkpoint()
    change(content)
    refusal(write(tmp_path / "a.ckpt", content))


class Payload:
    """Unpickling this creates the file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    content, _ = checkpoint()
    content["extra"] = Payload(tmp_path / "ran")
    path = write(tmp_path / "a.ckpt", content)
    assert "is not a checkpoint of neuralode, or it is damaged" in refusal(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload works, so that it was load that held it back"


def test_dotted_field_is_refused_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unheard_of.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    content, model = checkpoint()
    content[KEY]["args"]["field"] = "unheard_of.Field"
    path = write(tmp_path / "a.ckpt", content)
    assert "register_field('unheard_of.Field', TheClass)" in refusal(path)
    assert "unheard_of" not in sys.modules

    monkeypatch.setitem(FIELDS, "unheard_of.Field", None)  # forgotten again after the test
    register_field("unheard_of.Field", FIELDS["mlp"])
    assert torch.equal(load(path)(X), model(X))
