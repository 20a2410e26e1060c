"""`make torture`: damage of every kind, and how much of it the engine survives.

    python -m tests.torture                      every campaign, with its default number of attacks
    python -m tests.torture kills --attacks 200  one of them, longer
    python -m tests.torture kills --seed 17 --attacks 1     one attack again

An attack is survived where the run or the load ends as it would have without it, or is refused in
one line. What is not survived is printed with the seed that repeats it; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.torture.campaigns import CAMPAIGNS, run


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.torture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            f"  {one.name:12} {one.attacks:5} attacks: {one.about}" for one in CAMPAIGNS.values()
        ),
    )
    parser.add_argument("campaigns", nargs="*", choices=[[], *CAMPAIGNS], metavar="CAMPAIGN")
    parser.add_argument("--attacks", type=int, help="of each campaign")
    parser.add_argument("--seed", type=int, default=0, help="of the first attack")
    parser.add_argument("--jobs", type=int, default=2, help="attacks at a time")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table("campaign", "survived", "seconds", "what is damaged", box=None)
    lines = []
    for name in args.campaigns or CAMPAIGNS:
        start = time.perf_counter()
        count = args.attacks or CAMPAIGNS[name].attacks
        seeds = range(args.seed, args.seed + count)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(name, total=count)
            failed = run(name, seeds, args.jobs, partial(progress.advance, task))
        survived = f"{count - len(failed)}/{count}"
        seconds = f"{time.perf_counter() - start:.0f}"
        table.add_row(name, survived, seconds, CAMPAIGNS[name].about)
        lines += [f"{name} --seed {seed} --attacks 1: {text}" for seed, text in failed.items()]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
