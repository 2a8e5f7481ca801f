"""Settings of every test; helper modules are in tests/support (pyproject.toml puts that folder on sys.path)."""

import os
import signal

# A shell starts its background jobs with SIGINT ignored, which every program of the tests would inherit: Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run in parallel: threads that spin while they wait for a core make tests slower than one thread does.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints what happened to the planned samples under each fault (data/stream/test_faults.py), from all processes."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    told = [report for report in reports if getattr(report, "when", "") == "teardown"]
    table = [value for report in told for name, value in report.user_properties if name == "fault"]
    if not table:
        return
    terminalreporter.section("faults between the store and the stream")
    terminalreporter.write_line(f"{'fault':<42}{'planned':>9}{'delivered':>11}{'replaced':>10}{'unaccounted':>13}")
    for name, *counts in table:
        terminalreporter.write_line(f"{name:<42}{counts[0]:>9}{counts[1]:>11}{counts[2]:>10}{counts[3]:>13}")
