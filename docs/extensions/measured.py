"""`measured`: numbers of docs/numbers/*.json inside a page, so that no page holds a number that no command printed.

A table, in MyST:

    ```{measured} methods
    :ids: methods/*/encoder/*
    :columns: id=recipe and dims, knn=kNN, linear=linear probe
    :strip: methods/
    ```

takes the rows of docs/numbers/methods.json whose id matches one of the patterns, in the record's order, and those
columns of them (`column=title`), and says below which command printed them (`:without-source:` leaves that to the last
of several tables). In a sentence,

    {measured}`loss loss/time/4096/float32/lightly ratio`

is one value. A record, an id or a column that is not there is a warning, and so an error of `make docs`.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from benchmarks.record import cell

_log = logging.getLogger(__name__)


def _record(folder: Path, name: str) -> dict[str, Any]:
    """The contents of numbers/NAME.json; raises `LookupError` when there is none."""
    path = folder / "numbers" / f"{name}.json"
    if not path.is_file():
        raise LookupError(f"there is no record {path.name}")
    return json.loads(path.read_text(encoding="utf-8"))


class MeasuredTable(SphinxDirective):
    """The directive."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {
        "ids": directives.unchanged_required,
        "columns": directives.unchanged_required,
        "strip": directives.unchanged_required,
        "without-source": directives.flag,
    }

    def run(self) -> list[nodes.Node]:
        """A table and the line that says where it is from."""
        patterns = [pattern.strip() for pattern in self.options["ids"].split(",")]
        columns = [column.strip().partition("=") for column in self.options["columns"].split(",")]
        try:
            record = _record(Path(self.env.srcdir), self.arguments[0])
            rows = [row for row in record["rows"] if any(fnmatch(row["id"], pattern) for pattern in patterns)]
            if not rows:
                raise LookupError(f"no id of {self.arguments[0]}.json matches {self.options['ids']}")
            for name, _, _ in columns:
                if not any(name in row for row in rows):
                    raise LookupError(f"no row of {self.arguments[0]}.json that matches has a column {name}")
        except LookupError as error:
            _log.warning("measured: %s", error, location=self.get_location())
            return []
        self.env.note_dependency(str(Path(self.env.srcdir) / "numbers" / f"{self.arguments[0]}.json"))
        strip = self.options.get("strip", "")
        cells = [[cell(row.get(name)).removeprefix(strip) for name, _, _ in columns] for row in rows]
        table = _table([title or name for name, _, title in columns], cells)
        if "without-source" in self.options:
            return [table]
        source = f", commit {record['commit']}, {record['date']}, {record['machine']}"
        below = nodes.paragraph("", "Printed by ", nodes.literal("", record["command"]), nodes.Text(source))
        return [table, below]


class MeasuredNumber(SphinxRole):
    """The role: record, id, column."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The value as text."""
        name, identity, column = self.text.split()
        try:
            found = [row[column] for row in _record(Path(self.env.srcdir), name)["rows"] if row["id"] == identity]
            if len(found) != 1:
                raise LookupError(f"{len(found)} rows of {name}.json have the id {identity}; wanted one")
        except LookupError as error:
            _log.warning("measured: %s", error, location=self.get_location())
            return [], []
        self.env.note_dependency(str(Path(self.env.srcdir) / "numbers" / f"{name}.json"))
        return [nodes.Text(cell(found[0]))], []


def _table(titles: list[str], cells: list[list[str]]) -> nodes.table:
    group = nodes.tgroup(cols=len(titles))
    group += [nodes.colspec(colwidth=1) for _ in titles]
    head, body = nodes.thead(), nodes.tbody()
    head += _row(titles)
    body += [_row(row) for row in cells]
    group += [head, body]
    table = nodes.table()
    table += group
    return table


def _row(texts: list[str]) -> nodes.row:
    row = nodes.row()
    row += [nodes.entry("", nodes.paragraph("", text)) for text in texts]
    return row


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers both."""
    app.add_directive("measured", MeasuredTable)
    app.add_role("measured", MeasuredNumber())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
