"""`plain_loop.py` with our views: `python plain_loop_ours.py DATA`."""

import os
import sys
import time

import torch
import torchvision
from torch import nn

import ssl_kit

DATA, EPOCHS, SEED = sys.argv[1], int(os.environ.get("LOOP_EPOCHS", "10")), int(os.environ.get("LOOP_SEED", "0"))
BATCH = int(os.environ.get("LOOP_BATCH", "256"))

torch.manual_seed(SEED)
backbone = nn.Sequential(torchvision.models.resnet18(num_classes=512), nn.ReLU())
head = nn.Linear(512, 128)
optimiser = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06, momentum=0.9, weight_decay=5e-4)
loader = ssl_kit.ViewLoader(DATA, "simclr", size=32, batch_size=BATCH, seed=SEED)
times = []
for epoch in range(EPOCHS):
    for views, _ in loader:
        times.append(time.perf_counter())
        z = nn.functional.normalize(head(backbone(torch.cat(views))), dim=1)
        similar = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
        loss = nn.functional.cross_entropy(similar, torch.arange(len(z)).roll(len(z) // 2))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
speed = BATCH * (len(times) - 1) / (times[-1] - times[0])
print(f"{speed:,.0f} images/s")
