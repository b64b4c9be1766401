"""Text, a character a token."""

from __future__ import annotations

import warnings

import torch

from neuralode.data.module import ArrayData, Splits, read_text
from neuralode.errors import UsageError
from neuralode.models.language import encode, vocabulary_of

_MANY = 0.05
"""Share of unknown characters from which on a score says little."""


class Text(ArrayData):
    """Windows of a text: characters [length] to the characters that follow each of them, [length].

    The text is cut into three parts, the first to train, the last to test, and each part into windows that follow
    one another. The vocabulary is that of the first part.

    Args:
        path: a text file in UTF-8; if None, the language reference that comes with Python (465,000 characters in 3.11),
            which differs a little from one version to the next.
        length: characters in a window.
        held_back: share of the text that validates, and share that tests.
        batch_size, eval_batch_size: as in ArrayData.
    """

    def __init__(
        self,
        path: str | None = None,
        length: int = 64,
        held_back: float = 0.05,
        batch_size: int | None = 64,
        eval_batch_size: int | None = 256,
    ):
        super().__init__(batch_size, eval_batch_size)
        if length < 1:
            raise UsageError(f"data.length is {length}; it has to be at least 1.")
        if not 0 < held_back < 0.5:
            raise UsageError(f"data.held_back is {held_back}; it has to be between 0 and 0.5.")
        self.path, self.length, self.held_back = path, length, held_back

    def load(self) -> Splits:
        text = python_reference() if self.path is None else read_text(self.path, "a text file in UTF-8")
        held = int(len(text) * self.held_back)
        if held <= self.length:
            raise UsageError(
                f"the text has {len(text)} characters, of which data.held_back={self.held_back} leaves {held} to "
                f"validate; that is no window of data.length={self.length} and the character after it."
            )
        parts = text[: len(text) - 2 * held], text[len(text) - 2 * held : len(text) - held], text[len(text) - held :]
        vocabulary = vocabulary_of(parts[0])
        train, val, test = (_windows(encode(part, vocabulary), self.length) for part in parts)
        unknown = (test[1] == 0).double().mean().item()
        if unknown > _MANY:
            warnings.warn(
                f"{unknown:.0%} of the characters that test are not in the part of the text that trains, and cannot be "
                "found; shuffle the text's paragraphs, or take another.",
                stacklevel=2,
            )
        return Splits(train, val, test, model_args={"vocabulary": vocabulary, "length": self.length})


def python_reference() -> str:
    """The topics of Python's language reference, one after the other."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError("this Python comes without its reference (pydoc_data); give a text file, data.path.") from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def _windows(tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, [N, length] each."""
    count = (len(tokens) - 1) // length
    inputs, targets = tokens[: count * length], tokens[1 : count * length + 1]
    return inputs.reshape(count, length), targets.reshape(count, length)
