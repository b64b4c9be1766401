"""Time series: windows, the fitted part, the records that ship, and CSV files that cannot be used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from neuralode.data import CSV, LynxHare, Spiral
from neuralode.errors import UsageError
from neuralode.ode import solve

RECORD = "# pelts\nday, a, b\n" + "".join(f"{i / 2},{i},{10 * i + 1}\n" for i in range(10))


def series(folder: Path, text: str = RECORD, **kwargs: Any) -> CSV:
    path = folder / "record.csv"
    path.write_text(text)
    return CSV(str(path), **{"time": "day", **kwargs})


def refusal(data: CSV) -> str:
    with pytest.raises(UsageError) as caught:
        data.splits  # noqa: B018
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_whole_record(tmp_path: Path) -> None:
    splits = series(tmp_path).splits
    (y,), (t,) = splits.train, splits.shared["train"]
    assert y.shape == (1, 10, 2)
    assert t.tolist() == [i / 2 for i in range(10)]
    assert y[0, :, 1].tolist() == [10 * i + 1 for i in range(10)]
    assert splits.description == {"names": ["a", "b"], "train_until": None}
    assert splits.model_args["features"] == 2
    assert splits.model_args["scale"] == pytest.approx(y[0].std(0).tolist())


def test_columns_are_chosen_and_ordered(tmp_path: Path) -> None:
    splits = series(tmp_path, columns=["b", "a"]).splits
    assert splits.train[0][0, 3].tolist() == [31.0, 3.0]
    assert splits.description["names"] == ["b", "a"]
    assert series(tmp_path, columns=["b"]).splits.train[0].shape == (1, 10, 1)


def test_windows(tmp_path: Path) -> None:
    splits = series(tmp_path, segment=4, stride=3).splits
    (windows,), (t,) = splits.train, splits.shared["train"]
    assert windows[:, :, 0].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert windows.shape == (3, 4, 2)
    assert t.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert splits.val[0].shape == splits.test[0].shape == (1, 10, 2)


@pytest.mark.parametrize("segment", [None, 3])
def test_train_until(segment: int | None, tmp_path: Path) -> None:
    splits = series(tmp_path, train_until=2.2, segment=segment).splits
    assert splits.train[0][..., 0].max() == 4, "nothing later is trained on"
    assert splits.val[0][0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert splits.shared["val"][0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert splits.test[0].shape == (1, 10, 2)
    assert len(splits.shared["test"][0]) == 10
    assert splits.description["train_until"] == 2.0, "the last fitted time, of those in the record"
    assert splits.model_args["scale"][0] == pytest.approx(torch.arange(5.0).std().item())


def test_times_reach_every_batch(tmp_path: Path) -> None:
    data = series(tmp_path, segment=3, batch_size=2)
    for windows, times in data.train_dataloader():
        assert len(windows) == 2
        assert times.tolist() == [0.0, 0.5, 1.0]


def test_lynx_and_hare_ship() -> None:
    splits = LynxHare(train_until=1910).splits
    (y,), (t,) = splits.test, splits.shared["test"]
    assert y.shape == (1, 21, 2)
    assert t.tolist() == list(range(1900, 1921))
    assert splits.description == {"names": ["hare", "lynx"], "train_until": 1910.0}
    assert y[0, 0].tolist() == [30.0, 4.0]
    assert splits.val[0].shape == (1, 11, 2)


def test_spiral_follows_its_equation() -> None:
    splits = Spiral(points=60, t_end=3.0, segment=10, stride=5).splits
    assert splits.train[0].shape == (11, 10, 2)
    (y,), (t,) = splits.test, splits.shared["test"]
    assert y[0, 0].tolist() == [2.0, 0.0]
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    wanted = solve(lambda t, y: y**3 @ matrix, y[0, 0], t, method="rk4", step_size=0.002).ys
    torch.testing.assert_close(y[0], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "kwargs", "words"),
    [
        (RECORD, {"columns": ["a", "bb"]}, ["data.columns", "'bb'", "did you mean 'b'"]),
        (RECORD, {"time": "dya"}, ["data.time", "'dya'", "did you mean 'day'"]),
        ("day,a\n0,1\n\n1,x\n", {}, ["line 4", "column 'a'", "'x' is not a number"]),
        ("# note\nday,a\n0,1\n1,\n", {}, ["line 4", "nothing is not a number"]),
        ("day,a\n0,1\n1,2,3\n", {}, ["line 3", "3 values", "2 columns"]),
        ("day,a\n0,1\n1,nan\n2,1\n", {}, ["NaN", "1 of 1 samples"]),
        ("day,a\n0,1\n1,2\n1,3\n", {}, ["times have to rise"]),
        ("day,a\n0,1\nnan,2\n2,3\n", {}, ["times have to rise"]),
        ("day,a\n0,1\n", {}, ["at least two"]),
        ("", {}, ["0 lines", "at least two rows"]),
        ("day\n0\n1\n", {}, ["no column besides the time 'day'", "data.columns"]),
        ("day,a\n0,1\n1,2\n3,4\n", {"segment": 2}, ["equally spaced", "data.segment=null"]),
        (RECORD, {"segment": 11}, ["data.segment=11", "2 to 10 points"]),
        (RECORD, {"segment": 1}, ["data.segment=1", "2 to 10 points"]),
        (RECORD, {"segment": 3, "stride": 0}, ["data.stride=0"]),
        (RECORD, {"segment": 4, "train_until": 1.0}, ["data.segment=4", "2 to 3 points"]),
        (RECORD, {"train_until": 0.4}, ["data.train_until=0.4 leaves 1 points", "from 0 to 4.5"]),
    ],
)
def test_files_that_cannot_be_used(text: str, kwargs: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    message = refusal(series(tmp_path, text, **kwargs))
    for word in words:
        assert word in message


def test_unequal_times_need_no_windows(tmp_path: Path) -> None:
    assert series(tmp_path, "day,a\n0,1\n1,2\n3,4\n").splits.train[0].shape == (1, 3, 1)


def test_no_such_file(tmp_path: Path) -> None:
    message = refusal(CSV(str(tmp_path / "none.csv")))
    assert "none.csv" in message
    assert "give the path of a CSV file" in message
    assert "give the path of a CSV file" in refusal(CSV(str(tmp_path)))


def test_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "record.csv").write_text(RECORD, encoding="utf-16")
    assert "not a text file in UTF-8" in refusal(CSV(str(tmp_path / "record.csv"), time="day"))


def test_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "record.csv").write_text(RECORD, encoding="utf-8-sig")
    assert CSV(str(tmp_path / "record.csv"), time="day").splits.train[0].shape == (1, 10, 2)


def test_column_that_does_not_move_has_a_scale(tmp_path: Path) -> None:
    scale = series(tmp_path, "day,a,b\n0,1,5\n1,2,5\n2,3,5\n").splits.model_args["scale"]
    assert all(s > 0 and math.isfinite(s) for s in scale)


@pytest.mark.parametrize(("origin", "gap"), [(20_000_000, 0.5), (2_460_000, 1 / 24), (1_000_000, 0.3)])
def test_times_keep_their_gaps_in_the_training_type(origin: float, gap: float, tmp_path: Path) -> None:
    text = "day,a\n" + "".join(f"{origin + i * gap!r},{i}\n" for i in range(6))
    message = refusal(series(tmp_path, text))
    assert "too close together for torch.float32" in message
    assert "trainer.precision=64-true" in message
    near = series(tmp_path, "day,a\n" + "".join(f"{1000 + i * gap!r},{i}\n" for i in range(6)))
    assert near.splits.shared["train"][0].diff().tolist() == pytest.approx([gap] * 5, rel=0.01)
