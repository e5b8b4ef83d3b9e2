"""``tracesim whatif`` as a user types it: the table, the files, how it refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.conftest import Run

PCIE = "links.pcie.bandwidth_gb_s"


def test_the_table_and_the_ledgers_fit_a_terminal(run: Run, job: Path) -> None:
    code, out, err = run("whatif", job, "--topology", "a5000x8", "--vary", f"{PCIE}=8,64", "--vary", "host.op_us=1,2")
    assert (code, err) == (0, "")
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 100
    for words in (
        "speed-up",
        "links.pcie",
        "bandwidth_gb_s",
        "op_us",
        "bound by",
        "of 24",
        "were that free",
        "slowest rank",
    ):
        assert words in out, words


def test_the_json_says_what_the_table_says(run: Run, job: Path) -> None:
    code, out, _ = run("whatif", job, "--topology", "a5000x8", "--vary", f"{PCIE}=12", "--json", "-")
    told = json.loads(out)
    assert code == 0
    base, (row,) = told["base"], told["rows"]
    assert base["values"] == {PCIE: 24}
    assert row["values"] == {PCIE: 12}
    assert row["speedup"] == pytest.approx(base["step_ms"] / row["step_ms"])
    assert sum(row["breakdown_ms"].values()) == pytest.approx(row["step_ms"])
    assert sum(item["ms"] for item in row["critical_path"]) == pytest.approx(row["step_ms"])
    assert sum(line["change_ms"] for line in row["ledger"]) == pytest.approx(row["step_ms"] - base["step_ms"])
    assert row["bound_by"]["part"] == "communication" and row["bound_by"]["op"] == "all_reduce 100.00 MiB"
    assert row["next_bottleneck"]["bound_by"]["part"] == "compute"


def test_rows_have_ranges_and_what_machines_share_cancels(run: Run, job: Path) -> None:
    """Half the bandwidth on a host without a curve of its own: 24 all-reduces as wrong on one as on the other, so the
    speed-up is surer than the steps."""
    _, out, _ = run("whatif", job, "--topology", "a6000x8", "--vary", f"{PCIE}=12", "--json", "-")
    told = json.loads(out)
    base, (row,) = told["base"], told["rows"]
    assert base["step_ms_p10"] < base["step_ms"] < base["step_ms_p90"]
    assert row["step_ms_p10"] < row["step_ms"] < row["step_ms_p90"]
    assert row["speedup_p10"] <= row["speedup"] <= row["speedup_p90"]
    alone = (base["step_ms_p90"] / row["step_ms_p10"]) / (base["step_ms_p10"] / row["step_ms_p90"])
    assert row["speedup_p90"] / row["speedup_p10"] < alone**0.5
    _, out, _ = run("whatif", job, "--topology", "a5000x8", "--vary", f"{PCIE}=12", "--no-ranges", "--json", "-")
    assert json.loads(out)["rows"][0]["speedup_p10"] is None


def test_settings_make_the_base(run: Run, job: Path) -> None:
    _, out, _ = run(
        "whatif", job, "--topology", "a5000x8", "--set", f"{PCIE}=48", "--vary", f"{PCIE}=48", "--json", "-"
    )
    told = json.loads(out)
    assert told["base"]["values"] == {PCIE: 48}
    assert told["rows"][0]["unchanged_because"] == "this is the base"


def test_the_same_command_gives_the_same_bytes(run: Run, job: Path, tmp_path: Path) -> None:
    written = []
    for i in range(2):
        files = [tmp_path / f"{i}.{kind}" for kind in ("json", "png", "pt.trace.json.gz")]
        options = zip(("--json", "--plot", "--timeline"), files, strict=True)
        run("whatif", job, "--topology", "a5000x8", "--vary", f"{PCIE}=8,12", *(x for pair in options for x in pair))
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]
    assert written[0][1].startswith(b"\x89PNG")


def test_base_and_rows_side_by_side(run: Run, job: Path, tmp_path: Path) -> None:
    file = tmp_path / "both.pt.trace.json.gz"
    run("whatif", job, "--topology", "a5000x8", "--vary", f"{PCIE}=12", "--timeline", file)
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    order = {e["pid"]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    shown = [names[pid] for pid in sorted(order, key=lambda pid: order[pid])]
    gpu = "gpu0 NVIDIA RTX A5000"
    row = f"{PCIE}=12"
    assert shown[:5] == [
        "base: rank 0 host", f"base: rank 0 {gpu}", f"{row}: rank 0 host", f"{row}: rank 0 {gpu}", "base: rank 1 host",
    ]  # fmt: skip
    assert len(shown) == 2 * 2 * 8
    # Every event is in a process that has a name, arrows do not cross from one timeline into the other, and the 24
    # all-reduces of eight ranks are there twice.
    assert {e["pid"] for e in events if isinstance(e["pid"], int)} == set(names)
    ends: dict[int, set[bool]] = {}
    for event in events:
        if event.get("cat") == "ac2g":
            ends.setdefault(event["id"], set()).add(names[event["pid"]].startswith("base"))
    assert ends and all(len(sides) == 1 for sides in ends.values())
    kernels = [e for e in events if e.get("cat") == "kernel" and e["name"] == "ncclAllReduce"]
    assert len(kernels) == 2 * 8 * 24


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--vary", f"{PCIE}="], "no values"),
        ([], "nothing to vary"),
        (["--vary", "links.pcie.bandwith=8"], "did you mean 'links.pcie.bandwidth_gb_s'"),
        (["--vary", f"{PCIE}=-3"], f"{PCIE}: must be > 0, found -3"),
        (["--vary", f"{PCIE}=8", "--plot", "x.pdf"], "x.pdf: the plot is a PNG"),
        (["--vary", f"{PCIE}=8", "--timeline", "x.txt"], "x.txt"),
        (["--vary", "topology=a5000x8,a5000x1"], "layers has 8 ranks, a5000x1 only 1 GPU; choose a larger --topology"),
        (["--vary", f"{PCIE}=8", "--gpus", "0"], "names 1 GPUs for the 8 ranks"),
    ],
)
def test_what_is_refused(run: Run, job: Path, args: list[str], words: str) -> None:
    code, out, err = run("whatif", job, "--topology", "a5000x8", *args)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and words in err


def test_a_what_if_needs_a_machine(run: Run, job: Path) -> None:
    code, _, err = run("whatif", job, "--topology", "as-captured", "--vary", f"{PCIE}=8")
    assert code == 2 and "needs a machine to change" in err


def test_kernels_beside_all_reduces_are_slower_unless_nothing_is_shared(run: Run, job: Path) -> None:
    """On a machine where the all-reduces hide behind backward, so that the kernels decide."""
    steps = []
    for option in ([], ["--no-contention"]):
        _, out, _ = run("replay", job, "--topology", "a5000x8-nvswitch", *option, "--json", "-")
        steps.append(json.loads(out)["step_ms"])
    assert steps[0] > steps[1]
    assert steps[0] < 1.05 * steps[1]


def test_what_is_shared_is_told_apart_in_the_ledger(run: Run, job: Path) -> None:
    # The all-reduces hide behind backward but for the last; the kernels beside them are slower: that is on the path.
    args = ("whatif", job, "--topology", "a5000x8-nvswitch", "--vary", "links.nvlink.bandwidth_gb_s=10", "--json", "-")
    _, out, _ = run(*args)
    told = json.loads(out)
    assert "contention" in {item["part"] for item in told["base"]["critical_path"]}
    _, out, _ = run(*args, "--no-contention")
    assert "contention" not in {item["part"] for item in json.loads(out)["base"]["critical_path"]}


def test_parallel_needs_a_machine(run: Run, job: Path) -> None:
    code, _, err = run("replay", job, "--topology", "as-captured", "--parallel", "dp=2")
    assert code == 2 and "needs a machine" in err
    code, _, err = run("replay", job, "--topology", "a5000x8", "--parallel", "dp=2")
    assert code == 2 and "has 8 ranks already" in err
