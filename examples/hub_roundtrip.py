"""Publish a policy on the Hub, pull it in another process with an empty cache, and compare the bits after some steps.

    python examples/hub_roundtrip.py                      against a Hub on 127.0.0.1, which needs no account
    python examples/hub_roundtrip.py --real owner/name    against huggingface.co; log in with `hf auth login` first

The repository is made private. The policy is the default one with some noise added, so that it is like no other.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def train(policy: str) -> str:
    """Five steps with the policy: its fingerprint, and the parameters to the last bit."""
    import torch

    from learned_optim import LearnedOptimizer

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 3))
    optimizer = LearnedOptimizer([weight], lr=1e-2, policy=policy)
    for _ in range(5):
        optimizer.zero_grad()
        weight.cos().sum().backward()
        optimizer.step()
    return f"{optimizer.policy.fingerprint()} {weight.detach().numpy().tobytes().hex()}"


def publish(repo: str) -> str:
    """Push a new policy; returns where it is, commit included."""
    import torch

    from learned_optim import Policy

    policy = Policy.from_pretrained("default")
    with torch.no_grad():
        policy.head.add_(0.01 * torch.randn_like(policy.head))
    policy.results = {"notes": ["the default policy with noise added, to try out publishing"]}
    commit = policy.push_to_hub(repo, private=True)
    return f"{repo}@{commit.oid}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", metavar="OWNER/NAME", help="repository on the real Hub to publish in")
    parser.add_argument("--step", nargs=2, metavar=("WHAT", "NAME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(publish(args.step[1]) if args.step[0] == "publish" else train(args.step[1]))
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if not args.real:
            sys.path.insert(0, str(ROOT / "tests"))
            from helpers.loopback_hub import OWNER, LoopbackHub

            environment |= stack.enter_context(LoopbackHub()).environment(folder, OWNER)

        def run(what: str, name: str, cache: str) -> str:
            # Processes of their own: huggingface_hub reads its environment once.
            command = [sys.executable, __file__, "--step", what, name]
            client = {**environment, "HF_HUB_CACHE": str(folder / cache)}
            return subprocess.run(command, env=client, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

        published = run("publish", args.real or "alice/rule", "first")
        print(f"published {published}")
        here, there = run("train", published, "second"), run("train", published, "third")
        print(f"pulled twice: {here.split()[0]}")
        if here != there:
            raise SystemExit("the two differ")
        print("both processes computed the same bits")


if __name__ == "__main__":
    main()
