"""From a checkpoint back to the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.models.registry import build_model
from neuralode.ode import SolverConfig

FORMAT = 1
KEY = "neuralode"
PREFIX = "model."


def describe(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its model: plain values only, so that `weights_only=True` reads it."""
    plain = {key: vars(value) if isinstance(value, SolverConfig) else value for key, value in args.items()}
    return {"format": FORMAT, "model": name, "args": plain}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint's content. Raises UsageError where there is none, or it is damaged or not ours."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {str(path)!r}; give the path of a .ckpt file of an earlier run.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"the checkpoint {str(path)!r} cannot be read: {error.strerror or error}.") from error
    except Exception:  # what a damaged pickle may raise is not documented, and PyTorch's advice is to trust it
        raise UsageError(
            f"{str(path)!r} is not a checkpoint of neuralode, or it is damaged; give the .ckpt file of an earlier run."
        ) from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY), dict):
        raise UsageError(f"{str(path)!r} is not a checkpoint of neuralode: it does not say which model it holds.")
    found = checkpoint[KEY].get("format")
    if found != FORMAT:
        raise UsageError(
            f"{str(path)!r} has checkpoint format {found}; this version reads format {FORMAT}. Use the version of "
            "neuralode that wrote it."
        )
    return checkpoint


def load(path: str | Path) -> nn.Module:
    """The trained model of a checkpoint, in eval mode on the CPU, ready for inference.

    Reads with `weights_only=True` and makes registered models and fields only; a checkpoint that names a field of
    somebody's own is refused with the sentence that says how to register it.

    Raises:
        UsageError: no such file, damaged, not ours, or an unregistered name.
    """
    checkpoint = read_checkpoint(path)
    saved = checkpoint[KEY]
    try:
        args = dict(saved["args"])
        if isinstance(args.get("solver"), dict):
            args["solver"] = SolverConfig(**args["solver"])
        model = build_model(saved["model"], args)
        weights = {k.removeprefix(PREFIX): v for k, v in checkpoint["state_dict"].items() if k.startswith(PREFIX)}
        dtypes = {w.dtype for w in weights.values() if w.is_floating_point()}
        if len(dtypes) == 1:
            model = model.to(dtypes.pop())
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0].rstrip(":. ")
        raise UsageError(
            f"the weights in {str(path)!r} do not fit the model that it describes ({reason}); use another one."
        ) from error
    return model.eval()
