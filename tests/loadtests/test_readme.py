"""README's tables are those of the published result file, and how they come there."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.peers import NATIVE, Sample
from loadtests.readme import BEGIN, END, MarkersMissing, main, replace_tables
from loadtests.record import PUBLISHED, Record, write
from loadtests.results import Goal, Row

RECORD = Record(
    measured_at="2026-11-28T12:00:00+00:00",
    commit="0123456789abcdef",
    flags=("--quick",),
    machine={
        "processor": "a processor",
        "cores": "2 usable of 2",
        "memory": "24 GiB",
        "system": "Linux",
        "load": "0.10 on average",
    },
    versions={"sluice": "0.1.0"},
    plan={"rounds": 3, "round_s": 2.5},
    rows=(Row("identity", "identity 1x16", NATIVE, 1, "1 (1 x 1)", (Sample(4000.0, 200.0, 0.2, 0.5),), "h2load"),),
    goals=(Goal("p50, over the echo", (0.4,), 0.5, at_least=False),),
)


def test_readme_shows_the_published_result() -> None:
    """After a run that is to be published: `make bench-readme`."""
    assert main(["--check"]) == 0, f"README does not show {PUBLISHED}"


def test_what_is_between_the_markers_is_replaced_and_nothing_else() -> None:
    text = f"# Title\n{BEGIN}\nold\n{END}\nafter\n"
    replaced = replace_tables(text, RECORD)
    assert replaced.startswith(f"# Title\n{BEGIN}\n\nMeasured 2026-11-28 by `make bench BENCH_FLAGS='--quick'`:\n")
    assert replaced.endswith(f"\n\n{END}\nafter\n")
    assert "old" not in replaced
    assert "a processor, 2 usable of 2 cores, 24 GiB, Linux;" in replaced
    assert "commit 0123456789ab." in replaced
    assert "| identity 1x16 |" in replaced
    assert "p50, over the echo" in replaced
    assert replace_tables(replaced, RECORD) == replaced


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_without_one_pair_of_markers_nothing_is_written(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MarkersMissing):
        replace_tables(text, RECORD)
    page, result = tmp_path / "README.md", tmp_path / "result.json"
    page.write_text(text)
    write(result, RECORD)
    assert main([str(result), "--readme", str(page)]) == 2
    assert page.read_text() == text
    assert "expected one line" in capsys.readouterr().err


def test_a_page_is_checked_written_and_then_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, result = tmp_path / "README.md", tmp_path / "result.json"
    page.write_text(f"{BEGIN}\n{END}\n")
    write(result, RECORD)
    flags = [str(result), "--readme", str(page)]
    assert main([*flags, "--check"]) == 1
    assert page.read_text() == f"{BEGIN}\n{END}\n"
    assert "run `make bench-readme`" in capsys.readouterr().err
    assert main(flags) == 0
    assert main([*flags, "--check"]) == 0


def test_a_missing_result_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    assert main([str(tmp_path / "none.json"), "--readme", str(page)]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
