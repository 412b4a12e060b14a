"""`python -m perception`, which torchrun starts too: `torchrun --nproc-per-node N -m perception train ...`."""

from perception.cli import main

if __name__ == "__main__":  # processes that are spawned import this module
    main()
