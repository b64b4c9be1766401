"""Language models: shapes, causality, the tie between blocks and Euler steps, writing, and learning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import neuralode
from neuralode.errors import UsageError
from neuralode.models.language import UNKNOWN, LanguageModel, ODETransformer, Transformer, encode, vocabulary_of
from neuralode.models.saved import KEY, describe
from neuralode.ode import SolverConfig

VOCABULARY = vocabulary_of("abcd")
STRICT = SolverConfig(rtol=1e-5, atol=1e-6)


def models() -> list[LanguageModel]:
    torch.manual_seed(0)
    return [ODETransformer(VOCABULARY, 8, STRICT, width=16), Transformer(VOCABULARY, 8, width=16, blocks=2)]


def test_vocabulary_begins_with_the_unknown() -> None:
    assert vocabulary_of("cab" + UNKNOWN) == UNKNOWN + "abc"


@pytest.mark.parametrize("length", [1, 5, 8])
def test_logits_for_every_position(length: int) -> None:
    tokens = torch.randint(5, (3, length))
    for model in models():
        logits = model(tokens)
        assert logits.shape == (3, length, 5)
        logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_no_position_sees_a_later_one() -> None:
    tokens = torch.randint(5, (1, 8))
    changed = torch.cat([tokens[:, :5], (tokens[:, 5:] + 1) % 5], dim=1)
    for model in models():
        model = model.double()
        if isinstance(model, ODETransformer):
            model.block.solver = SolverConfig(method="rk4", step_size=0.25)  # shared steps are no channel then
        before, after = model(tokens), model(changed)
        torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-12)
        assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-3


def test_a_block_is_a_step_of_eulers_method() -> None:
    torch.manual_seed(0)
    blocks = Transformer(VOCABULARY, 8, width=16, blocks=3)
    for block in blocks.body[1:]:
        block.field.load_state_dict(blocks.body[0].field.state_dict())
    euler = SolverConfig(method="euler", step_size=1.0, t_span=[0.0, 3.0])
    flow = ODETransformer(VOCABULARY, 8, euler, width=16, field_args={"time": False})
    for part in ("stem", "head"):
        getattr(flow, part).load_state_dict(getattr(blocks, part).state_dict())
    flow.block.field.load_state_dict(blocks.body[0].field.state_dict())
    tokens = torch.randint(5, (2, 8))
    torch.testing.assert_close(flow(tokens), blocks(tokens))


def test_along_depth_begins_at_the_stem_and_ends_at_the_answer() -> None:
    model, tokens = models()[0], torch.randint(5, (2, 8))
    assert isinstance(model, ODETransformer)
    read = model.along_depth(tokens, torch.linspace(0, 1, 5))
    assert read.shape == (5, 2, 8, 5)
    torch.testing.assert_close(read[0], model.head(model.stem(tokens)))
    torch.testing.assert_close(read[-1], model(tokens), rtol=1e-3, atol=1e-4)


def test_writing_goes_on_with_the_prompt_and_follows_its_seed() -> None:
    for model in models():
        first, again, other = (model.write("abz", 20, seed=seed) for seed in (1, 1, 2))
        assert first.startswith("abz")
        assert len(first) == 23
        assert set(first[3:]) <= set("abcd")
        assert first == again != other
        assert model.write("a", 5, temperature=1e-45) == model.write("a", 5, temperature=1e-9)
        for prompt, count, temperature in (("", 3, 1.0), ("a", 3, 0.0), ("a", -1, 1.0)):
            with pytest.raises(UsageError, match="give some text, a number of characters, and a positive temperature"):
                model.write(prompt, count, temperature)


def test_sizes_that_cannot_be() -> None:
    for width, words in ((0, "model.width is 0"), (-4, "model.width is -4")):
        with pytest.raises(UsageError, match=words):
            ODETransformer(VOCABULARY, 8, width=width)


def test_it_learns_an_order_by_heart() -> None:
    tokens = encode("abcdabcda", VOCABULARY)
    for model in models():
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            logits = model(tokens[None, :8])
            loss = torch.nn.functional.cross_entropy(logits[0], tokens[1:9])
            loss.backward()
            optimizer.step()
        assert loss < 0.1
        assert model.write("ab", 6, temperature=0.1) == "abcdabcd"


def test_a_checkpoint_holds_the_vocabulary(tmp_path: Path) -> None:
    args = {"vocabulary": VOCABULARY, "length": 8, "width": 16, "blocks": 2}
    model = Transformer(**args)  # type: ignore[arg-type]
    state = {f"model.{name}": x for name, x in model.state_dict().items()}
    torch.save({KEY: describe("transformer", args), "state_dict": state}, tmp_path / "m.ckpt")
    loaded = neuralode.load(tmp_path / "m.ckpt")
    assert isinstance(loaded, Transformer)
    assert loaded.write("ab", 8) == model.write("ab", 8)
