"""Command-line overrides as a list: which key each sets, how two lists merge, and how a resume gets its own back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from neuralode.errors import UsageError
from neuralode.results import comparable, flat


def key_of(override: str) -> str:
    """`optimizer.lr` from `optimizer.lr=0.1`, `experiment` from `+experiment=moons`."""
    return override.split("=", 1)[0].lstrip("+~").strip()


def normalised(override: str) -> str:
    """`++model.field_args.x=1` from `model.field_args.x=1`: which arguments there are is the field's own affair, and
    no YAML lists them, so Hydra would ask for the plus signs."""
    return "++" + override if override.startswith("model.field_args.") else override


def value_of(overrides: list[str], key: str) -> str | None:
    """The value that the list gives to a key, the last one if there are several; without its quotes."""
    values = [o.split("=", 1)[1] for o in overrides if "=" in o and key_of(o) == key]
    return values[-1].strip().strip("'\"") if values else None


def merged(first: list[str], second: list[str]) -> list[str]:
    """Both lists, the second one's word counting where they set the same key."""
    chosen: dict[str, str] = {}
    for override in [*first, *second]:
        chosen.pop(key_of(override), None)
        chosen[key_of(override)] = override
    return list(chosen.values())


def with_saved(overrides: list[str]) -> list[str]:
    """For `ckpt_path=<run>/checkpoints/x.ckpt`: the overrides that made that run, these on top, in its own folder.

    Raises UsageError if the checkpoint does not exist.
    """
    given = value_of(overrides, "ckpt_path")
    if given in (None, "", "null"):
        return overrides
    path = Path(str(given)).expanduser().resolve()
    if not path.is_file():
        raise UsageError(
            f"ckpt_path: there is no checkpoint {given!r}; an earlier run has its own in its folder 'checkpoints'."
        )
    folder = path.parent.parent
    saved = folder / "overrides.yaml"
    if saved.is_file():
        overrides = merged([*read_list(saved), f"hydra.run.dir='{folder}'"], overrides)
    return merged(overrides, [f"ckpt_path='{path}'"])


def keep_saved(cfg: DictConfig, overrides: list[str], overrides_file: Path, config_file: Path) -> DictConfig:
    """`cfg` with every value that the YAML files have changed since the run was started put back.

    What the new command line changed or named stays as it says. `overrides` are the saved ones with its own.
    """
    # without what only says where the run was: its folder may have been moved
    then = comparable(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(config_file))))
    saved = read_list(overrides_file)
    now = _values(compose("train", overrides=saved))
    named = tuple(f"{key_of(override)}." for override in overrides if override not in saved)
    cfg = cfg.copy()
    OmegaConf.resolve(cfg)
    asked = _values(cfg)
    OmegaConf.set_struct(cfg, False)
    for key, value in then.items():
        drifted = key in now and now[key] != value
        if drifted and asked.get(key) == now[key] and not f"{key}.".startswith(named):
            print(f"{key}: keeping {value!r} of the saved config (the files now say {now[key]!r})")
            OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def read_list(file: Path) -> list[str]:
    """The overrides in a file."""
    return [str(override) for override in OmegaConf.load(file)]


def _values(cfg: Any) -> dict[str, Any]:
    return flat(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)))
