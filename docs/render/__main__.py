"""`python -m docs.render [--check]`: bring the rendered parts of docs/ up to date, or say which are not."""

import argparse
import sys
from pathlib import Path

from docs.render import access, bundle, commands, compatibility, errors, http, metrics
from docs.render.page import Render, parts, rendered

DOCS = Path(__file__).parents[1]
PARTS: dict[str, Render] = {
    "access": access.access_table,
    "bundle-checks": bundle.checks,
    "bundle-fields": bundle.field_tables,
    "bundle-specification": bundle.specification,
    "command-overview": commands.overview,
    "command-reference": commands.reference,
    "error-codes": errors.codes_table,
    "http-routes": http.routes,
    "http-schemas": http.schemas,
    "metrics": metrics.series_table,
    "page-headers": access.page_headers,
    "refused-flags": compatibility.refused_flags,
    "vllm-versions": compatibility.versions,
}
FILES: dict[str, Render] = {"bundle.schema.json": bundle.json_schema}


def main() -> int:
    """Render every page; exit status 1 when `--check` finds one that is not current."""
    parser = argparse.ArgumentParser(prog="python -m docs.render", description="Render parts of docs/ from the code.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 when something is stale")
    check = parser.parse_args().check
    current = {DOCS / name: render() for name, render in FILES.items()}
    used: set[str] = set()
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        used.update(parts(text))
        current[page] = rendered(text, PARTS)
    unused = PARTS.keys() - used
    stale = [path for path, text in current.items() if not path.is_file() or path.read_text() != text]
    for path in () if check else stale:
        path.write_text(current[path])
    verb = "not current, run `make docs`" if check else "rendered"
    for path in stale:
        print(f"docs/{path.name}: {verb}")
    for name in sorted(unused):
        print(f"no page shows the rendered part {name}")
    return 1 if unused or (check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
