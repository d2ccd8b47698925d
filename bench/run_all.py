"""Run every bench and write docs/benchmarks.md: `make bench`. About a quarter of an hour."""

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = ("frame.py", "run_all.py", "virtual_engine.py")


def main() -> None:
    reports = []
    for path in sorted(HERE.glob("*.py")):
        if path.name in SHARED:
            continue
        command = [sys.executable, str(path), "--json", *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode != 0:
            print(done.stderr, file=sys.stderr)
            sys.exit(f"{path.name}: exit {done.returncode}")
        report = json.loads(done.stdout)
        print(
            f"{path.name}: {sum(bar['holds'] for bar in report['bars'])} of {len(report['bars'])} bars hold"
        )
        reports.append(report)
    write(reports)


def write(reports: list[dict[str, Any]]) -> None:
    """docs/benchmarks.md from the benches' own JSON."""
    when = datetime.date.today().isoformat()
    how = f"Each by the command beside it (`make bench` runs them all), {when}. No GPU."
    lines = ["# Benchmarks", "", how, ""]
    for report in reports:
        lines += section(report)
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs/benchmarks.md").write_text("\n".join(lines))


def section(report: dict[str, Any]) -> list[str]:
    lines = [f"## {report['bench']}", "", f"`python bench/{report['bench']}.py`", ""]
    lines += [f"{report['machine']['cpu']}, {report['machine']['cores']} cores.", ""]
    lines += [f"`{json.dumps(report['settings'])}`", ""]
    lines += ["| bar | value | promise | range | holds |", "|---|---|---|---|---|"]
    for bar in report["bars"]:
        promise = f"≥ {bar['at_least']:g}" if "at_least" in bar else f"≤ {bar['at_most']:g}"
        spread = "{:.3g} – {:.3g}".format(*bar["spread"]) if "spread" in bar else ""
        holds = "yes" if bar["holds"] else "**no**"
        lines.append(f"| {bar['name']} | {bar['value']:.4g} | {promise} | {spread} | {holds} |")
    lines += ["", "| measured | |", "|---|---|"]
    lines += [f"| {name} | {_shown(value)} |" for name, value in report["results"].items()]
    return [*lines, ""]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " – ".join(_shown(item) for item in value)
    return str(value)


if __name__ == "__main__":
    main()
