"""The page of the demo: losses over time as one picture, and what was compared, in a file without a network."""

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM = 860, 380, 60, 40
COLORS = ("#57606a", "#1f6feb")
STYLE = """body { font: 15px/1.5 system-ui, sans-serif;
max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } th { color: #5c6670; font-weight: 500 }
svg { width: 100%; height: auto } iframe { width: 100%;
height: 60rem; border: 1px solid #d7dce1; border-radius: 6px }"""

Curve = Sequence[tuple[float, float]]
"""Seconds and losses."""


def picture(curves: Mapping[str, Curve], what: str) -> str:
    """An SVG with a line for each; losses above most of the others are cut."""
    points = [point for curve in curves.values() for point in curve]
    longest = max(seconds for seconds, _ in points) or 1.0
    low = min(loss for _, loss in points)
    high = max(sorted(loss for _, loss in points)[-1 - len(curves)], low + 1e-3)
    low, high = low - 0.05 * (high - low), high

    def at(seconds: float, loss: float) -> str:
        x = LEFT + seconds / longest * (WIDTH - LEFT - 20)
        y = 20 + (high - min(loss, high)) / (high - low) * (HEIGHT - BOTTOM - 20)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for step in range(6):
        loss = low + (high - low) * step / 5
        x, y = at(0, loss).split(",")
        parts.append(f'<line x1="{x}" x2="{WIDTH - 20}" y1="{y}" y2="{y}" stroke="#d7dce1"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end" dominant-baseline="middle">{loss:.2f}</text>')
        x = at(longest * step / 5, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 16}" text-anchor="middle">{longest * step / 5:.0f} s</text>')
    for number, (color, (name, curve)) in enumerate(zip(COLORS, curves.items(), strict=False)):
        line = " ".join(at(*point) for point in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        parts.append(
            f'<text x="{WIDTH - 30}" y="{34 + 18 * number}" text-anchor="end" fill="{color}">'
            f"{escape(name)}: {curve[-1][1]:.3f}</text>"
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(what)}" font-size="13" '
        f'font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )


def page(
    title: str,
    text: str,
    curves: Mapping[str, Curve],
    rows: Sequence[Mapping[str, str]],
    frame: str | None,
) -> str:
    """HTML; ``frame`` is the file of another page to show below."""
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row.values())}</tr>" for row in rows)
    below = "" if frame is None else f'<h2>Our run in gemini-stat</h2><iframe src="{escape(frame)}"></iframe>'
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1><p>{escape(text)}</p>"
        f"<h2>Loss over time</h2>{picture(curves, title)}<table><tr>{head}</tr>{body}</table>{below}</body></html>\n"
    )
