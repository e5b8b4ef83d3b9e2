"""What is printed: what decides comes first, lines fit the terminal, names are never markup."""

from __future__ import annotations

import io

import msgspec
import pytest
from golden_cases import WIDTH, comparison_text, console, printed, summary_text
from rich.console import Console
from told_timelines import GIB, MS, Sketch, collective, out_of_memory, two_ranks, two_ranks_measured

from sim.report.summarize import summarize
from sim.report.summary import Summary
from sim.report.text import ComparisonRow, _joules, render_comparison, render_summary
from sim.timeline import MemorySample, Step


def lines_of(summary: Summary, width: int = WIDTH) -> list[str]:
    return summary_text(summary, width).decode().splitlines()


def line_with(summary: Summary, words: str) -> str:
    (line,) = [line for line in lines_of(summary) if words in line]
    return line


def test_the_first_line_says_whether_it_fits() -> None:
    # 6 GiB reserved on the fuller of two devices of 24.
    assert lines_of(summarize(two_ranks()))[0] == (
        "Fits: a step takes 13.00 ms on 2 x NVIDIA RTX A5000 and needs 6.00 of 24.00 GiB"
    )  # fmt: skip
    first, second, third = lines_of(summarize(out_of_memory()))[:3]
    # 23 + 3 - 24 = 2 GiB.
    assert first.startswith("Out of memory: 2.00 GiB short on rank 0 (gpu0, NVIDIA RTX A5000): aten::mm asks")
    assert "for 3.00 GiB where 23.00 GiB of 24.00 GiB are reserved (22.00 GiB allocated," in second
    assert "1.00 GiB cached but unusable)" in third


def test_what_would_be_needed_is_said_where_the_replay_went_on() -> None:
    # The replay went on to 26 GiB of 24.
    memory = (MemorySample(0, 5 * MS, 26 * GIB, 26 * GIB),)
    s = summarize(msgspec.structs.replace(out_of_memory(), memory=memory))
    text = " ".join(" ".join(lines_of(s)).split())
    assert text.startswith("Out of memory: 2.00 GiB short on rank 0")  # 26 - 24, as the first request
    assert "the run takes 5.00 ms on NVIDIA RTX A5000 and would need 26.00 of 24.00 GiB" in text
    assert "26.00 / 24.00" in comparison_text(summarize(two_ranks()), s).decode()


def test_without_memory_events_it_does_not_say_that_it_fits() -> None:
    first = lines_of(summarize(two_ranks_measured()))[0]
    assert first == "A step takes 13.50 ms on 2 x NVIDIA RTX A5000; its memory is unknown"


def test_times_with_shares_and_the_error() -> None:
    s = summarize(two_ranks(), two_ranks_measured())
    assert "13.00" in line_with(s, "measured 13.50 ms, error -3.7 %")
    # 6.5 of 13 ms are half: 12 of 24 marks; 5 of 13 are 38.5 %: 9.2, so 9 marks.
    assert line_with(s, "compute  ").split() == ["compute", "6.50", "50.0", "%", "█" * 12]
    assert next(line for line in lines_of(s) if line.startswith("  idle")).split()[1:] == ["5.00", "38.5", "%", "█" * 9]


def test_a_trace_without_step_marks_is_told_as_a_run() -> None:
    whole = Sketch(1).timeline(origin="measured", steps=(Step(0, 0, "trace", 0, 7 * MS),))
    lines = lines_of(summarize(whole, whole))
    assert lines[0] == "The run takes 7.00 ms on NVIDIA RTX A5000; its memory is unknown"
    assert lines[2].split() == ["run", "7.00", "measured", "trace", "7.00", "ms"]


def test_an_algorithm_that_is_only_captured_is_named_once() -> None:
    s = Sketch(1)
    s.step(0, 0, 0, 10)
    captured = msgspec.structs.replace(collective(), algorithm="as captured", protocol="as captured")
    s.work(0, 0, 5, "nccl", "communication", collective=captured)
    assert line_with(summarize(s.timeline()), "all_reduce").split()[4:7] == ["as", "captured", "1"]


def test_estimates_are_pointed_out() -> None:
    text = " ".join(lines_of(summarize(two_ranks())))
    assert "kernel durations: 6 measured, 2 from a profile, 2 roofline; 1 (9.1 %) estimated" in text
    assert "estimated" not in " ".join(lines_of(summarize(out_of_memory())))


