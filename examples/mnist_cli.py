"""The autoencoder of mnist_autoencoder.py from the command line: every argument is an option or a line of a file.

    python examples/mnist_cli.py fit --config examples/mnist_cli.yaml
    python examples/mnist_cli.py fit --config examples/mnist_cli.yaml --model.latent=8 --trainer.max_epochs=20
    python examples/mnist_cli.py test --config examples/mnist_cli.yaml --ckpt_path FILE

Needs ``pip install "fulmen[cli,examples]"``.
"""

from __future__ import annotations

from mnist_autoencoder import LitAutoEncoder, MNISTDataModule

from fulmen.cli import LightningArgumentParser, LightningCLI


class AutoEncoderCLI(LightningCLI):
    """The model is as large as the images."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.data", "model.in_features", compute_fn=pixels_of)


def pixels_of(data: str) -> int:
    return 8 * 8 if data == "digits" else 28 * 28


if __name__ == "__main__":
    AutoEncoderCLI(LitAutoEncoder, MNISTDataModule)
