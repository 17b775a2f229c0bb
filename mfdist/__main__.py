"""`python -m mfdist`, for launchers that start modules: `torchrun --nproc-per-node 4 -m mfdist train …`."""

from mfdist.launch.cli import main

if __name__ == "__main__":
    main()
