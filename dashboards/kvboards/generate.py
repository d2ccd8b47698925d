"""Write `dashboards/grafana/*.json`, or with `--check` say which of them are not what the sources make."""

import sys
from pathlib import Path

from kvboards import autopilot, engine, fleet, gpu, tenants
from kvboards.board import Board, to_json

FOLDER = Path(__file__).resolve().parents[1] / "grafana"
BOARDS: tuple[Board, ...] = (fleet.BOARD, engine.BOARD, autopilot.BOARD, gpu.BOARD, tenants.BOARD)


def stale() -> list[str]:
    """Names of files that are missing, or differ from what the sources make, or belong to no dashboard."""
    made = {f"{board.name}.json": to_json(board) for board in BOARDS}
    found = {file.name: file.read_text() for file in FOLDER.glob("*.json")}
    return sorted(name for name in made.keys() | found.keys() if made.get(name) != found.get(name))


def main() -> None:
    """Exits with 1 and one line a file where `--check` finds something."""
    if "--check" in sys.argv[1:]:
        names = stale()
        for name in names:
            print(f"dashboards/grafana/{name}: not what dashboards/kvboards makes: run `make dashboards`")
        raise SystemExit(bool(names))
    FOLDER.mkdir(exist_ok=True)
    for board in BOARDS:
        (FOLDER / f"{board.name}.json").write_text(to_json(board))


if __name__ == "__main__":
    main()
