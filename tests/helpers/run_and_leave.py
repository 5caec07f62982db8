"""Runs a script, as ``python script`` would, and leaves without the interpreter's shutdown.

Threads of torch's gloo backend that still let go of a functional collective's tensors then abort the process now and
then (torch 2.13, "terminate called without an active exception"): on a busy machine 3 of 20 runs of README's block with
``torch.optim.AdamW`` in our place. What the script does, ``destroy_process_group`` included, is over by then.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