@pytest.mark.parametrize("width", [80, 120])
def test_every_line_fits(width: int) -> None:
    s = Sketch(12)
    for rank in range(12):
        for i in range(15):
            s.step(rank, i, 1000 * i, 1000 * i + 900 + rank)
        s.work(rank, 1, 700, "void at::native::" + "x" * 300 + "<float, [bold]>(int)")
        for kind in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all"):
            for size in (1, 1 << 20, 1 << 30):
                s.work(rank, 800, 801, "nccl", "communication", collective=collective(kind, size))
    timeline = s.timeline(warnings=tuple(f"warning {i} " + "which is long " * 12 for i in range(13)))
    lines = lines_of(summarize(timeline, timeline), width)
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    # 15 steps, 10 shown; 12 ranks, the 8 slowest shown; 12 rows of collectives, 8 shown; 13 warnings, 10 shown.
    assert "... and 5 more steps" in text
    assert "... and 4 more ranks, 900.00 to 903.00 ms a step" in text
    assert "... and 4 more kinds and sizes" in text
    assert "... and 3 more warnings" in text
    assert "warning 9 " in text
    assert "warning 10 " not in text


def test_of_many_ranks_the_slowest_are_shown() -> None:
    s = Sketch(10)
    for rank in range(10):
        s.step(rank, 0, 0, 10 + rank)
    shown = [line.split()[:2] for line in lines_of(summarize(s.timeline())) if " gpu" in line]
    assert shown == [[str(rank), f"gpu{rank}"] for rank in range(9, 1, -1)]


def test_names_are_not_markup() -> None:
    s = Sketch(1)
    s.step(0, 0, 0, 10)
    s.work(0, 0, 5, "kernel[bold red]<int>[/bold red]")
    summary = summarize(s.timeline(warnings=("[link=x]odd[/link] [memory]",)))
    assert line_with(summary, "kernel[bold red]<int>[/bold red]")
    assert line_with(summary, "[link=x]odd[/link] [memory]")


def test_what_is_missing_in_all_comes_first() -> None:
    """The first request lacked 2 GiB; the replay went on to 30 of 24: 6 GiB."""
    memory = (MemorySample(0, 5 * MS, 30 * GIB, 30 * GIB),)
    s = summarize(msgspec.structs.replace(out_of_memory(), memory=memory))
    assert lines_of(s)[0].startswith("Out of memory: 6.00 GiB short on rank 0 (gpu0, NVIDIA RTX A5000): aten::mm asks")


@pytest.mark.parametrize(
    ("energy_j", "told"),
    [
        (107300.0, "107 kJ"),
        (6.55, "6.55 J"),
        (999.6, "1.00 kJ"),
        (120.4, "120 J"),
        (0.0149, "14.9 mJ"),
        (3e-5, "0.03 mJ"),
    ],
)
def test_an_energy_is_told_without_an_exponent(energy_j: float, told: str) -> None:
    assert _joules(energy_j) == told


def test_a_terminal_without_unicode_gets_ascii() -> None:
    raw = io.BytesIO()
    screen = Console(width=80, file=io.TextIOWrapper(raw, encoding="ascii"), color_system=None, _environ={})
    render_summary(summarize(two_ranks(), two_ranks_measured()), screen)
    screen.file.flush()
    (compute,) = [line for line in raw.getvalue().splitlines() if line.startswith(b"  compute")]
    assert compute.count(b"#") == 12


def test_comparison_is_one_table_of_runs() -> None:
    text = comparison_text(summarize(two_ranks()), summarize(out_of_memory()), width=120).decode()
    (row,) = [line for line in text.splitlines() if line.startswith("one GPU")]
    assert row.split() == [
        "one", "GPU", "13.00", "6.50", "1.00", "5.00", "6.00", "/", "24.00", "out/one-gpu.pt.trace.json.gz",
    ]  # fmt: skip
    assert "> 24.00" in text
    assert "too large: Out of memory: 2.00 GiB short" in text


def test_a_file_to_open_is_never_broken() -> None:
    name = "out/" + "long-" * 30 + "name.pt.trace.json.gz"
    screen = console()
    render_comparison([ComparisonRow("a", summarize(two_ranks()), name)], screen)
    assert name in printed(screen).decode()


def test_a_device_of_unknown_size_is_not_said_to_be_large_enough() -> None:
    timeline = two_ranks()
    ranks = tuple(msgspec.structs.replace(info, memory_bytes=None) for info in timeline.ranks)
    lines = lines_of(summarize(msgspec.structs.replace(timeline, ranks=ranks)))
    assert not lines[0].startswith("Fits")
    assert any(line.split()[:3] == ["peak", "reserved", f"{6 * GIB / GIB:.2f}"] for line in lines)
