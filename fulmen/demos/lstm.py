"""An LSTM that predicts the next word, and keeps what it remembers from batch to batch."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler

from fulmen.demos.transformer import WikiText2
from fulmen.module import LightningModule


class SimpleLSTM(nn.Module):
    """An LSTM over words, which are numbers below `vocab_size`.

    Args:
        vocab_size: how many words there are.
        ninp: size of the vector that stands for a word.
        nhid: size of the hidden state.
        nlayers: layers of the LSTM.
        dropout: probability of dropout, everywhere.

    Examples:
        >>> model = SimpleLSTM(vocab_size=50, ninp=8, nhid=8, nlayers=2)
        >>> words = torch.zeros(3, 7, dtype=torch.long)
        >>> output, (hidden, cell) = model(words, model.init_hidden(3))
        >>> output.shape, hidden.shape  # a row for each word
        (torch.Size([21, 50]), torch.Size([2, 3, 8]))
    """

    def __init__(
        self, vocab_size: int = 33278, ninp: int = 512, nhid: int = 512, nlayers: int = 4, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocab_size, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout, batch_first=True)
        self.decoder = nn.Linear(nhid, vocab_size)
        self.nlayers = nlayers
        self.nhid = nhid
        self.vocab_size = vocab_size
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the weights of both ends between -0.1 and 0.1."""
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, input: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The logarithms of the probabilities of words, and what is remembered.

        Args:
            input: numbers of words, (batch, length), int64.
            hidden: what was remembered, as `init_hidden` gives it.

        Returns:
            A row for each word, (batch * length, vocab_size), float; and the new state.
        """
        output, hidden = self.rnn(self.drop(self.encoder(input)), hidden)
        decoded = self.decoder(self.drop(output)).view(-1, self.vocab_size)
        return functional.log_softmax(decoded, dim=1), hidden

    def init_hidden(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Nothing is remembered: two tensors of zeros, (nlayers, batch_size, nhid)."""
        zeros = self.decoder.weight.new_zeros(self.nlayers, batch_size, self.nhid)
        return zeros, torch.zeros_like(zeros)


class SequenceSampler(Sampler[list[int]]):
    """Batches in which each place continues where it was in the batch before.

    Args:
        dataset: what is cut into `batch_size` stretches; what does not fill them is left out.
        batch_size: samples of a batch.

    Examples:
        >>> list(SequenceSampler(range(10), batch_size=3))
        [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    """

    def __init__(self, dataset: Sized, batch_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.chunk_size = len(dataset) // batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.chunk_size):
            yield list(range(first, self.chunk_size * self.batch_size, self.chunk_size))

    def __len__(self) -> int:
        return self.chunk_size


class LightningLSTM(LightningModule):
    """Trains a `SimpleLSTM` on `WikiText2`, in batches of 20 stretches.

    Args:
        vocab_size: how many words there are.

    Examples:
        >>> LightningLSTM(vocab_size=50).hidden is None
        True
    """

    def __init__(self, vocab_size: int = 33278) -> None:
        super().__init__()
        self.model = SimpleLSTM(vocab_size=vocab_size)
        self.hidden: tuple[Tensor, Tensor] | None = None

    def on_train_epoch_end(self) -> None:
        """Forgets, as the next epoch begins with the first words."""
        self.hidden = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean negative logarithm of the probabilities of the right words, logged as "train_loss"."""
        inputs, target = batch
        hidden = self.model.init_hidden(inputs.size(0)) if self.hidden is None else self.hidden
        output, (state, cell) = self.model(inputs, hidden)
        self.hidden = state.detach(), cell.detach()
        loss = functional.nll_loss(output, target.view(-1))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def prepare_data(self) -> None:
        """Gets the text."""
        WikiText2(download=True)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Its blocks, so that each place of a batch continues the one before."""
        dataset = WikiText2()
        return DataLoader(dataset, batch_sampler=SequenceSampler(dataset, batch_size=20))

    def configure_optimizers(self) -> Optimizer:
        """Gradient descent with a rate of 20."""
        return torch.optim.SGD(self.parameters(), lr=20.0)
