"""Prepared jobs for the minutes in which there is a GPU, run in order until the minutes are gone.

    python tools/gpu_queue.py --minutes 14 --out gpu-out       # or: make gpu MINUTES=14
    python tools/gpu_queue.py --dry-run                        # what is left, its expected time and the files it writes
    python tools/gpu_queue.py --device cpu --tiny              # all of it in small, to see that it works

Needs a checkout, torch, numpy, safetensors, huggingface-hub and tqdm; nothing is installed or downloaded. Each job is a
process of its own. It gets the time that is left, at most its limit; then SIGTERM, upon which it saves what it has, and
if that takes longer than ``GRACE`` seconds SIGKILL. The same command goes on where the last one stopped. The folder
holds few files, so that it travels: jobs work in ``<folder>-work``, and what is there is packed into ``<job>.tar.gz``
every minute and when the job ends. ``--begin-with`` takes those of another folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Seconds from SIGTERM to SIGKILL, and those that are kept for packing at the end.
GRACE, PACKING = 20.0, 10.0
#: Seconds between two archives of what a job works on.
EVERY = 60.0
STATE = "queue.json"
#: The leg of meta-training: settings of the latest recipe for a GPU.
RECIPE = "pretrained/recipes/gpu.toml"


@dataclasses.dataclass(frozen=True)
class Job:
    """A process to run.

    Args:
        name: of its files.
        about: what it does.
        seconds: that it is expected to take.
        limit: after which it is stopped.
        least: it is not begun with less time than this.
        writes: files in the queue's folder.
        command: arguments of Python; ``{out}``, ``{work}``, ``{seconds}``, ``{minutes}`` are filled in.
        again: whether it goes on when it has ended once: there is always a next leg.
    """

    name: str
    about: str
    seconds: float
    limit: float
    least: float
    writes: tuple[str, ...]
    command: tuple[str, ...]
    again: bool = False


def jobs(options: argparse.Namespace) -> list[Job]:
    """The queue."""
    device, tiny = options.device, ("--tiny",) if options.tiny else ()
    own = ("tools/gpu_queue.py", "--device", device, *tiny, "--settings", str(options.settings), "--work", "{work}")
    more = () if options.cache is None else ("--cache", str(options.cache))
    only = ("--repeats", "1", "--only", "environment", "graph", "launches", "training") if options.tiny else ("--docs",)
    measure = ("tools/measure_gpu.py", "--device", device, "--out", "{out}/gpu.json", "--seconds", "{seconds}", *only)
    return [
        Job("measure", "the graph, step times, agreement, memory: docs/gpu.md", 90, 200, 60,
            ("gpu.json", "gpu.md"), measure),
        Job("meta_train", f"the next leg of meta-training, {options.settings}", 540, 540, 120,
            ("meta_train.tar.gz",), (*own, "--job", "meta_train", "--minutes", "{minutes}"), again=True),
        Job("scale", "the next cells of the scale table", 240, 3600, 60,
            ("scale.tar.gz",), (*own, *more, "--job", "scale", "--minutes", "{minutes}"), again=True),
    ]  # fmt: skip


class Queue:
    """The jobs of a folder, and what has become of them.

    Args:
        folder: for all that is written.
        queue: the jobs in order.
    """

    def __init__(self, folder: Path, queue: Sequence[Job]) -> None:
        self.folder, self.jobs = folder, queue
        path = folder / STATE
        self.state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def left(self) -> list[Job]:
        """What is still to be done; what always goes on comes after what has not been done."""
        undone = [job for job in self.jobs if self.state.get(job.name, {}).get("ended") != "done"]
        return undone + [job for job in self.jobs if job.again and job not in undone]

    def run(self, minutes: float) -> None:
        """All that fits."""
        deadline = time.monotonic() + 60.0 * minutes
        self.folder.mkdir(parents=True, exist_ok=True)
        for job in self.left():
            seconds = min(job.limit, deadline - time.monotonic() - GRACE - PACKING)
            if seconds < min(job.least, 60.0 * minutes / 4):
                print(f"{job.name}: not begun, {max(seconds, 0.0):.0f} s are left of the {job.least:.0f} that it needs")
                continue
            self._run(job, seconds)

    def _run(self, job: Job, seconds: float) -> None:
        print(f"{job.name}: {job.about}; {job.seconds:.0f} s expected, {seconds:.0f} s at most", flush=True)
        work = self.folder.with_name(f"{self.folder.name}-work") / job.name
        archive = self.folder / f"{job.name}.tar.gz"
        keeps = archive.name in job.writes
        if keeps and archive.is_file() and not work.is_dir():
            unpack(archive, work)
        work.mkdir(parents=True, exist_ok=True)
        fill = {"out": self.folder, "work": work, "seconds": f"{seconds:.0f}", "minutes": f"{seconds / 60.0:.3f}"}
        command = [sys.executable, *(argument.format(**fill) for argument in job.command)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        begun = time.monotonic()
        with open(self.folder / "queue.log", "a", encoding="utf-8") as log:
            log.write(f"== {job.name}: {' '.join(command)}\n")
            log.flush()
            env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
            try:
                code, stopped = self._wait(process, begun + seconds, work if keeps else None, archive)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if keeps:
            pack(work, archive)
        ended = "stopped" if stopped else "done" if code == 0 else "failed"
        before = self.state.get(job.name, {"runs": 0, "seconds": 0.0})
        took = time.monotonic() - begun
        self.state[job.name] = {"ended": ended, "status": code, "runs": before["runs"] + 1,
                                "seconds": round(before["seconds"] + took, 1)}  # fmt: skip
        (self.folder / STATE).write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
        print(f"{job.name}: {ended} after {took:.0f} s", flush=True)
        if ended == "failed":
            print("".join((self.folder / "queue.log").read_text(encoding="utf-8").splitlines(True)[-15:]), flush=True)

    def _wait(self, process: subprocess.Popen, end: float, work: Path | None, archive: Path) -> tuple[int, bool]:
        """Its status, and whether it had to be stopped."""
        packed, stopped = time.monotonic(), False
        while process.poll() is None:
            now = time.monotonic()
            if now > end and not stopped:
                process.send_signal(signal.SIGTERM)
                stopped = True
            elif now > end + GRACE:
                process.kill()
            elif work is not None and now - packed > EVERY:
                pack(work, archive)
                packed = now
            time.sleep(0.2)
        return process.returncode, stopped

    def listed(self) -> str:
        """For ``--dry-run``."""
        lines = []
        for job in self.jobs:
            state = self.state.get(job.name)
            then = f"{state['ended']}, {state['seconds']:.0f} s so far" if state else "not run yet"
            lines += [f"{job.name}: {job.about}",
                      f"    {then}; {job.seconds:.0f} s expected, begun with {job.least:.0f} s or more",
                      f"    writes {', '.join(job.writes)}",
                      f"    python {' '.join(job.command)}"]  # fmt: skip
        return "\n".join(lines)


def pack(folder: Path, archive: Path) -> None:
    """The folder as an archive, which is replaced when the new one is whole."""
    new = archive.with_suffix(".new")
    with tarfile.open(new, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                try:
                    tar.add(path, path.relative_to(folder))
                except FileNotFoundError:  # a checkpoint that has just been replaced by the next one
                    continue
    new.replace(archive)


def unpack(archive: Path, folder: Path) -> None:
    """Into a folder that is not there yet."""
    new = folder.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        tar.extractall(new, filter="data")
    new.replace(folder)


def meta_train_leg(options: argparse.Namespace) -> None:
    """Go on from the newest checkpoint of the folder, or begin with the recipe; what was there is copied aside."""
    from learned_optim.meta_train import MetaTrainConfig, meta_train

    config = MetaTrainConfig.from_file(ROOT / options.settings)
    changes: dict[str, Any] = {"device": options.device, "outer_steps": 100_000, "save_every": 1}
    if options.tiny:
        changes |= {"outer_steps": 2, "pairs": 2, "meta_batch": 2, "tasks": ("noisy_quadratic",), "max_length": 0,
                    "backend": "eager", "validate_every": 0, "parts": ("pace",), "workers": 1}  # fmt: skip
    known = {field.name for field in dataclasses.fields(config)}
    config = MetaTrainConfig.from_dict({**config.to_dict(), **{k: v for k, v in changes.items() if k in known}})
    run, aside = options.work / "run", options.work / "before"
    if run.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(run, aside)
    meta_train(config, out=run, resume=run.is_dir(), show_progress=True)


def scale_cells(options: argparse.Namespace) -> None:
    """The next cells of the scale table that end in time; those that are begun go on first."""
    from learned_optim.bench.quality import load_policies
    from learned_optim.bench.scale.config import ScaleConfig
    from learned_optim.bench.scale.suite import Scale

    models = ("images-0.3M",) if options.tiny else ()
    cells = ("*.default.*",) if options.tiny else ()
    config = ScaleConfig(policies=("default", "pretraining"), device=options.device, minutes=options.minutes,
                         quick=options.tiny, models=models, cells=cells, cache=options.cache)  # fmt: skip
    scale = Scale(config, load_policies(config.policies), options.work)
    complete = scale.run(lambda what, left: print(f"{what}; {len(left)} cells missing", flush=True))
    print("no cell is missing" if complete else "time is up")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-out")))
    parser.add_argument(
        "--begin-with", type=Path, metavar="DIR", help="copy queue.json and the archives from here first"
    )
    parser.add_argument("--settings", default=RECIPE, help="recipe of the leg of meta-training")
    parser.add_argument("--cache", type=Path, help="folder of the scale table's text")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="everything in small: a look at the queue")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--job", choices=("meta_train", "scale"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.job:
        {"meta_train": meta_train_leg, "scale": scale_cells}[options.job](options)
        return
    out = options.out.resolve()
    if options.begin_with is not None and not (out / STATE).exists():
        out.mkdir(parents=True, exist_ok=True)
        for path in [*options.begin_with.glob("*.tar.gz"), *options.begin_with.glob(STATE)]:
            shutil.copy2(path, out / path.name)
    queue = Queue(out, jobs(options))
    if options.dry_run:
        print(queue.listed())
        return
    queue.run(options.minutes)


if __name__ == "__main__":
    main()
