"""Tables and pictures from results whose figures are known."""

import json

import pytest

from bench.report import (
    ReportConfig,
    Results,
    kernel_table,
    largest_errors,
    main,
    pareto,
    projection_table,
    read_results,
    short_report,
    training_table,
    write_report,
)
from hamner.errors import UserError


def training(option: str, speed: int, gib: float | None, **labels) -> dict:
    kind = "trainer" if "trainer" in labels else "option"
    if kind == "option":
        labels = {"batch_size": 24, "micro_batch_size": 24, **labels}
    memory = {} if gib is None else {"peak_allocated_gib": gib, "peak_reserved_gib": gib + 1}
    return {
        "kind": kind,
        "option": option,
        "tokens_per_second": speed,
        "mfu": 0.4,
        "p10_ms": 9.0,
        "p50_ms": 10.0,
        "p90_ms": 11.0,
        "build_seconds": 2.0,
        "warm_up_seconds": 30.0,
        "conditions": {"gpu": "NVIDIA X", "torch": "2.13"},
        **labels,
        **memory,
    }


def kernel(op: str, implementation: str, milliseconds: float, share: float | None = 0.5) -> dict:
    row = {"kind": "kernel", "op": op, "implementation": implementation, "median_ms": milliseconds}
    return row | ({} if share is None else {"gb_per_s": 100.0, "of_ceiling": share})


ROWS = [
    training("a", 200_000, 16.0, recompute="selective"),
    training("a", 160_000, 7.0, recompute="full"),
    training("a", 190_000, 25.9, trainer="compiled"),
    kernel("rope forward", "hamner", 0.05),
    kernel("rope forward", "compiled", 0.10),
    kernel("rope forward", "liger", 0.20),
    kernel("moe_route forward", "hamner", 0.01, share=None),
    kernel("int8 o forward", "hamner", 0.06),
    {"kind": "data", "source": "shards", "tokens_per_second": 20_000_000},
    {"kind": "checkpoint", "direction": "save", "mb_per_s": 500},
]
COMPILED = {
    "kernels": 200, "graphs": 60, "rows": 90, "seconds": 70.0, "processes": 10, "failed": []
}  # fmt: skip
MISFITS = [{"row": "current none", "needs_gib": 31.25, "available_gib": 22.0}]


@pytest.fixture
def results_file(tmp_path):
    path = tmp_path / "results.json"
    document = {"benchmarks": [{"name": "x", "extra_info": row} for row in ROWS]}
    path.write_text(json.dumps({**document, "misfits": MISFITS}))
    return path


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_trainers_by_speed():
    rows = cells(training_table(ROWS[:3]))
    assert [row[1] for row in rows[2:]] == ["hamner, selective", "compiled", "hamner, full"]
    assert rows[2][2:8] == ["200,000", "40.0%", "16.00", "10.0", "2", "30"]


def test_projected_beside_measured():
    rows = [
        training("a", 200_000, 16.0, recompute="selective", micro_batch_size=6)
        | {"projected_tokens_per_second": 210_000, "projected_gib": 15.6},
        training("c", 200_000, 10.0, recompute="full")
        | {"projected_tokens_per_second": 184_000, "projected_gib": 9.9},
    ]
    assert cells(projection_table(rows))[2] == [
        "a", "selective", "6", "210,000", "200,000", "+5.0%", "15.60", "16.00", "-2.5%"
    ]  # fmt: skip
    assert largest_errors(rows).endswith(
        "of 2 projections: speed -8.0% (c, full, 24); memory -2.5% (a, selective, 6)."
    )


def test_kernels_beside_their_best_peer():
    kernels = [row for row in ROWS if row["kind"] == "kernel"]
    rows = cells(kernel_table(kernels, short=True))
    assert rows[2] == ["rope forward", "0.050", "100 GB/s", "50%", "compiled", "0.100", "2.00 x"]
    assert rows[3] == ["moe_route forward", "0.010", "", "", "", "", ""]
    full = cells(kernel_table([*kernels, kernel("rope forward", "liger", 0.2)]))
    assert full[2] == [*rows[2], "liger 0.200"]
    assert full[3] == [*rows[3], ""]


def test_another_version_of_ours_is_no_peer():
    versions = ("hamner", 0.1), ("hamner grouped", 0.2), ("fp8", 0.3)
    rows = cells(kernel_table(kernel("int8 o forward", name, ms) for name, ms in versions))
    assert rows[2][4:] == ["fp8", "0.300", "3.00 x", "hamner grouped 0.200"]


def test_a_row_that_disagreed_gives_no_speed_up():
    """It was not timed, so it is not there, and nothing is said of it."""
    rows = cells(kernel_table([kernel("rope forward", "compiled", 0.1)], short=True))
    assert rows[2] == ["rope forward", "", "", "", "compiled", "0.100", ""]


def test_ours_with_other_flags_is_tabulated_and_not_drawn(tmp_path):
    rows = [training("a", 190_000, 15.8, trainer=f"hamner --matmul {name}") for name in ("x", "y")]
    results = tmp_path / "rows.jsonl"
    results.write_text("".join(json.dumps({"extra_info": row}) + "\n" for row in rows))
    report = write_report(ReportConfig(results, tmp_path / "out"))
    assert "hamner --matmul y" in report.read_text()
    assert list(report.parent.iterdir()) == [report]


def test_pareto_front():
    assert pareto([(16, 200), (7, 160), (26, 190), (16, 150), (30, 210)]) == [
        (7, 160),
        (16, 200),
        (30, 210),
    ]


def test_writes_tables_and_pictures(results_file, tmp_path):
    report = write_report(ReportConfig(results_file, tmp_path / "out"))
    text = report.read_text()
    for part in (
        "gpu NVIDIA X",
        "![Throughput",
        "![Kernels",
        "![int8",
        "needs 31.2 GiB of 22.0 GiB",
    ):
        assert part in text
    for name in ("throughput.png", "kernels.png", "int8.png"):
        assert (report.parent / name).read_bytes().startswith(b"\x89PNG")


def test_rows_of_a_cpu_have_no_picture(tmp_path):
    row = training("tiny", 4_000, None, recompute="auto")
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": row}]}))
    main([str(path), "--out", str(tmp_path / "out")])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.md"]


def test_the_short_report_names_what_did_not_fit():
    text = "\n".join(short_report(Results(ROWS, MISFITS)))
    for part in ("hamner, full", "rope forward", "data from shards: 20,000,000", "does not fit"):
        assert part in text


def test_rows_of_a_suite_that_was_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"compile_ahead": COMPILED}, *({"fullname": "x", "extra_info": row} for row in ROWS)]
    lines.append({"misfit": MISFITS[0]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"extra_in')
    results = read_results(path)
    assert results == Results(ROWS, MISFITS, COMPILED)
    assert "compiled ahead: 200 kernels and 60 graphs" in "\n".join(short_report(results))


def test_a_single_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"fullname": "x", "extra_info": ROWS[0]}) + "\n")
    assert read_results(path).rows == ROWS[:1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "is no result of the suite"),
        ("not json\nnor this\n", "is no result of the suite"),
        ("[]", "is no result of the suite"),
        ("", "is no result of the suite"),
        ('{"benchmarks": []}', "holds no row"),
        (None, "cannot be read"),
    ],
)
def test_bad_results_are_refused_before_anything_is_written(tmp_path, content, said):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        write_report(ReportConfig(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rows_without_a_kind_are_of_other_suites(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": {"a": 1}}]}))
    assert read_results(path).rows == []
