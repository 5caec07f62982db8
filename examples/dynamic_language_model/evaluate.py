"""From text to table and pictures: train the static model, tune the baselines, meta-learn, compare on test articles.

    python examples/dynamic_language_model/evaluate.py --out runs/language-model --quick
    python examples/dynamic_language_model/evaluate.py --out runs/wiki --text folder/with/text/files

Every stage leaves a file in ``--out`` and is not run again while that is there. The test articles are read once, at the
very end, with settings chosen on the validation articles.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from data import Article, Corpus, load
from meta_learn import base_policy, learn
from model import CHOICES, LanguageModel, keep_memory, pretrain
from read import Method, Reader, Reading, cache_losses
from report import NAMES, compare, markdown, quarters
from torch import Tensor
from tuning import BEGIN, cut, mean_loss, thinned, tune, tune_cache

from learned_optim.meta_train.progress import TimedLines, how_far

#: The learned rules, and what each begins with.
LEARNED = {"learned_memory": "rms_memory", "learned": "rms_all"}
CHOICE = {name: choice for name, (_, choice) in BEGIN.items()}
CHOICE |= {name: CHOICE[begin] for name, begin in LEARNED.items()}


def settings(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/language-model"), help="folder for everything made")
    parser.add_argument("--text", default="python", help="'python', or a folder of text files, or a file")
    parser.add_argument("--quick", action="store_true", help="minutes instead of an hour or two")
    parser.add_argument("--shortest", type=int, default=400, help="words; shorter articles are left out")
    parser.add_argument("--longest", type=int, default=4000, help="words; the rest of an article is left out")
    parser.add_argument("--vocabulary", type=int, default=6000, help="words at most")
    parser.add_argument("--width", type=int, default=128, help="of embedding and LSTM")
    parser.add_argument("--epochs", type=float, help="of the static training; fewer on much text")
    parser.add_argument("--chunk", type=int, default=20, help="words predicted before they are learned from")
    parser.add_argument("--outer-steps", type=int, help="of meta-training")
    parser.add_argument("--test-words", type=int, help="of test articles that are read; whole articles, evenly chosen")
    parser.add_argument("--tuning-words", type=int, help="of validation articles that settings are chosen on")
    parser.add_argument("--backend", choices=("compiled", "eager"), default="compiled", help="of the update rule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-policy", type=Path, help="also save the adapter there, e.g. pretrained/reader")
    args = parser.parse_args(arguments)
    for name, quick, full in (("outer_steps", 20, 240), ("tuning_words", 5000, 13000), ("test_words", 25_000, 150_000)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    return args


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """What a stage makes, from its file where there is one."""
    if not path.exists():
        made = make()
        torch.save(made, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return torch.load(path, weights_only=True)


def words_per_second(
    readers: dict[str, Reader],
    articles: Sequence[Article],
    methods: dict[str, Method],
    words: int = 1000,
    rounds: int = 5,
) -> dict[str, float]:
    """Of reading the longest article's beginning; the best of several rounds, in each of which every method reads."""
    tokens = max((a.tokens for a in articles), key=len)[:words]
    seconds = dict.fromkeys(methods, math.inf)
    for _ in range(rounds):
        for name, method in methods.items():
            begun = time.perf_counter()
            readers[name].read(tokens, method)
            seconds[name] = min(seconds[name], time.perf_counter() - begun)
    return {name: round(len(tokens) / spent, 1) for name, spent in seconds.items()}


