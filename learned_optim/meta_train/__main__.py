"""``python -m learned_optim.meta_train ...``: what ``learned-optim meta-train ...`` does; the form torchrun takes."""

import sys

from learned_optim.cli import main

if __name__ == "__main__":
    sys.exit(main(["meta-train", *sys.argv[1:]]))
