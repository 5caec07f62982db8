"""transformers.Trainer: both ways to hand it an optimizer, its checkpoints, accumulation and mixed precision."""

from __future__ import annotations

import pytest
import torch

from helpers.support import assert_same_bits
from learned_optim import LearnedOptimizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16,
                                     bos_token_id=0, eos_token_id=0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def data():
    rows = torch.randint(0, 32, (64, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows.sort(dim=1).values]


def arguments(folder, **options):
    return transformers.TrainingArguments(
        str(folder), max_steps=12, save_steps=6, per_device_train_batch_size=8, logging_steps=1, report_to="none",
        use_cpu=True, disable_tqdm=True, learning_rate=3e-3, weight_decay=0.1, **options,
    )  # fmt: skip


def trained(folder, resume=None, by_class=False, **options):
    net = model()
    if by_class:
        how = {"optimizer_cls_and_kwargs": (LearnedOptimizer, {"lr": 3e-3})}
    else:
        optimizer = LearnedOptimizer(net.named_parameters(), lr=3e-3)
        how = {"optimizers": (optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12))}
    trainer = transformers.Trainer(net, arguments(folder, **options), train_dataset=data(), **how)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return list(net.parameters()), losses, trainer.optimizer


@pytest.mark.parametrize("by_class", [False, True], ids=["optimizers", "optimizer_cls_and_kwargs"])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "bf16": True}], ids=["", "bf16 accumulated"]
)
def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bits(tmp_path, by_class, options):
    whole, losses, _ = trained(tmp_path / "whole", by_class=by_class, **options)
    assert losses[-1] < losses[0]
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    resumed, _, _ = trained(tmp_path / "resumed", str(checkpoint), by_class=by_class, **options)
    assert_same_bits(resumed, whole)


def test_the_trainers_groups_schedule_and_clipping_are_what_it_gives_adamw(tmp_path):
    _, _, ours = trained(tmp_path, by_class=True, lr_scheduler_type="cosine", warmup_steps=3, save_strategy="no")
    net = model()
    trainer = transformers.Trainer(
        net, arguments(tmp_path, lr_scheduler_type="cosine", warmup_steps=3, save_strategy="no"), train_dataset=data()
    )
    trainer.train()
    for mine, adamw in zip(ours.param_groups, trainer.optimizer.param_groups, strict=True):
        assert (mine["lr"], mine["weight_decay"]) == (adamw["lr"], adamw["weight_decay"])
        assert len(mine["params"]) == len(adamw["params"])
