"""The house's import arrows, read from the code itself, and the foundation in an empty environment."""

import ast
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = {
    "kvpilot": ROOT / "sidecar/kvpilot",
    "kvengine": ROOT / "engine/kvengine",
    "kvkernels": ROOT / "kernels/kvkernels",
}
FOUNDATION = ("clock", "signals", "knobs", "link", "inside")
MAY_IMPORT_ENGINE_LAZILY = ("kvpilot.demo", "kvpilot.simulate", "kvpilot.plan")


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join([package, *path.relative_to(tree).with_suffix("").parts]).removesuffix(".__init__"), path)
        for package, tree in TREES.items()
        for path in sorted(tree.rglob("*.py"))
    ]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = _outside_functions(tree) if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _outside_functions(node: ast.AST):
    """Nodes that run on import: everything but function bodies and `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _outside_functions(child)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_arrows(module: str, path: Path) -> None:
    """Foundation: standard library and what precedes it. Kernels: nothing of ours. Engine: both."""
    for target in imports(path):
        top = target.split(".")[0]
        if module.startswith("kvkernels"):
            assert top not in ("kvpilot", "kvengine"), f"{module} imports {target}"
        elif module.startswith("kvengine"):
            assert top != "kvpilot" or target == "kvpilot" or room(target) in FOUNDATION, (
                f"{module} imports {target}"
            )
        elif room(module) in FOUNDATION:
            _check_foundation(module, target, top)
        elif top in ("kvengine", "kvkernels"):
            assert module.startswith(MAY_IMPORT_ENGINE_LAZILY), f"{module} imports {target}"
            assert target not in imports(path, top_level_only=True), f"{module} imports {target} eagerly"


def _check_foundation(module: str, target: str, top: str) -> None:
    if top == "kvpilot":
        if room(target):
            allowed = FOUNDATION[: FOUNDATION.index(room(module)) + 1]
            assert room(target) in allowed, f"{module} imports {target}"
        return
    lazily_vllm = module.startswith("kvpilot.inside.vllm") and top == "vllm"
    assert top in sys.stdlib_module_names or lazily_vllm, f"{module} imports {target}"


def test_package_root_imports_nothing() -> None:
    assert imports(TREES["kvpilot"] / "__init__.py") == set()


def test_only_the_clock_asks_for_the_time() -> None:
    """Time is injected: no module but the clock reads a clock of the machine."""
    clocks = ("time", "monotonic", "perf_counter")
    asking = {*clocks, *(f"{name}_ns" for name in clocks), "sleep", "now", "utcnow"}
    offenders = []
    for module, path in modules():
        if module == "kvpilot.clock":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in asking
                and isinstance(node.value, ast.Name)
                and node.value.id in ("time", "datetime")
            ):
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value.id}.{node.attr}")
    assert offenders == []


def test_foundation_imports_in_an_empty_environment(tmp_path: Path) -> None:
    """What runs inside an engine drags nothing into that environment: a bare venv is enough."""
    venv.create(tmp_path / "bare", with_pip=False)
    foundation = [m for m, _ in modules() if m.startswith("kvpilot") and room(m) in ("", *FOUNDATION)]
    script = "\n".join(f"import {m}" for m in foundation if not m.startswith("kvpilot.inside.vllm"))
    done = subprocess.run(
        [tmp_path / "bare/bin/python", "-c", script],
        env={"PYTHONPATH": str(ROOT / "sidecar")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_pool_and_scheduler_import_without_torch() -> None:
    """The engine's bookkeeping can be tested, and simulated, without the model's libraries."""
    names = (
        "kv.pool",
        "kv.table",
        "kv.plan.alternatives",
        "kv.plan.devices",
        "sched.scheduler",
        "sched.batch",
        "core",
        "loop",
        "telemetry",
        "manifest",
        "executor.virtual",
    )
    script = "import sys; sys.modules['torch'] = None\n" + "\n".join(f"import kvengine.{n}" for n in names)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["kvpilot", "kvengine"])
def test_commands_without_their_extras_say_so_in_one_line(command: str, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    path = f"{ROOT / 'sidecar'}:{ROOT / 'engine'}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [tmp_path / "bare/bin/python", "-c", f"from {command}.cli import main; main()", "--help"],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    extra = {"kvpilot": "sidecar", "kvengine": "engine"}[command]
    assert done.returncode != 0
    assert f"kvpilot[{extra}]" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
