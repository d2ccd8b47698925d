"""Run every bench and write docs/benchmarks.md: `make bench`."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


def main() -> None:
    rows = ["# Benchmarks", "", f"`make bench`, {datetime.date.today().isoformat()}.", ""]
    for path in sorted(HERE.glob("*.py")):
        if path.name in ("frame.py", "run_all.py"):
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
        rows += [
            f"## {report['bench']}",
            "",
            f"`python bench/{path.name} {' '.join(sys.argv[1:])}`".rstrip("` ") + "`",
            "",
        ]
        rows += [
            f"{report['machine']['cpu']}, {report['machine']['cores']} cores.",
            "",
            f"`{json.dumps(report['settings'])}`",
            "",
        ]
        rows += ["| bar | value | promise | range | holds |", "|---|---|---|---|---|"]
        for bar in report["bars"]:
            promise = f"≥ {bar['at_least']:g}" if "at_least" in bar else f"≤ {bar['at_most']:g}"
            spread = "{:.3g} – {:.3g}".format(*bar["spread"]) if "spread" in bar else ""
            holds = "yes" if bar["holds"] else "**no**"
            rows.append(f"| {bar['name']} | {bar['value']:.4g} | {promise} | {spread} | {holds} |")
        rows.append("")
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs/benchmarks.md").write_text("\n".join(rows))


if __name__ == "__main__":
    main()
