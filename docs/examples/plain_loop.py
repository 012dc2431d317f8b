"""A contrastive loop in bare PyTorch, on a folder of small images in class folders: `python plain_loop.py DATA`."""

import os
import sys
import time

import torch
import torchvision
from torch import nn
from torchvision import transforms as t

DATA, EPOCHS, SEED = sys.argv[1], int(os.environ.get("LOOP_EPOCHS", "10")), int(os.environ.get("LOOP_SEED", "0"))
BATCH = int(os.environ.get("LOOP_BATCH", "256"))

torch.manual_seed(SEED)
backbone = nn.Sequential(torchvision.models.resnet18(num_classes=512), nn.ReLU())
head = nn.Linear(512, 128)
optimiser = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06, momentum=0.9, weight_decay=5e-4)
jitter = t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
augment = t.Compose([t.RandomResizedCrop(32), t.RandomHorizontalFlip(), jitter, t.RandomGrayscale(0.2), t.ToTensor()])
dataset = torchvision.datasets.ImageFolder(DATA, lambda image: [augment(image), augment(image)])
loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=2)
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
