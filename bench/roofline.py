"""The roofline plant against measured operations: Llama-2-7B's matrices on an H100, tp 1 to 8.

The profile is Vidur's (github.com/microsoft/vidur, data/profiling/compute/h100/meta-llama/Llama-2-7b-hf,
mlp.csv, MIT): per-operation times in ms over 1 to 4,096 tokens. It is no part of this project: give it with
--profile, or have the shared traces beside the source tree. Errors are |predicted / measured - 1|. Attention,
all-reduces and the host's time are not in the profile, so nothing here speaks for them.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from frame import Bar, run

from kvpilot.simulate.plants.roofline import Pass

PROFILE = Path(__file__).parents[2] / "shared/traces/calibration/vidur_mlp_h100_llama2_7b.csv"
MATRICES = {
    "qkv": "attn_pre_proj",
    "out": "attn_post_proj",
    "up": "mlp_up_proj",
    "down": "mlp_down_proj",
}


class Compared(NamedTuple):
    """One operation, or all four together ("layer"), at one size. Seconds."""

    operation: str
    tokens: int
    tp: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        return abs(self.predicted_s / self.measured_s - 1)


def compared(profile: Path) -> Iterator[Compared]:
    from kvengine.kv.plan.devices import device_named
    from kvengine.kv.plan.precision import kv_precision
    from kvpilot.simulate.plants.named import model_named

    device, shape = device_named("h100"), model_named("llama-2-7b")
    passes = {tp: Pass(device, shape, tp, kv_precision("fp16"), "fp16") for tp in (1, 2, 4, 8)}
    with profile.open(newline="") as file:
        for row in csv.DictReader(file):
            tokens, tp = int(row["num_tokens"]), int(row["num_tensor_parallel_workers"])
            measured = {name: float(row[f"time_stats.{op}.median"]) / 1e3 for name, op in MATRICES.items()}
            predicted = {name: passes[tp].matrices[name].seconds(tokens) for name in MATRICES}
            for name in MATRICES:
                yield Compared(name, tokens, tp, measured[name], predicted[name])
            yield Compared("layer", tokens, tp, sum(measured.values()), sum(predicted.values()))


def residuals(rows: list[Compared]) -> dict[str, float]:
    """Median and p90 of the error."""
    errors = sorted(row.error for row in rows)
    return {"median": errors[len(errors) // 2], "p90": errors[int(0.9 * (len(errors) - 1))]}


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    settings = {"device": "h100", "model": "llama-2-7b", "profile": arguments.profile.name}
    if not arguments.profile.exists():
        return settings, {"profile": "absent: give --profile"}, []
    rows = list(compared(arguments.profile))
    results: dict[str, Any] = {"points": len(rows)}
    for name in (*MATRICES, "layer"):
        results[name] = residuals([row for row in rows if row.operation == name])
    for tp in (1, 2, 4, 8):
        results[f"layer_tp{tp}"] = residuals([r for r in rows if r.operation == "layer" and r.tp == tp])
    single = residuals([row for row in rows if row.operation != "layer"])
    bars = [
        Bar("matrix_error_median", single["median"], at_most=0.10),
        Bar("matrix_error_p90", single["p90"], at_most=0.25),
        Bar("layer_error_median", results["layer"]["median"], at_most=0.10),
        Bar("layer_error_p90", results["layer"]["p90"], at_most=0.20),
    ]
    return settings, results, bars


if __name__ == "__main__":
    run(
        "roofline",
        1,
        measure,
        (__doc__ or "").partition("\n")[0],
        lambda parser: parser.add_argument("--profile", type=Path, default=PROFILE),
    )
