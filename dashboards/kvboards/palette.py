"""What each colour means, on every dashboard.

The hues are Okabe and Ito's eight (jfly.uni-koeln.de/color), which people with the common colour-vision
deficiencies tell apart; their black is left out, because Grafana's dark theme is nearly that. A colour
stands for a meaning and never for a position, so that a glance carries from one panel to the next. Nothing
in a panel is told by colour alone: lines differ in dash or width, states carry their name, stacks keep an
order.

Names that nobody knows beforehand (classes, tenants, replicas) get no colour: they are small multiples,
bars or rows of a table, where the label tells them apart.
"""

GOOD = "#009E73"
"""Bluish green: what was promised and kept."""
MEASURED = "#56B4E9"
"""Sky blue: what is so now. Most lines."""
HELD = "#0072B2"
"""Blue: memory that is held and cannot be given back at once; p95 of a band."""
CAUTION = "#E69F00"
"""Orange: wasted, waiting, pending, the slow tail (p99)."""
BAD = "#D55E00"
"""Vermillion: shed, failed, out of memory, critical."""
EXPECTED = "#F0E442"
"""Yellow: forecast or expected, not measured."""
SHADOW = "#CC79A7"
"""Reddish purple: decided and deliberately not done."""
REFERENCE = "#9A9A9A"
"""Grey: baselines, limits, targets, and what is free or at rest."""

OTHERS = "#D9D9D9"
"""Light grey: what is somebody else's."""
REST = "#3A3A3A"
"""Near black: a state in which nothing happens."""

MEANINGS = {
    "kept promises": GOOD,
    "measured": MEASURED,
    "held; p95": HELD,
    "waste, waiting, p99": CAUTION,
    "shed, failed, critical": BAD,
    "forecast, expected": EXPECTED,
    "shadow": SHADOW,
    "baseline, target, free": REFERENCE,
    "somebody else's": OTHERS,
}
