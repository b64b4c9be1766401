"""What the gradient-flow monitor costs: `python benchmarks/monitor.py [digits] [moons] [--repeats 2]`.

Trains an experiment with and without `callbacks=gradient_flow`, at the default cadences and budget, one after the other
in turns in one process, and prints the seconds of the fits, the overhead and the cadences that the budget allowed. The
final weights have to be the same bits. Takes about six minutes on two cores, which should have nothing else to do.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from neuralode.schema import validate
from neuralode.training import train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RUNS = {"digits": ["model=conv_ode_net"], "moons": []}
"""Overrides of each experiment, which is trained with one seed and one arm."""


def fit(name: str, callbacks: str, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """The result of a run, its last weights, and what the monitor says of itself."""
    overrides = [f"+experiment={name}", *RUNS[name], "arms={}", "seeds=[]", "test=false", f"callbacks={callbacks}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides)
    OmegaConf.set_struct(cfg, False)
    cfg.paths.output = str(folder)
    result = train(validate(cfg), folder, overrides)
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    summary = folder / "gradient_flow" / "summary.md"
    return result, weights, summary.read_text().strip().splitlines()[-1] if summary.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(RUNS), help="experiments: digits, moons")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for name in args.names:
        seconds: dict[str, list[float]] = {"default": [], "gradient_flow": []}
        ends: dict[str, dict[str, torch.Tensor]] = {}
        own, said = [], ""
        for _ in range(args.repeats):
            for callbacks in seconds:
                with tempfile.TemporaryDirectory() as folder:
                    result, ends[callbacks], words = fit(name, callbacks, Path(folder))
                seconds[callbacks].append(result["seconds"])
                if callbacks == "gradient_flow":
                    own.append(result["gradient_flow"]["overhead"])
                    said = words
        plain, watched = (statistics.median(values) for values in seconds.values())
        same = all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends.values()), strict=True))
        rows.append(
            f"| {name} | {plain:.1f} | {watched:.1f} | {100 * (watched / plain - 1):.1f} % | "
            f"{100 * statistics.median(own):.1f} % | {'yes' if same else 'NO'} |"
        )
        print(f"{name}: {said}", flush=True)
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}, {args.repeats} repeats\n")
    print("| experiment | seconds | with the monitor | overhead | by its own count | same weights |")
    print("|---|---:|---:|---:|---:|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
