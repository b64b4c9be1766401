"""Language models of characters: depth as time, and the transformer of separate blocks that it is compared with."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.models.registry import build_field, register_model
from neuralode.nn import AttentionField, ODEBlock
from neuralode.ode import SolverConfig

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""The first character of every vocabulary, for those that it does not hold."""


def vocabulary_of(text: str) -> str:
    """The characters of a text, in order, after UNKNOWN."""
    return UNKNOWN + "".join(sorted(set(text) - {UNKNOWN}))


def encode(text: str, vocabulary: str) -> torch.Tensor:
    """The places of the characters in the vocabulary, [L]; 0 for those that are not in it."""
    places = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([places.get(character, 0) for character in text], dtype=torch.long)


class LanguageModel(nn.Module, abc.ABC):
    """Tokens [B, L] to logits [B, L, classes] of the token that comes next, L being at most `length`.

    Args:
        vocabulary: the characters, UNKNOWN first.
        length: the most positions that it sees.
        width: size of each position's state.
    """

    def __init__(self, vocabulary: str, length: int, width: int):
        super().__init__()
        if width < 1:
            raise UsageError(f"model.width is {width}; it has to be at least 1.")
        self.vocabulary, self.length = vocabulary, length
        self.stem = _Embedding(len(vocabulary), length, width)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(vocabulary)))

    @abc.abstractmethod
    def forward(self, tokens: torch.Tensor) -> torch.Tensor: ...

    @torch.no_grad()
    def write(self, prompt: str, count: int, temperature: float = 0.8, seed: int = 0) -> str:
        """Goes on with a text, one character after the other.

        Args:
            prompt: what to go on with; at least one character. Those that the vocabulary lacks all look the same to it.
            count: characters to write.
            temperature: below 1 the likelier ones come more often; positive.
            seed: of the draws.
        """
        if not prompt or not temperature > 0 or count < 0:
            raise UsageError(
                f"prompt={prompt!r}, count={count}, temperature={temperature}: give some text, a number of characters, "
                "and a positive temperature."
            )
        device = next(self.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        tokens = encode(prompt, self.vocabulary).tolist()
        for _ in range(count):
            logits = self(torch.tensor([tokens[-self.length :]], device=device))[0, -1, 1:].cpu()  # never UNKNOWN
            chances = ((logits - logits.max()).double() / temperature).softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator)
            tokens.append(1 + int(drawn))
        return prompt + "".join(self.vocabulary[token] for token in tokens[len(prompt) :])


@register_model("ode_transformer")
class ODETransformer(LanguageModel):
    """A transformer of one block, whose depth is time: the positions flow along one vector field.

    Args:
        vocabulary, length, width: as in LanguageModel.
        solver: how to solve.
        field, field_args: registered name and arguments of the vector field, over states [B, L, width].
    """

    def __init__(
        self,
        vocabulary: str,
        length: int,
        solver: SolverConfig | None = None,
        width: int = 64,
        field: str = "attention",
        field_args: dict[str, Any] | None = None,
    ):
        super().__init__(vocabulary, length, width)
        self.block = ODEBlock(build_field(field, width, field_args or {}), solver)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.stem(tokens)))

    def along_depth(self, tokens: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What the head would say at each time of the depth, [T, B, L, classes]."""
        return self.head(self.block.solve(self.stem(tokens), times).ys)


@register_model("transformer")
class Transformer(LanguageModel):
    """The transformer of the same stem, width and head, with blocks of their own weights (Vaswani et al. 2017).

    Args:
        vocabulary, length, width: as in LanguageModel.
        blocks: number of blocks, each an Euler step of size 1 along an AttentionField of its own.
        heads, hidden, activation_name: as in AttentionField.
    """

    def __init__(
        self,
        vocabulary: str,
        length: int,
        width: int = 64,
        blocks: int = 4,
        heads: int = 4,
        hidden: int | None = None,
        activation_name: str = "silu",
    ):
        super().__init__(vocabulary, length, width)
        self.body = nn.Sequential(
            *(_Residual(AttentionField(width, heads, hidden, activation_name, time=False)) for _ in range(blocks))
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(tokens)))


class _Residual(nn.Module):
    """y + f(y)."""

    def __init__(self, field: AttentionField):
        super().__init__()
        self.field = field

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return y + self.field(y.new_zeros(()), y)


class _Embedding(nn.Module):
    """Tokens [B, L] as states [B, L, width]: what a token is, and where it stands."""

    def __init__(self, classes: int, length: int, width: int):
        super().__init__()
        self.token, self.position = nn.Embedding(classes, width), nn.Embedding(length, width)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.token(tokens) + self.position.weight[: tokens.shape[1]]
