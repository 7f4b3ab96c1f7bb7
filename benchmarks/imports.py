"""What `import fulmen` costs once torch is loaded, and what it does to the process.

    python -m benchmarks.imports [--package lightning.pytorch]

Each measurement is a fresh interpreter that has imported torch. The first row is the import statement alone; the
second adds what a training script names (`Trainer`, `LightningModule`, `LightningDataModule`), since names load on
first use. Side effects are the interpreter's audit events: files other than the modules themselves, processes,
sockets; threads are counted before and after.
"""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

from benchmarks import harness

PROBE = """
import json, os, sys, threading, time
package, names = sys.argv[1], sys.argv[2:]
import torch
modules, threads, events = set(sys.modules), threading.active_count(), []
environment = dict(os.environ)
MODULE_FILES = (".py", ".pyc", ".so", ".pyd", ".dylib")

def audit(event, arguments):
    if event == "open" and not str(arguments[0]).endswith(MODULE_FILES):
        events.append(f"open {os.path.basename(str(arguments[0]))}")
    elif event.startswith(("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.system", "os.exec", "urllib.")):
        events.append(event)

sys.addaudithook(audit)
start = time.perf_counter()
module = __import__(package, fromlist=["_"])
for name in names:
    getattr(module, name)
seconds = time.perf_counter() - start
new = set(sys.modules) - modules
if threading.active_count() != threads:
    events.append(f"{threading.active_count() - threads} threads started")
if dict(os.environ) != environment:
    events.append("environment changed: " + ", ".join(sorted(set(os.environ.items()) ^ set(environment.items()))[0]))
print(json.dumps({"seconds": seconds, "modules": len(new), "events": events,
                  "version": getattr(module, "__version__", "?")}))
"""
NAMES = ("Trainer", "LightningModule", "LightningDataModule")


def probe(package: str, names: tuple[str, ...]) -> dict:
    command = [sys.executable, "-W", "ignore", "-c", PROBE, package, *names]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = harness.parser("Seconds, modules and side effects of importing the package after torch.")
    parser.add_argument("--repeat", type=int, default=9, help="interpreters started per row")
    parser.add_argument("--events", action="store_true", help="list all side effects, not the first five")
    args = parser.parse_args()
    repeat = 2 if args.quick else args.repeat
    probe(args.package, NAMES)  # leaves the compiled modules behind, as any second import finds them

    rows, effects, version = [], set(), "?"
    for label, names in ((f"import {args.package}", ()), ("and the names of a training script", NAMES)):
        results = [probe(args.package, names) for _ in range(repeat)]
        seconds = harness.spread([result["seconds"] for result in results], 3)
        rows.append((label, seconds, str(results[0]["modules"])))
        effects |= {event for result in results for event in result["events"]}
        version = results[0]["version"]
    pl = SimpleNamespace(name=args.package, version=version)
    harness.print_table("over import torch", pl, ("", "seconds, median (best .. worst)", "modules"), rows)
    print(f"threads, processes, network, files, environment: {f'{len(effects)} events' if effects else 'untouched'}")
    for event in sorted(effects)[: None if args.events else 5]:
        print(f"  {event}")


if __name__ == "__main__":
    main()
