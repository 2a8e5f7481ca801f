"""What training reads with does not know what writes sets."""

import re
from pathlib import Path

FILES = sorted((Path(__file__).parents[2] / "dist_t2i" / "data").glob("*.py"))


def test_reading_imports_nothing_that_writes_sets():
    wrong = [path.name for path in FILES if re.search(r"(import|from) .*\bsharding\b", path.read_text())]
    assert len(FILES) > 15 and not wrong
