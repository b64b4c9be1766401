"""Train a neural ODE: `python train.py +experiment=moons`; `python train.py --help` lists the experiments."""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports, which take seconds
    from neuralode.cli import main

    main()
