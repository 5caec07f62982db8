"""The subcommands that deal with policies as files: ``info``, ``pull``, ``push``.

torch is imported once a command needs it, which a refusal by the Hub does not.
"""

# ruff: noqa: T201  (printing is what a command line is for)

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from learned_optim.cli.display import print_card, print_heading, print_items, print_table

if TYPE_CHECKING:
    from learned_optim.policy.policy import Policy


#: Beginnings of the lines of an evaluation that are no figures.
_HOW_IT_WAS_MEASURED = ("- suite: ", "- reference: ", "- seeds: ", "- command: ")


@dataclasses.dataclass(frozen=True)
class Info:
    """What a policy is, how it was made and how it did."""

    policy: Annotated[str, Positional, arg(metavar="POLICY")] = "default"
    """Bundled name, folder, or Hub repository (owner/name, owner/name@revision)."""
    revision: Annotated[str | None, arg(metavar="REVISION")] = None
    """Branch, tag or commit of a Hub repository."""
    tasks: bool = False
    """List the task families that policies are trained and measured on, instead."""


@dataclasses.dataclass(frozen=True)
class Pull:
    """Get a policy from the Hugging Face Hub into the cache, and check it.

    HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
    """

    repo: Annotated[str, Positional, arg(metavar="REPO")]
    """Hub repository: owner/name, or owner/name@revision."""
    revision: Annotated[str | None, arg(metavar="REVISION")] = None
    """Branch, tag or commit; the main branch if not given."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Copy the files into this folder as well."""
    force_download: bool = False
    """Download again what is in the cache, in case it was damaged there."""


@dataclasses.dataclass(frozen=True)
class Push:
    """Publish a policy on the Hugging Face Hub. Its model card is made anew from config.json and results.json.

    Log in with `hf auth login`, or set HF_TOKEN.
    """

    folder: Annotated[Path, Positional, arg(metavar="DIR")]
    """Folder of the policy."""
    repo: Annotated[str, Positional, arg(metavar="REPO")]
    """Hub repository owner/name; made if it does not exist."""
    private: bool = False
    """Make a new repository private."""
    create_pr: bool = False
    """Open a pull request instead of committing."""
    revision: Annotated[str | None, arg(metavar="REVISION")] = None
    """Branch to commit to; the main branch if not given."""
    message: Annotated[str | None, arg(metavar="TEXT")] = None
    """Commit message; names the policy's fingerprint if not given."""
    dry_run: bool = False
    """Print the files and the model card that would be published; nothing is sent."""


def info(config: Info) -> None:
    """Print what is known of a policy, or the task families."""
    if config.tasks:
        from learned_optim.tasks import FAMILIES

        rows = [(name, family.split, family.description) for name, family in FAMILIES.items()]
        print_table(rows, header=("family", "split", "what it is"))
        return
    _quiet_client()
    from learned_optim.policy.card import architecture, evaluation, habits, notes, summary, training
    from learned_optim.policy.hub import PullOptions
    from learned_optim.policy.resolve import resolve

    stored = resolve(config.policy, config.revision, PullOptions())
    results = stored.results or {}
    measured = evaluation(results)
    how = [line for line in measured if line.startswith(_HOW_IT_WAS_MEASURED)]
    sections = {
        "The rule": [
            line.replace("- decays ", "- decays: ") for line in architecture(stored.config, stored.weights)[1:]
        ],
        "How it was made": training(results),
        "How it was measured": how,
        "Results": [line for line in measured if line not in how],
        "Over all tasks": summary(results) if (results.get("evaluation") or {}).get("tasks") else [],
        "Habits": habits(results),
    }
    print(stored.source)
    for heading, lines in sections.items():
        if lines:
            print_heading(heading)
            print_card(lines)
    if remarks := notes(results):
        print_heading("Notes")
        print_items(remarks)


def pull(config: Pull) -> None:
    """Pull, check, and copy to a folder if one is given."""
    _quiet_client()
    from learned_optim.policy.hub import PullOptions, fetch, parse_repository

    repo_id, revision = parse_repository(config.repo, config.revision)
    options = PullOptions(force_download=config.force_download)
    pulled = fetch(repo_id, revision, options, with_card=config.out is not None)
    from learned_optim.policy.files import files_in, read, write
    from learned_optim.policy.fingerprint import fingerprint

    stored = read(pulled.folder, f"{repo_id}@{pulled.commit}")
    print(f"pulled {stored.source}, {fingerprint(stored.config, stored.weights)}")
    if config.out is not None:
        out = config.out.expanduser()
        write(files_in(pulled.folder), out)
        print(f"written to {out}")
        _print_use(os.path.join(os.curdir, out))
    else:
        _print_use(stored.source)


def push(config: Push) -> None:
    """Check the folder's policy, and publish it or print what would be published."""
    _quiet_client()
    from learned_optim.policy.filenames import CONFIG
    from learned_optim.policy.hub import check_can_push, parse_repository

    if not (config.folder.expanduser() / CONFIG).is_file():  # nobody should have to log in to hear of this
        what = f"has no {CONFIG}" if config.folder.expanduser().is_dir() else "does not exist"
        raise FileNotFoundError(f"{config.folder} {what}: give the folder of the policy")
    if config.dry_run:
        parse_repository(config.repo)
    else:
        check_can_push(config.repo)
    from learned_optim.policy.policy import Policy

    policy = Policy.from_pretrained(config.folder)
    if config.dry_run:
        _print_dry_run(policy, config.repo)
        return
    commit = policy.push_to_hub(
        config.repo, private=config.private or None, commit_message=config.message, revision=config.revision,
        create_pr=config.create_pr,
    )  # fmt: skip
    print(f"pushed {policy.fingerprint()} to {config.repo}, commit {commit.oid}")
    if commit.pr_url:
        print(f"pull request: {commit.pr_url}")
    _print_use(f"{config.repo}@{commit.oid}")


def _print_dry_run(policy: Policy, repo: str) -> None:
    from learned_optim.policy.filenames import CARD
    from learned_optim.policy.files import pack

    packed = pack(policy.config, policy.weights(), policy.results, repo_id=repo)
    print(f"would push to {repo}:")
    print_table([(n, f"{len(d):,} bytes", f"sha256:{hashlib.sha256(d).hexdigest()}") for n, d in packed.items()])
    print(f"\n{CARD}:\n\n{packed[CARD].decode()}", end="")


def _print_use(policy: str) -> None:
    print(f"use it with LearnedOptimizer(model.parameters(), policy={policy!r})")


def _quiet_client() -> None:
    """Progress bars stay; the client's running commentary on retries does not, for errors are said in one line."""
    if "HF_HUB_VERBOSITY" not in os.environ:
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()
