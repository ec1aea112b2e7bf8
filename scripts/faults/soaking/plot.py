"""A soak as a picture: what is resident, and what our ledger knows of."""

from collections.abc import Sequence
from pathlib import Path

from .readings import Reading

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 800, 320, 60, 40, 30
_LINES = (
    ("resident (RssAnon + RssShmem)", "#1f6feb", lambda reading: reading.resident_bytes),
    ("resident beside the ledger", "#d1242f", lambda reading: reading.beside_bytes),
    ("ledger", "#2da44e", lambda reading: reading.ledger_bytes),
)


def draw(file: Path, readings: Sequence[Reading], title: str) -> None:
    """Write an SVG."""
    most = max(reading.resident_bytes for reading in readings) * 1.1
    last = max(reading.step for reading in readings)
    across, high = _WIDTH - _LEFT - 20, _HEIGHT - _BOTTOM - _TOP

    def place(step: int, nbytes: float) -> tuple[float, float]:
        return _LEFT + across * step / last, _TOP + high * (1 - nbytes / most)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="18">{title}</text>',
    ]
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(0, most * fraction)
        parts.append(f'<line x1="{x:.0f}" y1="{y:.1f}" x2="{x + across:.0f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x - 6:.0f}" y="{y + 4:.1f}" text-anchor="end">{most * fraction / 2**20:.0f}</text>')
        x, y = place(int(last * fraction), 0)
        parts.append(f'<text x="{x:.0f}" y="{y + 16:.1f}" text-anchor="middle">{int(last * fraction)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">MiB over steps</text>')
    for number, (name, colour, of) in enumerate(_LINES):
        points = " ".join("{:.1f},{:.1f}".format(*place(reading.step, of(reading))) for reading in readings)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        x = _LEFT + 130 + 210 * number
        parts.append(f'<line x1="{x}" y1="{_HEIGHT - 10}" x2="{x + 18}" y2="{_HEIGHT - 10}" stroke="{colour}"/>')
        parts.append(f'<text x="{x + 24}" y="{_HEIGHT - 6}">{name}</text>')
    file.write_text("\n".join([*parts, "</svg>"]) + "\n")
