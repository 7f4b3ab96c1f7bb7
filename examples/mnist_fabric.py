"""The autoencoder of `mnist_autoencoder.py`, trained by a loop of one's own on Fabric.

    python examples/mnist_fabric.py                     # 1,797 digits that come with scikit-learn
    python examples/mnist_fabric.py --devices 2         # the same on two processes
    python examples/mnist_fabric.py --precision bf16-mixed

Needs ``pip install "fulmen[examples]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from mnist_autoencoder import Decoder, Encoder, MNISTDataModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fulmen import Fabric


class AutoEncoder(nn.Module):
    """An image through the bottleneck between encoder and decoder, and back."""

    def __init__(self, pixels: int, latent: int = 8) -> None:
        super().__init__()
        self.encoder = Encoder(pixels, latent=latent)
        self.decoder = Decoder(pixels, latent=latent)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images.flatten(1))).view_as(images)


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, loader: DataLoader) -> float:
    """The mean squared error over all processes."""
    model.eval()
    totals = torch.zeros(2, device=fabric.device)
    for images, _ in loader:
        totals += torch.stack([F.mse_loss(model(images), images, reduction="sum"), torch.tensor(images.numel())])
    model.train()
    error, pixels = fabric.all_reduce(totals, reduce_op="sum").tolist()
    return error / pixels


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--devices", type=int, default=1, help="processes, or GPUs")
    parser.add_argument("--precision", default="32-true", help="in which numbers to compute")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    parser.add_argument("--out", default="runs/fabric", help="folder for the checkpoint")
    args = parser.parse_args()

    fabric = Fabric(devices=args.devices, precision=args.precision)
    fabric.launch()
    fabric.seed_everything(7)
    data = MNISTDataModule("digits")
    data.setup("fit")
    module = AutoEncoder(data.side**2)
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=2e-3))
    train, val = fabric.setup_dataloaders(data.train_dataloader(), data.val_dataloader())

    path = Path(args.out, "best.ckpt")
    first = best = validate(fabric, model, val)
    for epoch in range(args.epochs):
        for images, _ in train:
            loss = F.mse_loss(model(images), images)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
        error = validate(fabric, model, val)
        fabric.print(f"epoch {epoch}: validation error {error:.4f}")
        if error < best:
            best = error
            fabric.save(path, {"model": model, "optimizer": optimizer, "epoch": epoch})

    state = {"model": model, "epoch": 0}
    fabric.load(path, state)
    fabric.print(f"error        {first:.4f} -> {validate(fabric, model, val):.4f}, of epoch {state['epoch']}")
    fabric.print(f"checkpoint   {path}")


if __name__ == "__main__":
    main()
