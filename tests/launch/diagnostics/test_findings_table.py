"""The doctor's table."""

from __future__ import annotations

import pytest

from launch.diagnostics.findings import Finding
from launch.diagnostics.findings_table import print_findings


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"rm {'/a/long/path' * 9}"
    findings = [
        Finding(check="disk", message="800 GB free", nodes=("n2",)),
        Finding(check="disk", message="700 GB free", nodes=("n1",)),
        Finding(check="extensions", status="fail", message="a lock is left", fix=command, nodes=("n2",)),
        Finding(check="clock", status="warn", message="word " * 40, nodes=("n1",)),
        *(Finding(check="CPUs", message="4", nodes=(node,)) for node in ("n2", "n1")),
    ]
    monkeypatch.setenv("COLUMNS", "80")
    assert print_findings("doctor", findings, ["n1", "n2"], 1.0) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[2:4] == [
        "CPUs        pass  n1, n2  4",
        "disk        pass  n1, n2  n2: 800 GB free; n1: 700 GB free",
    ]
    assert command in printed.replace("\n", " ").replace("  ", "")
    assert f"{'/a/long/path' * 9}\n" in printed  # whole, to be copied
    assert printed.endswith("2 pass, 1 warn, 1 fail, in 1.0 s\n")
    assert max(len(line) for line in printed.splitlines() if "/a/long" not in line) <= 80
    assert print_findings("doctor", findings[:2], ["n1", "n2"], 1.0) == 0