def save(method: Method, results: dict[str, Any], args: argparse.Namespace) -> None:
    """The adapter as a policy with its card."""
    policy = method.policy
    if policy is None:
        raise ValueError("only the learned method has a policy to save")
    references = {key: NAMES[results[key]["reference"]] for key in ("against", "against_with_memory")}
    perplexity = {name: row["perplexity"][4] for name, row in results["methods"].items()}
    card = {
        "bundled_as": args.save_policy.name, "license": "apache-2.0",
        "training": {
            "method": "back-propagation through unrolled reading: the loss on the chunk after each update",
            "tasks": ["articles of Python's documentation" if args.text == "python" else "articles"],
            "outer_steps": args.outer_steps, "seeds": [args.seed],
            "core_hours": round(results["seconds"]["meta-training, learned"] / 3600, 3),
            "command": "python examples/dynamic_language_model/evaluate.py",
        },
        "evaluation": {
            "suite": "a language model that learns while it reads, articles unseen in training",
            "command": "python examples/dynamic_language_model/evaluate.py", "seeds": [args.seed],
            "reference": references["against"],
            "summary": {
                "perplexity, static model": perplexity["static"],
                **{f"perplexity, {said}": perplexity[results[key]["reference"]] for key, said in references.items()},
                "perplexity, this policy": perplexity["learned"],
                **{
                    f"gain in the last quarter of an article, over that of {said}": results[key]["last_quarter_ratio"]
                    for key, said in references.items()
                },
            },
        },
        "notes": [
            "Made for one purpose: moving differences from the weights of a trained language model while it reads. It "
            "expects second moments gathered on training text (learned_optim.tasks.warm) and is no rule for training "
            "from random weights.",
            f"Used with lr {method.lr:.3g}, weight_decay {method.decay / method.lr:.3g}, eps {method.eps:.3g} times "
            f"the rms of the gradient, and differences in the memory that count {method.memory:.3g} times; "
            "see examples/dynamic_language_model.",
        ],
    }  # fmt: skip
    policy.save_pretrained(args.save_policy, results=card)


def static_model(corpus: Corpus, args: argparse.Namespace) -> LanguageModel:
    words = sum(len(a.tokens) for a in corpus.parts["train"])
    epochs, most = (5.0, 1.0e6) if args.quick else (12.0, 10e6)
    epochs = args.epochs or min(epochs, most / words)

    def make() -> dict[str, Tensor]:
        made = pretrain(corpus.parts["train"], len(corpus.vocabulary), width=args.width, epochs=epochs, seed=args.seed)
        return made.state_dict()

    model = LanguageModel(len(corpus.vocabulary), args.width)
    model.load_state_dict(cached(args.out / "static.pt", make))
    return model.eval()


Part = TypeVar("Part")


class Clock:
    """Prints what is done next, and keeps in a file how long what was done took: at most, where runs were resumed.

    A line every half minute says how long it has been at it, or how far it is.
    """

    def __init__(self, path: Path) -> None:
        self.begun, self.path, self.stage = time.perf_counter(), path, ""
        self.done = self.total = 0
        self.lines = TimedLines(self.line)
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        if self.stage:
            self.seconds[self.stage] = max(round(now - self.begun, 1), self.seconds.get(self.stage, 0.0))
            self.path.write_text(json.dumps(self.seconds, indent=2) + "\n", encoding="utf-8")
        self.begun, self.stage, self.done, self.total = now, stage, 0, 0
        if stage:
            print(f"[{stage}]", flush=True)
        else:
            self.lines.close()

    def line(self) -> str:
        far = how_far(self.done, self.total, time.perf_counter() - self.begun)
        return f"  {self.stage}: {self.done} of {self.total} {far}" if self.total else f"  {self.stage}: {far}"

    def counted(self, parts: Sequence[Part]) -> Iterator[Part]:
        """``parts``, which are all that is to be done in this stage."""
        self.total = len(parts)
        for self.done, part in enumerate(parts):
            yield part


