"""Puts this folder on sys.path (pytest does, because the file is here), so that all tests share its helper modules."""

import signal

# A shell starts its background jobs with SIGINT ignored, which every program of the tests would inherit: Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter) -> None:
    """What became of every planned sample under each fault (data/test_faults.py)."""
    import sys

    faults = sys.modules.get("test_faults") or sys.modules.get("tests.data.test_faults")
    if faults is None or not faults.TABLE:
        return
    terminalreporter.section("faults between the store and the stream")
    terminalreporter.write_line(f"{'fault':<42}{'planned':>9}{'delivered':>11}{'replaced':>10}{'unaccounted':>13}")
    for name, *counts in faults.TABLE:
        terminalreporter.write_line(f"{name:<42}{counts[0]:>9}{counts[1]:>11}{counts[2]:>10}{counts[3]:>13}")
