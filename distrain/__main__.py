"""`python -m distrain`, also under torchrun and accelerate launch."""

import sys

from distrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
