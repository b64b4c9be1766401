"""Train a neural ODE: `python train.py +experiment=moons`; `python train.py --help` lists the experiments."""

from neuralode.cli import main

if __name__ == "__main__":
    main()
