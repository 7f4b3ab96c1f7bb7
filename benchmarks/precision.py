"""What half precision gains, and what the trainer adds to the loop of autocast and scaler written by hand.

    python -m benchmarks.precision [--device cuda] [--package lightning.pytorch]

Transformer blocks on batches that already lie on the device, AdamW. Each round times the hand-written loop and one `fit`
in turn; the ratio is the median of the rounds' ratios, the best and the worst beside it. Speed-up and memory (the peak
that was allocated, on CUDA) are those of the `fit`, against "32-true" with float32 as torch has it by default. The loops
by hand of "16-true" and "bf16-true" are plain ones, whose update is made in 16 bits; the trainer makes it in float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
LIMIT = 1.05
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
# width, heads, layers, batch, tokens; steps that are timed, after as many again to warm up
SIZES = {"cpu": ((128, 4, 2, 8, 32), 20), "cuda": ((1024, 16, 4, 32, 512), 30), "mps": ((256, 8, 2, 16, 64), 20)}


class Blocks(nn.Module):
    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        width, heads, layers, *_ = size
        block = lambda: nn.TransformerEncoderLayer(  # noqa: E731
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.Sequential(*(block() for _ in range(layers)))

    def loss(self, x: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.layers(x), x)


class Timed:
    """One batch so many times to warm up, and as many again that are timed, from one request to another."""

    def __init__(self, batch: Tensor, steps: int) -> None:
        self.batch, self.steps, self.seconds = batch, steps, 0.0

    def __len__(self) -> int:
        return 2 * self.steps + 1

    def now(self) -> float:
        if self.batch.device.type != "cpu":
            getattr(torch, self.batch.device.type).synchronize()
        return time.perf_counter()

    def __iter__(self) -> Iterator[Tensor]:
        yield from [self.batch] * self.steps
        start = self.now()
        yield from [self.batch] * self.steps
        self.seconds = (self.now() - start) / self.steps
        yield self.batch


def by_hand(precision: str, size: tuple[int, ...], batches: Timed) -> None:
    device = batches.batch.device
    dtype = WEIGHTS.get(precision, torch.float32)
    net = Blocks(size).to(device, dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, eps=1e-4 if precision == "16-true" else 1e-8)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "16-mixed")
    autocast: Callable[[], Any] = nullcontext
    if precision in AUTOCAST:
        autocast = lambda: torch.autocast(device.type, AUTOCAST[precision], cache_enabled=False)  # noqa: E731
    for batch in batches:
        with autocast():
            loss = net.loss(batch.to(dtype))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def fit(pl: SimpleNamespace, precision: str, size: tuple[int, ...], batches: Timed, folder: Path) -> None:
    class Module(pl.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Blocks(size)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net.loss(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    trainer = pl.Trainer(
        accelerator=batches.batch.device.type, devices=1, max_epochs=1, precision=precision, default_root_dir=folder,
        num_sanity_val_steps=0, **harness.NOTHING_ON,
    )  # fmt: skip
    with harness.silent_terminal():
        trainer.fit(Module(), batches)


def peak_megabytes(device: str) -> float | None:
    if device != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return peak


def main() -> None:
    parser = harness.parser("Half precision against 32 bits, and against loops written by hand.")
    parser.add_argument("--rounds", type=int, default=7, help="how often each row is measured")
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    pl = harness.load(args.package)
    size, steps = SIZES[args.device]
    _, _, _, batch, tokens = size
    sample = torch.randn(batch, tokens, size[0], device=args.device)
    times: dict[str, list[tuple[float, float]]] = {precision: [] for precision in PRECISIONS}
    memory: dict[str, float | None] = {}
    with harness.scratch_folder() as folder:
        for index in range(rounds):
            for precision in PRECISIONS:
                batches = Timed(sample, 2 if args.quick else steps)

                def framework(precision: str = precision, batches: Timed = batches) -> float:
                    peak_megabytes(args.device)
                    fit(pl, precision, size, batches, folder)
                    memory[precision] = peak_megabytes(args.device)
                    return batches.seconds

                def hand(precision: str = precision, batches: Timed = batches) -> float:
                    by_hand(precision, size, batches)
                    return batches.seconds

                # Whoever runs first may find the machine in another mood: take turns.
                first, second = (hand, framework) if index % 2 == 0 else (framework, hand)
                found = {first: first(), second: second()}
                times[precision].append((found[hand], found[framework]))
    full = statistics.median(mine for _, mine in times["32-true"])
    rows = []
    for precision, pairs in times.items():
        mine = statistics.median(framework for _, framework in pairs)
        ratios = [framework / hand for hand, framework in pairs]
        peak = memory[precision]
        speed = f"{full / mine:.2f}"
        shown = "-" if peak is None else f"{peak:.0f}"
        rows.append((precision, f"{1e3 * mine:.2f}", speed, shown, harness.spread(ratios, 3)))
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    title = f"precision on {name}, {size[2]} blocks of width {size[0]}, {batch} x {tokens} tokens"
    header = ("", "ms/step", "speed-up", "peak MB", f"over by hand, limit {LIMIT} for mixed")
    harness.print_table(title, pl, header, rows)


if __name__ == "__main__":
    main()
