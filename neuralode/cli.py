"""The command line: composes first, so that a slip is answered with a sentence, then hands over to Hydra."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from neuralode.errors import Stopped, UsageError, stop_at_once, unknown
from neuralode.overrides import key_of, normalised, value_of, with_saved


def config_dir() -> Path:
    """The folder of the configs: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def main() -> None:
    """`python train.py` and `neuralode-train`: exits 0, or with a code and one sentence that says what to do."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop_at_once)  # where nothing needs saving; the training loop has its own handler
    sys.path.insert(0, os.getcwd())  # where `model.field=my_module.MyField` is looked for
    arguments = get_args_parser().parse_args()
    runs = not (arguments.help or arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion)
    try:
        if runs:
            overrides = [normalised(o) for o in with_saved(arguments.overrides)]
            sys.argv[1:] = [a for a in sys.argv[1:] if a not in arguments.overrides] + overrides
            for variant in _variants(overrides) if arguments.multirun else [overrides]:
                check(variant)
        _hand_over()
    except UsageError as error:
        _complain(error)


def check(overrides: list[str]) -> None:
    """Composes the config of a command line. Raises UsageError with one sentence for whatever is wrong with it."""
    ours = [o for o in overrides if not key_of(o).startswith("hydra")]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            cfg = compose("train", overrides=ours)
        except (HydraException, OverrideParseException) as error:
            raise UsageError(_explain(error, ours)) from error
    if not cfg.fit and not cfg.test:
        raise UsageError("fit=false and test=false leave nothing to do; set one of them to true.")
    if not cfg.fit and cfg.ckpt_path is None:
        raise UsageError("fit=false needs a trained model: give ckpt_path=<run>/checkpoints/best.ckpt.")
    given = {key: value_of(overrides, key) for key in ("hydra.run.dir", "hydra.sweep.dir")}
    folders = {key: folder for key, folder in given.items() if folder} or {"paths.runs": str(cfg.paths.runs)}
    for key, folder in folders.items():
        if "${" not in folder:
            _make_folder(key, Path(folder))


def _make_folder(key: str, folder: Path) -> None:
    """Makes the folder of the runs, before Hydra does. Raises UsageError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(f"{key}={folder}: {error.strerror or error}; give a folder that can be written to.") from error


def list_experiments() -> str:
    """A line for each experiment: its name and what it shows. For `--help`."""
    lines = []
    for file in sorted((config_dir() / "experiment").glob("*.yaml")):
        shows = yaml.safe_load(file.read_text()).get("shows", "")
        lines.append(f"  {file.stem:<22} {shows}")
    return "\n".join(lines).replace("$", "$$")


def named_for(data: DictConfig) -> str:
    """What a run is called that no experiment names: after the file of its data, the data set, or the kind of data."""
    if data.get("path") is not None:
        return re.sub(r"[^\w.-]+", "_", Path(str(data["path"])).stem)  # it becomes a folder's name
    return str(data.get("dataset") or data["name"])


# `now` has a value for all of a sweep, and so has the name, which puts its runs into one folder
OmegaConf.register_new_resolver("experiments", list_experiments, replace=True)
OmegaConf.register_new_resolver("named_for", named_for, replace=True)
OmegaConf.register_new_resolver("first", str, replace=True, use_cache=True)


def _hand_over() -> None:
    """Lets Hydra compose the config and run the job or jobs, then reports."""
    failures: list[Exception] = []
    files: list[Path] = []

    def job(cfg: DictConfig) -> None:
        try:
            from neuralode.experiment import run  # here, since Lightning takes seconds to import

            files.extend(run(cfg))
        except Exception as error:  # caught before Hydra prints a traceback
            if not _is_sweep():
                _complain(error)
            failures.append(error)  # a sweep goes on with its other jobs
            _tell(error)
        except Stopped as stop:
            _tell_notes(stop)
            raise

    try:
        hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")(job)()
    except Exception as error:
        _complain(error)
    if files and _is_first_process():
        from neuralode.experiment import report

        report(files)
    if failures:
        sys.exit(_exit_code(failures[0]))


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _is_first_process() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _variants(overrides: list[str]) -> Iterable[list[str]]:
    """For a sweep: the first value of every override, then each further value in its place."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [
        [f"{text.split('=', 1)[0]}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override() else [text]
        for o, text in zip(parsed, overrides, strict=True)
    ]
    first = [v[0] for v in values]
    others = ([*first[:i], other, *first[i + 1 :]] for i, v in enumerate(values) for other in v[1:])
    return chain([first], others)


def _explain(error: Exception, overrides: list[str]) -> str:
    """One sentence for what Hydra says in several lines."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        given = str(getattr(error, "override", None) or text.splitlines()[0])
        return f"cannot read {given!r} on the command line; write key=value, and quote values with spaces or commas."
    if isinstance(error, MissingConfigException):
        missing = re.search(r"Could not find '([^']+)'", text)
        if missing and "/" in missing[1]:
            group, name = missing[1].rsplit("/", 1)
            return unknown(group, name, (f.stem for f in (config_dir() / group).glob("*.yaml")))
    if isinstance(error, ConfigCompositionException):
        key = re.search(r"Could not (?:override|append to config|delete from config)[^']*'\+?~?([^'=]+)", text)
        if key and (config_dir() / key[1]).is_dir() and key[1] == "experiment":
            return f"an experiment is added, not overridden: write +experiment={value_of(overrides, 'experiment')}."
        if key:
            return unknown("key", key[1], _known_keys(key[1], overrides))
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _known_keys(key: str, overrides: list[str]) -> list[str]:
    """The keys that exist beside `key`, in the config without the override that failed."""
    try:
        cfg: Any = compose("train", overrides=[o for o in overrides if key_of(o) != key])
    except HydraException:
        cfg = compose("train")
    parent, _, _ = key.rpartition(".")
    prefix = ""
    for part in parent.split(".") if parent else []:
        if not isinstance(cfg, DictConfig) or part not in cfg:
            break
        cfg, prefix = cfg[part], f"{prefix}{part}."
    return [prefix + str(name) for name in cfg] if isinstance(cfg, DictConfig) else []


def _exit_code(error: Exception) -> int:
    return 2 if isinstance(error, UsageError) else 1


def _complain(error: Exception) -> None:
    _tell(error)
    sys.exit(_exit_code(error))


def _tell(error: Exception) -> None:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
        return
    print(f"error: {_in_words(error)}", file=sys.stderr, flush=True)
    _tell_notes(error)


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full. What was saved is intact: free some space, then go on from the last checkpoint."
    sentence = str(error).strip() or "no further message"
    known = isinstance(error, UsageError) or type(error).__name__ in ("SolveError", "MisconfigurationException")
    kind = "" if known else f"{type(error).__name__}: "
    hint = "" if isinstance(error, UsageError) else "\n(HYDRA_FULL_ERROR=1 shows where it happened.)"
    return f"{kind}{sentence}{hint}"


def _tell_notes(error: BaseException) -> None:
    for note in getattr(error, "__notes__", ()) if _is_first_process() else ():
        print(note, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
