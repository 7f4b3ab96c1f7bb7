"""Public names and signatures, compared with those recorded from PyTorch Lightning 2.6.

python tests/contract/test_api.py     prints the figures and what is missing
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"

# tier -> the part of the surface that must be there. 1: every user meets it; 2: documented for advanced users.
REQUIRED = {1: 1.0, 2: 0.95, 3: 0.97}

# What is not part of the surface of one device: recorded paths that start with one of these, and why. Something that
# belongs to that surface and is merely not written yet does not go here: it counts as missing.
EXCLUDED = {
    "lightning.pytorch.cli": "the command line",
    "lightning.pytorch.utilities.deepspeed": "DeepSpeed",
    "lightning.pytorch.utilities.consolidate_checkpoint": "sharded checkpoints",
}


def compared(shared: Path) -> list[dict]:
    """Every recorded name of tiers 1 and 2, with what is wrong about ours."""
    tool, record = shared / "tools" / "api_diff.py", shared / "reference" / "lightning_api.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "names.json"
        tiers = [word for tier in REQUIRED for word in ("--tier", str(tier))]
        command = [sys.executable, str(tool), str(record), "fulmen", *tiers, "--json", str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(answer.read_text())


def reason_to_exclude(path: str) -> str | None:
    return next((EXCLUDED[start] for start in EXCLUDED if path == start or path.startswith(start + ".")), None)


def figures(names: list[dict]) -> tuple[dict[int, tuple[int, int]], dict[int, list[str]], dict[str, int]]:
    """Per tier (names right, names asked for) and what is wrong; per reason, how many names are not asked for."""
    right: dict[int, int] = defaultdict(int)
    asked: dict[int, int] = defaultdict(int)
    wrong: dict[int, list[str]] = defaultdict(list)
    excluded: dict[str, int] = defaultdict(int)
    for name in names:
        reason = reason_to_exclude(name["path"])
        if reason is not None:
            excluded[reason] += 1
            continue
        asked[name["tier"]] += 1
        right[name["tier"]] += not name["problems"]
        if name["problems"]:
            wrong[name["tier"]].append(f"{name['path']}: {'; '.join(name['problems'])}")
    return {tier: (right[tier], asked[tier]) for tier in REQUIRED}, dict(wrong), dict(excluded)


def report(names: list[dict]) -> str:
    counts, wrong, excluded = figures(names)
    lines = [f"tier {tier}: {ok} of {n} names ({ok / n:.1%})" for tier, (ok, n) in counts.items()]
    lines += [f"  not asked for: {count:4d} names, {reason}" for reason, count in sorted(excluded.items())]
    return "\n".join(lines + [f"  tier {tier}: {problem}" for tier in sorted(wrong) for problem in wrong[tier]])


@pytest.fixture(scope="module")
def names(shared: Path) -> list[dict]:
    return compared(shared)


@pytest.mark.parametrize("tier", REQUIRED)
def test_names_and_signatures_are_those_of_the_contract(names: list[dict], tier: int) -> None:
    print("\n" + report(names))
    counts, wrong, _ = figures(names)
    ok, asked = counts[tier]
    assert asked > 100, "the record seems to be incomplete"
    assert ok / asked >= REQUIRED[tier], "\n".join(wrong.get(tier, []))


def test_every_exclusion_stands_for_recorded_names(names: list[dict]) -> None:
    paths = [name["path"] for name in names]
    for start in EXCLUDED:
        assert any(path == start or path.startswith(start + ".") for path in paths), start


if __name__ == "__main__":
    if not SHARED.is_dir():
        sys.exit(f"SKIPPED: {SHARED} with the recorded names is not there")
    print(report(compared(SHARED)))
