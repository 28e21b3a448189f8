"""Pictures of samples: bars, dots with their spread, histograms."""

import math
from pathlib import Path

COLOURS = ["#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#718096", "#b7791f"]


def text(x, y, content, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def line(x1, y1, x2, y2, colour="#000", width=1):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def write_svg(path, width, height, parts):
    Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def bars_svg(path, title, bars, is_ours):
    """Bars of (name, median, low, high), their spread as a line."""
    scale = 420 / max(high for *_, high in bars)
    parts = [text(212, 12, title)]
    for number, (name, median, low, high) in enumerate(bars):
        y = 30 * number + 20
        colour = COLOURS[0] if is_ours(name) else "#a0aec0"
        parts += [
            text(205, y + 14, name, "end"),
            f'<rect x="212" y="{y}" width="{median * scale:.1f}" height="20" fill="{colour}"/>',
            line(212 + low * scale, y + 10, 212 + high * scale, y + 10),
            text(220 + high * scale, y + 14, f"{median:.0f}"),
        ]
    write_svg(path, 720, 30 * len(bars) + 30, parts)


class LogScale:
    """Positions on a logarithmic axis of whole decades."""

    def __init__(self, values, left, width):
        self.low = math.floor(math.log10(min(values)))
        self.high = max(self.low + 1, math.ceil(math.log10(max(values))))
        self.left, self.width = left, width

    def at(self, value):
        return self.left + (math.log10(value) - self.low) / (self.high - self.low) * self.width

    def grid(self, top, bottom):
        for decade in range(self.low, self.high + 1):
            x = self.at(10.0**decade)
            yield line(x, top, x, bottom, "#e2e8f0")
            yield text(x, bottom + 14, f"{10.0**decade:g}", "middle")


def legend(series, left, width, y):
    for number, name in enumerate(series):
        x = left + width * number / len(series)
        yield f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{COLOURS[number % len(COLOURS)]}"/>{text(x + 8, y, name)}'


def dots_svg(path, title, rows):
    """Rows of (label, {series: (median, low, high)}): a dot a series with its spread, on one logarithmic axis."""
    series = list(dict.fromkeys(name for _, dots in rows for name in dots))
    left, top, step = 260, 44, 20
    scale = LogScale([value for _, dots in rows for dot in dots.values() for value in dot], left, 560)
    bottom = top + step * len(rows)
    parts = [text(left, 14, title), *legend(series, left, 560, 34), *scale.grid(top, bottom)]
    for number, (label, dots) in enumerate(rows):
        y = top + step * number + 12
        parts.append(text(left - 8, y + 4, label, "end"))
        for name, (median, low, high) in dots.items():
            colour = COLOURS[series.index(name) % len(COLOURS)]
            parts.append(line(scale.at(low), y, scale.at(high), y, colour, 2))
            parts.append(f'<circle cx="{scale.at(median):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    write_svg(path, left + 600, bottom + 24, parts)


def log_buckets(values, per_decade=10):
    """How many values lie in each bucket of a logarithmic scale: {upper bound: count}, empty ones between them too."""
    numbers = [math.ceil(math.log10(value) * per_decade) for value in values]
    counts = {number: 0 for number in range(min(numbers), max(numbers) + 1)}
    for number in numbers:
        counts[number] += 1
    return {10 ** (number / per_decade): count for number, count in counts.items()}


def histogram_svg(path, title, samples):
    """Which share of the samples of each series lies in each bucket, as outlines on a logarithmic axis."""
    left, top, width, height = 60, 44, 700, 300
    buckets = {name: log_buckets(values) for name, values in samples.items()}
    shares = {name: {bound: count / len(samples[name]) for bound, count in buckets[name].items()} for name in buckets}
    scale = LogScale([value for values in samples.values() for value in values], left, width)
    most = max(share for series in shares.values() for share in series.values())
    parts = [text(left, 14, title), *legend(samples, left, width, 34), *scale.grid(top, top + height)]
    for part in range(5):
        y = top + height * (1 - part / 4)
        parts += [line(left, y, left + width, y, "#e2e8f0"), text(left - 6, y + 4, f"{most * part / 4:.0%}", "end")]
    for number, series in enumerate(shares.values()):
        points, bounds = [], list(series)
        for bound, share in series.items():
            y = top + height * (1 - share / most)
            points += [(scale.at(bound / 10**0.1), y), (scale.at(bound), y)]
        foot = top + height
        points = [(points[0][0], foot), *points, (scale.at(bounds[-1]), foot)]
        outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{outline}" fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"/>')
    write_svg(path, left + width + 30, top + height + 24, parts)
