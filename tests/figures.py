"""What the fault suite counts about itself, printed as one table at its end."""

from collections import defaultdict

import pytest

LARGEST = ("seconds", "percent")  # of these the largest, of all others the sum
PROPERTY = "figures"


@pytest.fixture
def count(record_property):
    """count(measure, tried=1, right=1, ...): kept also where the test then fails."""
    return lambda measure, **numbers: record_property(PROPERTY, [measure, numbers])


def pytest_terminal_summary(terminalreporter):
    """Sums over all tests, whichever process they ran in; and every reason for a skip."""
    table = defaultdict(lambda: defaultdict(float))
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        if getattr(report, "when", None) != "call":
            continue
        counted = [value for name, value in report.user_properties if name == PROPERTY]
        for measure, numbers in counted:
            for key, number in numbers.items():
                found = table[measure][key]
                table[measure][key] = max(found, number) if key in LARGEST else found + number
    if table:
        terminalreporter.section("what was tried, and what came of it")
    for measure, numbers in sorted(table.items()):
        text = ", ".join(f"{key} {number:.10g}" for key, number in numbers.items())
        terminalreporter.write_line(f"{measure:<58}{text}")
