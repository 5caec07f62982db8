"""Write the cards of the bundled policies anew: python tools/model_cards.py [--check] [FOLDER ...]

In each folder of pretrained/, ``results.json`` gets what the card says besides the bench's figures: what the policy is
for (``PURPOSES``), what its tasks are called (``TASKS`` of tools/readme_tables.py), the time of a training iteration
over AdamW's, from docs/results/iteration.json, and its habits, from docs/results/habits.json; of ``pretraining``, the
scale suite's figures. README.md and the checksums in config.json follow; weights stay as they are. To be run after a
policy was replaced or measured again. ``--check`` changes nothing and fails if a file is not current.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import readme_tables
import scale_tables

from learned_optim import Policy
from learned_optim.bench.curves import geometric_mean
from learned_optim.bench.habits_report import card_block

PURPOSES = {
    "default": "For networks that are trained from scratch, transformers and vision transformers above all. It "
    "orthogonalises the updates of matrices, as Muon does. For fine-tuning take lr=1e-4. Not for models that are "
    "mostly a large embedding.",
    "pretraining": "For networks of width 128 and more that are trained from scratch for thousands of steps on data "
    "they see few times, as language models are. Matrices of up to 64 rows or columns are updated as by default. Not "
    "for runs of some hundred steps, nor where a training set is to be memorised: default takes a third fewer steps "
    "there.",
    "recurrent": "For research: the classical form of a learned optimizer, a recurrent network per coordinate. All its "
    "weights were learned by back-propagation, by imitating default along its runs; no whole runs were compared. It is "
    "not compiled: a step on one thread of a CPU took ten times as long as with default (270,000 parameters). It takes "
    "24 bytes of state per parameter.",
    "reader": "For a language model that learns while it reads, and for nothing else: it moves the weights of a "
    "trained model after every few words of a text.",
}


def completed(results: dict[str, Any], name: str, measured: readme_tables.Results) -> dict[str, Any]:
    """``results`` of the policy bundled as ``name``, with the purpose, and each task's title and time.

    Raises:
        ValueError: nothing says what this policy is for.
    """
    if name not in PURPOSES:
        raise ValueError(f"what is {name!r} for? Add a sentence to PURPOSES in {Path(__file__).name}")
    made = {"bundled_as": name, "purpose": PURPOSES[name], **copy.deepcopy(results)}
    made["purpose"] = PURPOSES[name]
    if name == "pretraining":
        made["evaluation"] = scale_tables.evaluation_of(name, measured)
    if "habits" in measured and name in measured["habits"]["policies"]:
        made["habits"] = card_block(measured["habits"], name, "learned-optim bench --suite habits")
    iterations = measured["iteration"]["tasks"] if "iteration" in measured else {}
    for task in (made.get("evaluation") or {}).get("tasks") or []:
        task["title"] = readme_tables.title(task)
        ratio = iterations.get(readme_tables.family(task), {}).get("ratio", {}).get(name)
        if ratio is not None:
            task["time_ratio"] = ratio
    _complete_evaluation(made.get("evaluation") or {})
    return made


def _complete_evaluation(evaluation: dict[str, Any]) -> None:
    """The command names its tasks, and means of times are those of the times that the card shows."""
    tasks = evaluation.get("tasks") or []
    if tasks and "--tasks" not in evaluation.get("command", "--tasks"):
        evaluation["command"] += " --tasks " + " ".join(sorted(readme_tables.family(task) for task in tasks))
    if tasks and all("time_ratio" in task and "speedup" in task for task in tasks):
        times = [float(task["time_ratio"]) for task in tasks]
        speedups = [float(task["speedup"]) for task in tasks]
        evaluation["summary"]["time per step, over the reference's"] = float(f"{geometric_mean(times):.4g}")
        in_time = geometric_mean([s / t for s, t in zip(speedups, times, strict=True)])
        evaluation["summary"]["speedup in time, geometric mean"] = float(f"{in_time:.4g}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a card is not current")
    parser.add_argument("folders", nargs="*", type=Path, help="of policies; all of pretrained/ if none is given")
    options = parser.parse_args(arguments)
    found = sorted(path.parent for path in readme_tables.PRETRAINED.glob("*/config.json"))
    measured, stale = readme_tables.Results(), []
    for folder in options.folders or found:
        policy = Policy.from_pretrained(folder.resolve())
        results = completed(policy.results or {}, folder.resolve().name, measured)
        with tempfile.TemporaryDirectory() as temporary:
            policy.save_pretrained(temporary, results)
            made = {path.name: path.read_bytes() for path in Path(temporary).iterdir()}
        if any(not (folder / name).is_file() or (folder / name).read_bytes() != data for name, data in made.items()):
            stale.append(folder)
            if not options.check:
                policy.save_pretrained(folder, results)
                print(f"written: {folder}")
    if options.check:
        for folder in stale:
            print(f"not current: {folder}: run python tools/model_cards.py", file=sys.stderr)
        return int(bool(stale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
