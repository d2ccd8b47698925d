"""The policy directory: content decides whether it is looked at again, and a bad set is tried once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pilot_world import policy

from kvpilot.clock import VirtualClock
from kvpilot.policy import files
from kvpilot.policy.load import PolicyErrors, load_policies
from kvpilot.policy_directory import PolicyDirectory, shipped


@pytest.fixture
def directory(tmp_path: Path) -> PolicyDirectory:
    (tmp_path / "guard.yaml").write_text(policy())
    return PolicyDirectory(tmp_path, ["batch", "interactive"], VirtualClock())


def test_it_is_loaded_again_when_content_changes_and_only_then(directory: PolicyDirectory) -> None:
    assert [each.name for each in directory.load().policies] == ["guard"]
    (directory.path / "guard.yaml").touch()
    (directory.path / "notes.txt").write_text("not a policy")
    assert directory.load_if_changed() is None
    (directory.path / "other.yaml").write_text(policy("other"))
    changed = directory.load_if_changed()
    assert changed is not None
    assert [each.name for each in changed.policies] == ["guard", "other"]


def test_a_swap_by_symbolic_link_is_a_change(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.yaml").write_text(policy(name))
    (tmp_path / "mount").mkdir()
    (tmp_path / "mount" / "..data").symlink_to(tmp_path / "one")
    (tmp_path / "mount" / "p.yaml").symlink_to(Path("..data") / "p.yaml")
    directory = PolicyDirectory(tmp_path / "mount", [], VirtualClock())
    assert directory.load().policies[0].name == "one"
    (tmp_path / "mount" / "..new").symlink_to(tmp_path / "two")
    (tmp_path / "mount" / "..new").rename(tmp_path / "mount" / "..data")
    changed = directory.load_if_changed()
    assert changed is not None
    assert changed.policies[0].name == "two"


def meanwhile(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Let something happen once, after the first file of the next look was read."""
    read, left = files._read, [happens]

    def reading(*arguments: Any) -> bytes | None:
        raw = read(*arguments)
        if left:
            left.pop()()
        return raw

    monkeypatch.setattr(files, "_read", reading)


def named(version: str) -> dict[str, str]:
    return {f"{name}.yaml": policy(f"{name}-{version}") for name in ("a", "b", "c")}


@pytest.mark.parametrize("mounted", [True, False], ids=["a ConfigMap", "a plain directory"])
def test_a_swap_while_it_is_read_gives_the_one_version_or_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool
) -> None:
    def write(version: str) -> None:
        place = tmp_path / f"..{version}" if mounted else tmp_path
        place.mkdir(exist_ok=True)
        for name, text in named(version).items():
            (place / name).write_text(text)
        if mounted:
            (tmp_path / "..new").symlink_to(place.name)
            (tmp_path / "..new").rename(tmp_path / "..data")

    def swap() -> None:
        write("two")
        if mounted:
            shutil.rmtree(tmp_path / "..one")

    write("one")
    directory = PolicyDirectory(tmp_path, [], VirtualClock())
    assert [each.name for each in directory.load().policies] == ["a-one", "b-one", "c-one"]
    write("one")
    (tmp_path / ("..one" if mounted else ".") / "c.yaml").write_text(policy("c-changed"))
    meanwhile(monkeypatch, swap)
    taken = directory.load_if_changed()
    assert taken is not None
    assert [each.name for each in taken.policies] == ["a-two", "b-two", "c-two"]


def test_a_bad_set_is_reported_once_and_good_again_when_it_is_mended(directory: PolicyDirectory) -> None:
    directory.load()
    (directory.path / "guard.yaml").write_text(policy(when="y > 1.0"))
    with pytest.raises(PolicyErrors):
        directory.load_if_changed()
    assert not directory.good
    assert directory.load_if_changed() is None
    (directory.path / "guard.yaml").write_text(policy(when="x > 2.0"))
    assert directory.load_if_changed() is not None
    assert directory.good


def test_the_shipped_policies_load_for_any_classes() -> None:
    for classes in (["default"], ["batch", "interactive"]):
        assert len(PolicyDirectory(shipped(), classes, VirtualClock()).load().policies) >= 4


def test_a_directory_that_cannot_be_listed_is_one_line_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PolicyErrors, match=r":1:1: cannot be read: Permission denied$"):
        load_policies([tmp_path])
