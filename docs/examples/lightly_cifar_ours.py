"""`lightly_cifar.py` with our views and our monitor: `python lightly_cifar_ours.py DATA`."""

import os
import sys
import time

import pytorch_lightning as pl
import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import nn

import ssl_kit

DATA, EPOCHS, SEED = sys.argv[1], int(os.environ.get("LOOP_EPOCHS", "10")), int(os.environ.get("LOOP_SEED", "0"))
BATCH = int(os.environ.get("LOOP_BATCH", "256"))


class SimCLR(pl.LightningModule):
    """A ResNet-18, a projection head, and a loss between two views."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = NTXentLoss(temperature=0.5)
        self.times = []

    def training_step(self, batch, batch_idx):
        """The loss of one batch."""
        self.times.append(time.perf_counter())
        first, second = (self.projection_head(self.backbone(view).flatten(start_dim=1)) for view in batch[0])
        return self.criterion(first, second)

    def configure_optimizers(self):
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)


pl.seed_everything(SEED)
model = SimCLR()
loader = ssl_kit.ViewLoader(DATA, "simclr", size=32, batch_size=BATCH, seed=SEED)
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": EPOCHS}
trainer = pl.Trainer(**options, callbacks=[ssl_kit.Monitor(DATA, "runs/lightly", size=32, overwrite=True)])
trainer.fit(model, loader)
speed = BATCH * (len(model.times) - 1) / (model.times[-1] - model.times[0])
print(f"{speed:,.0f} images/s")