def main(arguments: Sequence[str] | None = None) -> None:
    args = settings(arguments)
    torch.set_num_threads(args.threads)
    keep_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = {k: str(v) for k, v in vars(args).items() if k not in ("out", "save_policy", "threads")}
    _same_settings(args.out / "settings.json", chosen)
    clock = Clock(args.out / "seconds.json")
    clock("text")
    corpus = load(args.text, shortest=args.shortest, longest=args.longest, largest=args.vocabulary)
    print(corpus.counts())
    clock("static model")
    model = static_model(corpus, args)
    count = sum(p.numel() for p in model.parameters())
    readers = {choice: Reader(model, choice, args.chunk) for choice in CHOICES}
    for choice, reader in readers.items():
        reader.measure(cut(corpus.parts["meta"], 20_000))
        print(f"  {choice}: {sum(d.numel() for d in reader.differences().values())} of {count} weights move in reading")
    of = {name: readers[CHOICE.get(name, "lstm")] for name in ("forgetful", "static", *BEGIN)}
    # Whole ones: what goes well for a thousand words may still run away later.
    validation = thinned(corpus.parts["validation"], args.tuning_words)

    def loss(name: str, method: Method) -> float:
        value = mean_loss(of[name], validation, method)
        shown = ", ".join(f"{k} {v:.2g}" for k, v in method.settings().items())
        print(f"  {name}, {shown}: perplexity {math.exp(min(value, 50.0)):.2f}", flush=True)
        return value

    def tuned(name: str, begin: Method) -> Method:
        memory = begin.kind != "learned" and CHOICE[name] != "lstm"
        stored = cached(
            args.out / f"tuned_{name}.pt", lambda: _as_plain(*tune(begin, functools.partial(loss, name), memory))
        )
        return dataclasses.replace(begin, **stored["settings"])

    clock("baselines, on validation articles")
    methods = {"forgetful": Method("forgetful"), "static": Method("static")}
    methods |= {name: tuned(name, begin) for name, (begin, _) in BEGIN.items()}
    cache = tune_cache(validation, [readers["lstm"].read(a.tokens, Method("static")).losses for a in validation])

    before = {}
    for name, base_name in LEARNED.items():
        clock(f"meta-training, {name}")
        base, starts = methods[base_name], {}
        for strength in sorted({1.0, base.memory**0.5, base.memory}):
            of[name] = readers[CHOICE[name]].strengthened(strength)
            policy = base_policy(base.eps * of[name].gradient_rms)
            begin = dataclasses.replace(base, kind="learned", memory=strength, policy=policy, backend=args.backend)
            path = args.out / f"before_{name}_{strength:.2f}.pt"
            starts[cached(path, functools.partial(loss, name, begin))] = of[name], begin
        before[name] = min(starts)
        of[name], begin = starts[before[name]]
        reader = of[name]
        result = learn(
            reader, corpus.parts["meta"], begin, outer_steps=args.outer_steps, out=args.out / f"meta_{name}",
            seed=args.seed,
        )  # fmt: skip
        clock(f"validation articles, {name}")
        methods[name] = tuned(name, dataclasses.replace(begin, policy=result.policy))
        if loss(name, methods[name]) > before[name]:
            print("  meta-training made validation articles harder to read: the policy that it began with is kept")
            methods[name] = begin
    on_validation = {name: loss(name, methods[name]) for name in ("static", *BEGIN, *LEARNED)}

    clock("test articles")
    test = thinned(corpus.parts["test"], args.test_words)
    print(f"  {len(test)} articles, {sum(len(a.tokens) for a in test)} words")
    plain = min(("sgd", "adam", "rms"), key=on_validation.__getitem__)
    with_memory = min(("rms_memory", "rms_all"), key=on_validation.__getitem__)
    watched = (with_memory, "learned")
    readings: dict[str, list[Reading]] = {name: [] for name in methods}
    for name, article in clock.counted([(name, article) for name in methods for article in test]):
        readings[name].append(of[name].read(article.tokens, methods[name], watch=name in watched))
    losses = {name: [r.losses for r in runs] for name, runs in readings.items()}
    losses["cache"] = [cache_losses(l, a.tokens, **cache) for l, a in zip(losses["static"], test, strict=True)]
    losses = {name: losses[name] for name in NAMES}
    clock("speed")
    speed = words_per_second(of, test, methods)
    clock("")
    results = compare({name: quarters(l) for name, l in losses.items()}, plain, with_memory)
    results |= {
        "settings": chosen, "tuned": {n: m.settings() for n, m in methods.items() if m.lr} | {"cache": cache},
        "validation": on_validation | {f"{name} before meta-training": value for name, value in before.items()},
        "corpus": corpus.counts().splitlines(), "weights": count,
        "gradient_rms": {choice: reader.gradient_rms for choice, reader in readers.items()},
        "words_per_second": speed, "seconds": clock.seconds,
    }  # fmt: skip
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    updates = {name: {t: [torch.tensor(r.updates[t]) for r in readings[name]] for t in of[name].names}
               for name in watched}  # fmt: skip
    titles, words = [a.title for a in test], [a.words for a in test]
    torch.save({"losses": losses, "updates": updates, "titles": titles, "words": words}, args.out / "readings.pt")
    print(markdown(results))
    if args.save_policy:
        save(methods["learned"], results, args)


def _as_plain(best: Method, tried: list[dict[str, float]]) -> dict[str, Any]:
    return {"settings": best.settings(), "tried": tried}


def _same_settings(path: Path, chosen: dict[str, str]) -> None:
    """Refuse to mix the stages of runs with different settings."""
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old != chosen:
            differing = sorted(k for k in {*old, *chosen} if old.get(k) != chosen.get(k))
            raise SystemExit(f"{path.parent} holds a run with another {', '.join(differing)}: give another --out")
    path.write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
