"""Lightning: fit, validate and predict in mixed bfloat16, with clipping and a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

from _program import assert_close, assert_learns, main

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NEEDS = ("lightning",)


def fit(
    accelerator: str,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    resume: bool = False,
    precision: str = "bf16-mixed",
) -> tuple[list[float], list[Tensor]]:
    """Losses of the steps, and predictions; with ``resume`` of a run that begins again midway."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(16, 32), nn.BatchNorm1d(32), nn.SiLU(), nn.Linear(32, 4)
            )
            self.losses: list[float] = []

        def forward(self, batch: list[Tensor]) -> Tensor:
            return self.layers(batch[0])

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            loss = F.cross_entropy(self(batch), batch[1])
            self.log("loss", loss, on_epoch=True)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: list[Tensor], _index: int) -> None:
            self.log("validation", F.cross_entropy(self(batch), batch[1]))

        def configure_optimizers(self) -> dict[str, object]:
            optimizer = make(self.parameters(), lr=1e-2)
            return {
                "optimizer": optimizer,
                "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
            }

    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x[:, :4].argmax(1))
    loader = DataLoader(data, batch_size=16, pin_memory=accelerator == "gpu")
    with tempfile.TemporaryDirectory() as folder:

        def make_trainer(epochs: int) -> lightning.Trainer:
            return lightning.Trainer(
                accelerator=accelerator,
                devices=1,
                precision=precision,
                max_epochs=epochs,
                gradient_clip_val=1.0,
                default_root_dir=folder,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )

        module, checkpoint = Module(), None
        if resume:
            first = make_trainer(2)
            first.fit(module, loader, loader)
            checkpoint, module = f"{folder}/middle.ckpt", Module()
            first.save_checkpoint(checkpoint)
        trainer = make_trainer(3)
        trainer.fit(module, loader, loader, ckpt_path=checkpoint, weights_only=False)
        assert trainer.callback_metrics["validation"].isfinite()
        predictions = trainer.predict(module, loader, ckpt_path="best", weights_only=True)
    return module.losses, predictions


def run() -> None:
    """Fit on both accelerators."""
    losses, predictions = fit("gpu")
    expected, host_predictions = fit("cpu")
    assert_learns(losses)
    assert_close(losses, expected, tolerance=0.05)
    for actual, host in zip(predictions, host_predictions, strict=True):
        assert torch.allclose(actual.float().cpu(), host.float(), atol=0.1)


if __name__ == "__main__":
    main(run, needs=NEEDS)
