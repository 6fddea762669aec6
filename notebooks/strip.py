"""Take the outputs out of notebooks: ``python notebooks/strip.py FILE...``; 1 if there were any."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def strip(path: Path) -> bool:
    """Whether the notebook had outputs, which it has not any more."""
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    stripped = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.write_text(stripped, encoding="utf-8")
    return stripped != text


if __name__ == "__main__":
    had_outputs = [strip(Path(name)) for name in sys.argv[1:]]
    sys.exit(any(had_outputs))
