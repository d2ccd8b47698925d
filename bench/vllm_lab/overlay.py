"""A virtual environment that sees all of vLLM's, and into which things may be installed: a throw-away copy of
a stock environment, without its gigabytes.
"""

import os
import subprocess
from pathlib import Path

from vllm_lab import environment
from vllm_lab.environment import LabError


class Overlay:
    """Made in `folder`; `environ()` puts its `python`, `pip` and `vllm` first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stock = environment.python()
        self._run([str(stock), "-m", "venv", str(folder)])
        paths = self._run([str(stock), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        own = next((folder / "lib").glob("python*/site-packages"))
        # `addsitedir`, not the bare path: the stock environment's own .pth files count too.
        (own / "stock.pth").write_text(f"import site; site.addsitedir({paths.strip()!r})\n")
        script = folder / "bin/vllm"
        script.write_text(f'#!/bin/sh\nexec {folder}/bin/python -m vllm.entrypoints.cli.main "$@"\n')
        script.chmod(0o755)

    def environ(self) -> dict[str, str]:
        """For a shell whose first environment this is."""
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        first = f"{self.folder}/bin:{os.environ['PATH']}"
        return {**inherited, "PATH": first, "VIRTUAL_ENV": str(self.folder)}

    def freeze(self) -> list[str]:
        """What pip says is installed, the stock packages too."""
        return self._run([f"{self.folder}/bin/python", "-m", "pip", "freeze"]).splitlines()

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LabError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
        return done.stdout
