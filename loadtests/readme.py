"""Puts the tables of the published result file into README: `python -m loadtests.readme` (`make bench-readme`).

What stands between the two markers is replaced; a test holds README to the file. `--check` writes nothing and ends
with 1 where the two differ.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtests.record import PUBLISHED, ROOT, Record, RecordError, read
from loadtests.table import render_tables

README = ROOT / "README.md"
BEGIN = "<!-- benchmark: from loadtests/results/published.json, by `make bench-readme` -->"
END = "<!-- benchmark: end -->"


class MarkersMissing(Exception):
    """The text has not exactly one pair of markers, in their order."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check README; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.readme", description=__doc__, allow_abbrev=False)
    parser.add_argument("result", type=Path, nargs="?", default=PUBLISHED, metavar="RESULT.json")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="(README.md)")
    parser.add_argument("--check", action="store_true", help="write nothing, exit code 1 when it is not up to date")
    args = parser.parse_args(argv)
    try:
        text = args.readme.read_text()
        updated = replace_tables(text, read(args.result))
    except (RecordError, MarkersMissing, OSError) as error:
        print(f"readme: {args.readme}: {error}", file=sys.stderr)
        return 2
    if args.check:
        if text != updated:
            print(f"readme: {args.readme} does not show {args.result}: run `make bench-readme`", file=sys.stderr)
        return int(text != updated)
    args.readme.write_text(updated)
    return 0


def replace_tables(text: str, record: Record) -> str:
    """The text with the record between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise MarkersMissing(f"expected one line {BEGIN!r} and, below it, one line {END!r}")
    before, _, rest = text.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return f"{before}{BEGIN}\n\n{render(record)}\n\n{END}{behind}"


def render(record: Record) -> str:
    """When and where it was measured, by which command, and the tables."""
    machine, plan = record.machine, record.plan
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['memory']}, {machine['system']}"
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    command = " ".join(["make bench", *([f"BENCH_FLAGS='{' '.join(record.flags)}'"] if record.flags else [])])
    about = [
        f"Measured {record.measured_at[:10]} by `{command}`:",
        f"medians of {plan['rounds']} rounds of {plan['round_s']:g} s;",
        f"{where};",
        f"load average before the start {machine['load'].split()[0]};",
        f"{versions}; commit {record.commit[:12]}.",
    ]
    return "\n".join([*about, "", render_tables(record)])


if __name__ == "__main__":
    sys.exit(main())
