"""The report of a study: a page whose parts between markers are made from the records."""

from __future__ import annotations

import re
from pathlib import Path

from studies.experiment import Frames, Study


def write_report(study: Study, frames: Frames, folder: Path) -> Path:
    """Write ``README.md`` and ``pictures/`` of a study into a folder.

    A page that exists keeps all text outside its markers ``<!-- study: SECTION -->`` and
    ``<!-- study: end -->``, so the conclusions may be written by hand. A new page has all sections
    under their names.

    Raises:
        ValueError: A marker of the page names no section of the study.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    text = path.read_text() if path.exists() else _new_page(study)

    def renewed(found: re.Match[str]) -> str:
        name = found[1]
        if name not in study.sections:
            raise ValueError(
                f"There is no section {name!r}; choose from {', '.join(study.sections)}."
            )
        body = study.sections[name](frames, pictures).strip() or "There are no records of it."
        return f"<!-- study: {name} -->\n{body}\n<!-- study: end -->"

    pattern = r"<!-- study: (?!end)(\S+) -->.*?<!-- study: end -->"
    path.write_text(re.sub(pattern, renewed, text, flags=re.DOTALL))
    return path


def _new_page(study: Study) -> str:
    parts = [f"# {study.title}"]
    for name in study.sections:
        heading = name.replace("-", " ").capitalize()
        parts.append(f"## {heading}\n\n<!-- study: {name} -->\n<!-- study: end -->")
    return "\n\n".join(parts) + "\n"
