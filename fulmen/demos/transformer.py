"""A Transformer that predicts the next word, and the text it reads: WikiText-2."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from fulmen.demos.download import fetch_file
from fulmen.module import LightningModule

WIKITEXT_URL = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/train.txt"
END_OF_SENTENCE = "<eos>"


class Transformer(nn.Module):
    """An encoder and a decoder over words, which are numbers below `vocab_size`.

    Args:
        vocab_size: how many words there are.
        ninp: size of the vector that stands for a word.
        nhead: heads of attention; they divide `ninp`.
        nhid: size of the hidden layers.
        nlayers: layers of the encoder, and of the decoder.
        dropout: probability of dropout, everywhere.

    Examples:
        >>> model = Transformer(vocab_size=50, ninp=8, nhid=8, nlayers=1)
        >>> words = torch.zeros(3, 7, dtype=torch.long)
        >>> model(words, words).shape  # a row for each word
        torch.Size([21, 50])
    """

    src_mask: Tensor | None

    def __init__(
        self, vocab_size: int = 33278, ninp: int = 200, nhead: int = 2, nhid: int = 200, nlayers: int = 2,
        dropout: float = 0.2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pos_encoder = PositionalEncoding(ninp, dropout)
        self.embedding = nn.Embedding(vocab_size, ninp)
        self.transformer = nn.Transformer(
            d_model=ninp, nhead=nhead, num_encoder_layers=nlayers, num_decoder_layers=nlayers, dim_feedforward=nhid,
            dropout=dropout, batch_first=True,
        )  # fmt: skip
        self.decoder = nn.Linear(ninp, vocab_size)
        self.ninp = ninp
        self.vocab_size = vocab_size
        self.src_mask = None

    def generate_square_subsequent_mask(self, size: int) -> Tensor:
        """A mask that hides later words: minus infinity above the diagonal, else 0; (size, size), float32."""
        return torch.full((size, size), -math.inf).triu(diagonal=1)

    def forward(self, inputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The logarithms of the probabilities of words.

        Args:
            inputs: numbers of words, (batch, length), int64.
            target: the words that follow, of the same shape.
            mask: which words of the target see which, (length, length); by default those before.

        Returns:
            A row for each word of the target, (batch * length, vocab_size), float.
        """
        if mask is None:
            if self.src_mask is None or self.src_mask.size(0) != target.size(1):
                self.src_mask = self.generate_square_subsequent_mask(target.size(1))
            mask = self.src_mask = self.src_mask.to(target.device)
        scale = math.sqrt(self.ninp)
        source = self.pos_encoder(self.embedding(inputs) * scale)
        follows = self.pos_encoder(self.embedding(target) * scale)
        output = self.decoder(self.transformer(source, follows, tgt_mask=mask))
        return functional.log_softmax(output, dim=-1).view(-1, self.vocab_size)


class PositionalEncoding(nn.Module):
    """Adds to each vector of a sequence where it stands: sines and cosines of the position.

    Args:
        dim: size of the vectors; an even number.
        dropout: probability of dropout of the sum.
        max_len: the longest sequence.

    Examples:
        >>> PositionalEncoding(4, dropout=0.0)(torch.zeros(1, 2, 4))[0, 0]
        tensor([0., 1., 0., 1.])
    """

    pe: Tensor | None

    def __init__(self, dim: int, dropout: float = 0.1, max_len: int = 5000) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dim = dim
        self.max_len = max_len
        self.pe = None  # made on the device of the first batch, so that layers can be made on the meta device

    def forward(self, x: Tensor) -> Tensor:
        """The sum; `x` is (batch, length, dim)."""
        if self.pe is None or self.pe.device != x.device:
            self.pe = self._compute_encoding(x.device)
        summed: Tensor = self.dropout(x + self.pe[:, : x.size(1)].to(x.dtype))
        return summed

    def _compute_encoding(self, device: torch.device) -> Tensor:
        position = torch.arange(self.max_len, dtype=torch.float32, device=device).unsqueeze(1)
        even = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device)
        angles = position * torch.exp(even * (-math.log(10000.0) / self.dim))
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).unsqueeze(0)


