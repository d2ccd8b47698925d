"""docs/metrics.md, from the table of families: `make docs` writes it, a test holds it current."""

from kvpilot.publish.families import FAMILIES, Family
from kvpilot.publish.picker import PICKER_NAMES

_INTRO = """\
# Metrics

What `GET /metrics` of a pilot shows, in the Prometheus text format and, where the scraper accepts it, in
OpenMetrics. Generated from the catalogue by `make docs`.

- Every series has the labels `engine` and `rank`; those listed here come beside them. A pilot flies one rank.
  The pilot that flies the valves also shows the signals of ranks of the same engine that have no pilot.
- **Missing is never zero.** A signal without a value has no sample; `kvpilot_signal_available` is 0 for it,
  and `kvpilot_signal_missing` says why. Infinity (`+Inf`) is a value: a time to exhaustion not in sight.
- A gauge is as of the last tick but read twice a second; ratios are means over the last 10 s, for which the
  counters they are made of are exported too.
- Histograms are cumulative since the engine started, with buckets from 1 ms on: 1, 2, 3, 5, 7.5, 10 ms and
  so on. A bucket's edge is true within 3 %. In OpenMetrics a bucket into which observations fell while the
  pilot decided something carries an exemplar: the decision's number, and its trace where OTLP is on.
- `tenant` is one of the tenants that hold or ask most, at most {tenants} of them; the rest is `(other)`.
  Names that the operator did not write down are salted hashes.
- A page is rendered at most twice a second for each format, by prometheus-client, and only while somebody
  scrapes: more scrapers cost nothing more. It is handed out for half a second, and for up to a quarter more
  while the next one is made.

For dashboards: `kvpilot_engine_info` maps an engine and rank to its model. `kvpilot_slo_seconds` has the
promises to draw beside a latency.
"""

_PICKER = """\
## For an endpoint picker

`GET /metrics/picker` shows what the model-server protocol of the Kubernetes Gateway API inference extension
asks for, under the names that endpoint pickers read by default and with the label `model_name`, so that a
picker can read a pilot in front of any engine: give it this port and path (`model-server-metrics-port` and
`model-server-metrics-path`). These names are vLLM's; they are not on `/metrics`, where they would be counted
twice beside a vLLM's own. What is missing is left out here too.

| of the protocol | name | kind | meaning |
|---|---|---|---|
"""


def metrics_page() -> str:
    """docs/metrics.md."""
    from kvpilot.publish.tenant_names import MOST_TENANTS

    lines = [_INTRO.replace("{tenants}", str(MOST_TENANTS))]
    rooms: dict[str, list[Family]] = {}
    for family in FAMILIES.values():
        rooms.setdefault(family.room, []).append(family)
    for room, families in rooms.items():
        lines += [f"## {room}", "", "| metric | kind | labels | meaning |", "|---|---|---|---|"]
        lines += [_row(family) for family in families]
        lines.append("")
    rows = [f"| {asked} | `{name}` | gauge | {meaning} |" for asked, (name, meaning) in PICKER_NAMES.items()]
    return "\n".join([*lines, _PICKER + "\n".join(rows), ""])


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels[2:])
    return f"| `{family.shown_name}` | {family.kind} | {labels} | {family.meaning} |"


if __name__ == "__main__":
    print(metrics_page(), end="")
