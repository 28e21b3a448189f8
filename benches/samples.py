"""Samples of a bench: medians with their spread, ratios, tables and CSV."""

import csv
import statistics


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))]


class Table:
    """Samples by row: what was measured (a name, or a tuple of names), in which unit."""

    def __init__(self):
        self.samples = {}

    def add(self, row, unit, value):
        self.samples.setdefault((row, unit), []).append(value)

    def median(self, row, unit):
        values = self.samples.get((row, unit))
        return statistics.median(values) if values else None

    def spread(self, row, unit):
        """Median, smallest, largest."""
        values = self.samples.get((row, unit))
        return (statistics.median(values), min(values), max(values)) if values else None

    def show(self, row, unit, digits=1):
        spread = self.spread(row, unit)
        if not spread:
            return "-"
        median, low, high = (f"{value:.{digits}f}" for value in spread)
        return f"{median} ({low}-{high})"

    def rows(self):
        for (row, unit), values in self.samples.items():
            yield row, unit, statistics.median(values), min(values), max(values), len(values)


def ratio(value, base, digits=1):
    return f"{value / base:.{digits}f}x" if value is not None and base else "-"


def print_table(headings, rows):
    """The first column to the left, the others to the right."""
    rows = [headings, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print("  ".join(cells).rstrip())


def write_csv(table, path, names=("what",)):
    """One line a row; `names` are the headings of a row's parts."""
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*names, "unit", "median", "smallest", "largest", "runs"])
        for row, unit, median, low, high, runs in table.rows():
            parts = [row] if isinstance(row, str) else row
            out.writerow([*parts, unit, f"{median:.4f}", f"{low:.4f}", f"{high:.4f}", runs])
