"""Models of words, and the text they read."""

from __future__ import annotations

import math
import threading
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
import torch
from support import make_trainer

from fulmen.demos import LightningLSTM, LightningTransformer, SequenceSampler, SimpleLSTM, Transformer, WikiText2
from fulmen.demos import transformer as demos_transformer
from fulmen.demos.transformer import Dictionary, PositionalEncoding

TEXT = " \n = Hello = \n the cat sat on the mat , the cat . \n" * 30


@pytest.fixture
def text_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wikitext-2.txt").write_text(TEXT)
    return tmp_path / "data" / "wikitext-2.txt"


def test_text_is_cut_into_blocks_that_overlap_by_all_but_one_word(text_file):
    text = WikiText2(text_file.parent, block_size=7)  # the file is there, so nothing is downloaded
    words = [word for line in TEXT.splitlines() for word in (*line.split(), "<eos>")]
    assert text.path == text_file and text.vocab_size == len(set(words)) == len(text.dictionary)
    assert [text.dictionary.idx2word[i] for i in text.data] == words
    assert len(text) == len(words) // 7 - 1
    inputs, target = text[1]
    assert inputs.tolist() == text.data[7:14].tolist() and target.tolist() == text.data[8:15].tolist()
    assert torch.equal(text[-1][0], text[len(text) - 1][0])
    with pytest.raises(IndexError, match="no index"):
        text[len(text)]
    assert len(list(text)) == len(text)


def test_a_text_that_is_not_there_is_downloaded_once_or_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no .*wikitext-2.txt. Put the text there"):
        WikiText2(tmp_path, download=False)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "train.txt").write_text("a b c d e f\n")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *args): ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(demos_transformer, "WIKITEXT_URL", f"http://127.0.0.1:{server.server_address[1]}/train.txt")
    try:
        assert len(WikiText2(tmp_path / "new", block_size=2)) == 2
    finally:
        server.shutdown()
        server.server_close()
    assert (tmp_path / "new" / "wikitext-2.txt").read_text() == "a b c d e f\n"
    assert WikiText2(tmp_path / "new", block_size=2).vocab_size == 7
    with pytest.raises(ConnectionError, match=r"could not be downloaded: .*Put the file at .*elsewhere"):
        WikiText2(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_the_transformer_sees_no_later_word_of_the_target():
    torch.manual_seed(0)
    model = Transformer(vocab_size=20, ninp=8, nhid=8, nlayers=1).eval()
    inputs, target = torch.randint(20, (2, 6)), torch.randint(20, (2, 6))
    output = model(inputs, target).view(2, 6, 20)
    torch.testing.assert_close(output.exp().sum(-1), torch.ones(2, 6))
    changed = target.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 20
    other = model(inputs, changed).view(2, 6, 20)
    torch.testing.assert_close(output[:, :4], other[:, :4])
    assert not torch.allclose(output[:, 4:], other[:, 4:])
    assert model.src_mask.tolist() == model.generate_square_subsequent_mask(6).tolist()
    assert model.generate_square_subsequent_mask(2).tolist() == [[0.0, -math.inf], [0.0, 0.0]]
    assert model(inputs[:, :3], target[:, :3], mask=torch.zeros(3, 3)).shape == (6, 20)


def test_positions_are_sines_and_cosines():
    encoding = PositionalEncoding(4, dropout=0.0)(torch.zeros(1, 3, 4))[0]
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(3)]
    torch.testing.assert_close(encoding, torch.tensor(expected))
    words = Dictionary()
    assert [words.add_word(word) for word in ["a", "b", "a"]] == [0, 1, 0]


def test_the_lstm_goes_on_with_what_it_remembers():
    torch.manual_seed(0)
    model = SimpleLSTM(vocab_size=20, ninp=8, nhid=6, nlayers=2).eval()
    assert model.encoder.weight.abs().max() <= 0.1 and not model.decoder.bias.any()
    words = torch.randint(20, (3, 8))
    whole, _ = model(words, model.init_hidden(3))
    first, hidden = model(words[:, :4], model.init_hidden(3))
    second, _ = model(words[:, 4:], hidden)
    assert hidden[0].shape == (2, 3, 6)
    parts = torch.cat([first.view(3, 4, 20), second.view(3, 4, 20)], dim=1)
    torch.testing.assert_close(whole.view(3, 8, 20), parts)


def test_batches_of_sequences_continue_each_other():
    sampler = SequenceSampler(range(10), batch_size=3)
    assert list(sampler) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert len(sampler) == sampler.chunk_size == 3 and sampler.batch_size == 3


def test_both_models_learn_a_text(text_file):
    torch.manual_seed(0)
    transformer = LightningTransformer(vocab_size=10)
    before = transformer.training_step(next(iter(transformer.train_dataloader())), 0).item()
    make_trainer(limit_train_batches=12).fit(transformer)
    transformer.eval()
    assert transformer.training_step(next(iter(transformer.train_dataloader())), 0).item() < before
    text_file.write_text(TEXT * 4)
    lstm = LightningLSTM(vocab_size=10)
    lstm.model = SimpleLSTM(vocab_size=10, ninp=8, nhid=8, nlayers=1, dropout=0.0)
    trainer = make_trainer()
    trainer.fit(lstm)
    assert trainer.global_step == len(WikiText2()) // 20 > 1
    assert lstm.hidden is None and "train_loss" in trainer.callback_metrics
