"""A test report as JUnit XML, for CI: a suite for each policy; a file that is wrong is an error."""

from itertools import groupby
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from kvpilot.policy.source import printable
from kvpilot.policy.testing import CaseResult, TestReport


def junit_xml(report: TestReport) -> bytes:
    """The whole document."""
    root = Element("testsuites", name="kvpilot test")
    if report.errors:
        suite = _suite(root, "kvpilot check", len(report.errors), errors=len(report.errors))
        for problem in report.errors:
            place = f"{printable(problem.path)}:{problem.line}:{problem.column}"
            case = SubElement(suite, "testcase", classname="kvpilot check", name=place)
            SubElement(case, "error", message=printable(problem.message)).text = str(problem)
    for policy, results in groupby(report.results, key=lambda result: result.policy):
        _add_policy(root, policy, list(results))
    indent(root)
    return bytes(tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _add_policy(root: Element, policy: str, results: list[CaseResult]) -> None:
    failures = sum(not result.passed for result in results)
    suite = _suite(root, policy, len(results), failures=failures)
    suite.set("time", f"{sum(result.took_s for result in results):.6f}")
    for result in results:
        path, _, line = result.place.rpartition(":")
        case = SubElement(suite, "testcase", classname=policy, name=printable(result.case))
        case.set("file", printable(path))
        case.set("line", line)
        case.set("time", f"{result.took_s:.6f}")
        if not result.passed:
            message = f"{len(result.diff)} lines of difference, the first: {result.diff[0]}"
            failure = SubElement(case, "failure", message=printable(message))
            failure.text = "\n".join(printable(line) for line in result.diff)
        if result.timeline:
            SubElement(case, "system-out").text = "\n".join(printable(line) for line in result.timeline)


def _suite(root: Element, name: str, tests: int, errors: int = 0, failures: int = 0) -> Element:
    counts = {"tests": tests, "errors": errors, "failures": failures, "skipped": 0}
    return SubElement(root, "testsuite", {"name": name, **{key: str(n) for key, n in counts.items()}})