class Dictionary:
    """Words and their numbers, in the order in which they came.

    Examples:
        >>> words = Dictionary()
        >>> words.add_word("the"), words.add_word("cat"), words.add_word("the")
        (0, 1, 0)
        >>> words.idx2word, len(words)
        (['the', 'cat'], 2)
    """

    def __init__(self) -> None:
        self.word2idx: dict[str, int] = {}
        self.idx2word: list[str] = []

    def add_word(self, word: str) -> int:
        """The number of the word, which is a new one the first time."""
        if word not in self.word2idx:
            self.word2idx[word] = len(self.idx2word)
            self.idx2word.append(word)
        return self.word2idx[word]

    def __len__(self) -> int:
        return len(self.idx2word)


class WikiText2(Dataset[tuple[Tensor, Tensor]]):
    """The training text of WikiText-2 in blocks, each with the words that follow: the same, one further.

    Args:
        data_dir: the folder of the file ``wikitext-2.txt``. Any text in it is read; lines are sentences.
        block_size: words of a block.
        download: get the file, if it is not there.

    Raises:
        FileNotFoundError: without `download`, the file is not there.
        ConnectionError: it cannot be downloaded.

    Examples:
        >>> _ = Path("wikitext-2.txt").write_text("the cat sat\\non the mat\\n")
        >>> text = WikiText2(Path("."), block_size=3)
        >>> len(text), text[0]
        (1, (tensor([0, 1, 2]), tensor([1, 2, 3])))
        >>> text.dictionary.idx2word
        ['the', 'cat', 'sat', '<eos>', 'on', 'mat']
    """

    def __init__(self, data_dir: Path = Path("./data"), block_size: int = 35, download: bool = True) -> None:
        self.path = Path(data_dir) / "wikitext-2.txt"
        if download:
            self.download(self.path)
        elif not self.path.is_file():
            raise FileNotFoundError(f"There is no {self.path}. Put the text there, or pass `download=True`.")
        self.data, self.dictionary = _read_words(self.path)
        self.block_size = block_size

    @property
    def vocab_size(self) -> int:
        """How many different words there are."""
        return len(self.dictionary)

    def __len__(self) -> int:
        return len(self.data) // self.block_size - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} blocks, and so no index {index}.")
        start = index % len(self) * self.block_size
        end = start + self.block_size
        return self.data[start:end], self.data[start + 1 : end + 1]

    @staticmethod
    def download(destination: Path) -> None:
        """Gets the text, unless the file is there already.

        Args:
            destination: the path of the file.

        Raises:
            ConnectionError: it cannot be reached.
        """
        fetch_file(WIKITEXT_URL, destination)


def _read_words(path: Path) -> tuple[Tensor, Dictionary]:
    """The numbers of all words of a file, and the words."""
    words = Dictionary()
    with open(path, encoding="utf-8") as file:
        numbers = [words.add_word(word) for line in file for word in (*line.split(), END_OF_SENTENCE)]
    return torch.tensor(numbers, dtype=torch.int64), words


class LightningTransformer(LightningModule):
    """Trains a `Transformer` on `WikiText2`.

    Args:
        vocab_size: how many words there are.

    Examples:
        >>> model = LightningTransformer(vocab_size=50)
        >>> words = torch.zeros(1, 7, dtype=torch.long)
        >>> model.training_step((words, words), 0).shape
        torch.Size([])
    """

    def __init__(self, vocab_size: int = 33278) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=vocab_size)

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        """As of `Transformer`."""
        output: Tensor = self.model(inputs, target)
        return output

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean negative logarithm of the probabilities of the right words."""
        inputs, target = batch
        return functional.nll_loss(self(inputs, target), target.view(-1))

    def configure_optimizers(self) -> Optimizer:
        """Gradient descent with a rate of 0.1."""
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def prepare_data(self) -> None:
        """Gets the text."""
        WikiText2(download=True)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Its blocks, one by one."""
        return DataLoader(WikiText2())
