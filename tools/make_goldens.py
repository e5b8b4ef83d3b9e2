"""Make the goldens anew: run every ``tests/**/golden_cases.py`` and write what it gives beside it into ``golden/``.

Look at the difference (``git diff``) before committing it: a golden says what was seen to be right.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    sys.path.insert(0, str(ROOT))
    for cases in sorted((ROOT / "tests").glob("**/golden_cases.py")):
        folder = cases.parent / "golden"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name, content in load(cases).items():
            (folder / name).write_bytes(content)
            print(f"{(folder / name).relative_to(ROOT)}: {len(content)} bytes")


def load(cases: Path) -> dict[str, bytes]:
    """The goldens of one ``golden_cases.py``, which may import its neighbours as pytest lets it."""
    sys.path.insert(0, str(cases.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"golden_cases_of_{cases.parent.name}", cases)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.goldens()
    finally:
        sys.path.remove(str(cases.parent))


if __name__ == "__main__":
    main()
