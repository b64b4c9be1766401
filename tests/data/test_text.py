"""Windows of a text, the vocabulary, and texts that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuralode.data import Text
from neuralode.errors import UsageError
from neuralode.models.language import UNKNOWN, encode

ALPHABET = "abcdefghij"


def text(folder: Path, content: str, **kwargs: object) -> Text:
    path = folder / "text.txt"
    path.write_text(content, encoding="utf-8")
    return Text(str(path), **{"length": 4, "held_back": 0.2, **kwargs})  # type: ignore[arg-type]


def decode(tokens: list[int], vocabulary: str) -> str:
    return "".join(vocabulary[token] for token in tokens)


def test_windows_follow_one_another_and_targets_are_a_character_ahead(tmp_path: Path) -> None:
    splits = text(tmp_path, ALPHABET * 5).splits
    vocabulary = splits.model_args["vocabulary"]
    assert vocabulary == UNKNOWN + ALPHABET
    assert splits.model_args["length"] == 4
    inputs, targets = splits.train
    assert decode(inputs.flatten().tolist(), vocabulary) == (ALPHABET * 3)[:28]
    assert decode(targets.flatten().tolist(), vocabulary) == (ALPHABET * 3)[1:29]
    assert [len(part[0]) for part in (splits.val, splits.test)] == [2, 2]


def test_parts_do_not_overlap_and_unknown_characters_are_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="100% of the characters that test are not in the part"):
        splits = text(tmp_path, "a" * 60 + "b" * 20 + "c" * 20).splits
    assert [set(part[1].flatten().tolist()) for part in (splits.train, splits.val, splits.test)] == [{1}, {0}, {0}]


def test_characters_that_training_has_not_seen_are_unknown() -> None:
    assert encode("abz", UNKNOWN + "ab").tolist() == [1, 2, 0]


def test_the_reference_that_comes_with_python() -> None:
    splits = Text().splits
    assert splits.train[0].shape[1] == 64
    assert len(splits.train[0]) > 1000
    vocabulary = splits.model_args["vocabulary"]
    for part in (splits.val, splits.test):
        assert (part[0] == 0).float().mean() < 0.01
        assert "the " in decode(part[0].flatten().tolist(), vocabulary)


@pytest.mark.parametrize(
    ("content", "settings", "sentence"),
    [
        ("short", {}, "5 characters"),
        ("a" * 100, {"length": 30}, "no window of data.length=30"),
        ("a" * 100, {"length": 0}, r"data\.length is 0"),
        ("a" * 100, {"held_back": 0.5}, r"data\.held_back is 0.5"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(
    content: str, settings: dict[str, float], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=sentence):
        text(tmp_path, content, **settings).splits  # noqa: B018


def test_mark_of_the_byte_order_is_no_character(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_text(ALPHABET * 5, encoding="utf-8-sig")
    marked = Text(str(tmp_path / "marked.txt"), length=4, held_back=0.2)
    assert marked.splits.model_args["vocabulary"] == UNKNOWN + ALPHABET


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\xff\xfe\x00")
    for name in ("picture", "nowhere"):
        with pytest.raises(UsageError, match="give a text file in UTF-8"):
            Text(str(tmp_path / name)).splits  # noqa: B018
