"""Lightning: configure_optimizers, precision, accumulation, clipping, resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.support import assert_same_bits
from learned_optim import LearnedOptimizer

lightning = pytest.importorskip("lightning")


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.losses = []

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(loss.item())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = LearnedOptimizer(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        x = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
        data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
        return torch.utils.data.DataLoader(data, batch_size=8)


def fit(folder, epochs, resume=None, **options):
    module = Module()
    trainer = lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, max_epochs=epochs, logger=False,
        enable_model_summary=False, enable_progress_bar=options.pop("bar", False), **options,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module, trainer


OPTIONS = {
    "plain": {},
    "clipped and accumulated": {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("which", OPTIONS)
def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bits(tmp_path, which):
    whole, _ = fit(tmp_path, 4, **OPTIONS[which])
    assert whole.losses[-1] < whole.losses[0]
    fit(tmp_path, 2, **OPTIONS[which])
    resumed, _ = fit(tmp_path, 4, resume=tmp_path / "2.ckpt", **OPTIONS[which])
    assert_same_bits(list(resumed.parameters()), list(whole.parameters()))


def test_a_fit_does_what_a_plain_loop_does(tmp_path):
    module, _ = fit(tmp_path, 2)
    alone = Module()
    options = alone.configure_optimizers()
    optimizer, schedule = options["optimizer"], options["lr_scheduler"]["scheduler"]
    for _ in range(2):
        for x, y in alone.train_dataloader():
            optimizer.zero_grad()
            nn.functional.mse_loss(alone.net(x), y).backward()
            optimizer.step()
            schedule.step()
    assert_same_bits(list(module.parameters()), list(alone.parameters()))


def test_its_progress_shows_the_loss_and_nothing_odd(tmp_path, capfd):
    _, trainer = fit(tmp_path, 1, bar=True)
    assert "train_loss" in trainer.progress_bar_metrics
    out, err = capfd.readouterr()
    assert "train_loss" in out + err
    assert "nan" not in (out + err).lower()
