"""Which files a path means, and that reading them ends, whatever is there."""

import os
from pathlib import Path

import pytest

from kvpilot.policy.checking import check
from kvpilot.policy.files import gather
from kvpilot.policy.source import MAX_BYTES


def names(*paths: Path) -> list[str]:
    return [text.policy.path.name for text in gather(paths).files]


def problems(path: Path) -> list[str]:
    return [
        f"{each.path.removeprefix(str(path))}:{each.line}:{each.column}: {each.message}"
        for each in gather([path]).problems
    ]


def test_a_directory_is_its_yaml_files_and_not_what_lies_beside(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yml", "a.test.yml", ".hidden.yaml", "off", "notes.txt", "policy.schema.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "directory.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    gathered = gather([tmp_path, tmp_path / "b.yaml"])
    assert [text.policy.path.name for text in gathered.files] == ["a.yml", "b.yaml"], "each once"
    assert gathered.files[0].tests is not None
    assert gathered.files[0].tests.raw == b"a.test.yml"
    assert gathered.problems == ()


def test_a_file_of_tests_means_its_policy_and_without_it_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a")
    (tmp_path / "a.test.yaml").write_text("tests")
    (tmp_path / "b.test.yaml").write_text("tests")
    assert names(tmp_path / "a.test.yaml") == ["a.yaml"]
    assert problems(tmp_path) == ["/b.test.yaml:1:1: tests of b.yaml, which is not there"]


def test_a_config_map_is_read_through_its_link_and_called_by_its_names(tmp_path: Path) -> None:
    """Kubernetes swaps `..data` first and mends the names beside it after: they may not be there yet."""
    version = tmp_path / "..2026_11_21"
    version.mkdir()
    (version / "a.yaml").write_text("a")
    (version / "b.yaml").write_text("b")
    (tmp_path / "..data").symlink_to(version.name)
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    (tmp_path / "gone.yaml").symlink_to("..data/gone.yaml")
    found = gather([tmp_path])
    assert [text.policy.path for text in found.files] == [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    assert [text.policy.raw for text in found.files] == [b"a", b"b"]


@pytest.mark.timeout(10)
def test_reading_ends_whatever_is_there(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    big = tmp_path / "big.yaml"
    with big.open("wb") as file:
        file.truncate(10 << 30)
    assert problems(pipe) == [":1:1: not a regular file"]
    assert problems(Path("/dev/zero")) == [":1:1: not a regular file"]
    assert problems(Path("/proc/self/mem")) == [":1:1: cannot be read: Input/output error"]
    assert problems(big) == [f":1:1: file of {10 << 30} bytes: at most {MAX_BYTES}"]
    assert problems(tmp_path / "no\0such") == [":1:1: cannot be read: embedded null byte"]
    assert problems(tmp_path / "none.yaml") == [":1:1: no such file"]
    assert problems(tmp_path / ("x" * 5000)) == [":1:1: cannot be read: File name too long"]


def test_tests_without_their_policy_are_named_as_they_were_given(tmp_path: Path) -> None:
    (tmp_path / "a.test.yaml").write_text("tests: []")
    assert problems(tmp_path / "a.test.yaml") == [":1:1: tests of a.yaml, which is not there"]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    secret = tmp_path / "a.yaml"
    secret.write_text("a")
    secret.chmod(0)
    assert check([tmp_path]).problems == (f"{secret}:1:1: cannot be read: Permission denied",)
