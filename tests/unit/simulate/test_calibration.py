"""Calibration: what a fit recovers, what it says about itself, and what it refuses."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from math import exp
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from link_pages import IDENTITY, KNOBS, NONCE
from typer.testing import CliRunner

from kvpilot.commands import app
from kvpilot.incident.recording import recording
from kvpilot.inside.hook import with_hook_fields
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.manifest import Manifest
from kvpilot.link.telemetry import TelemetryWriter, plan_page
from kvpilot.simulate.plants.calibration import BLOCK_STEPS, FOLDS, calibrated, recorded, steps_of
from kvpilot.simulate.plants.fitted import Fitted, PlantError, read
from kvpilot.simulate.plants.least_squares import fit, predict
from kvpilot.simulate.plants.plant import NEEDED, Features

FIELDS = ("time_ns", *NEEDED, *(f"{name}_total" for name in Features._fields if name != "prefill_tokens"))
GAP_NS = 200_000


def truth_s(step: Features) -> float:
    """A law with a knee, as on a GPU: flat below 200 tokens, 20 us a token beyond."""
    tokens = step.prefill_tokens + step.decode_sequences + step.drafted_tokens
    seconds = 4e-3 + 20e-6 * max(0.0, tokens - 200) + 10e-6 * step.decode_sequences
    return seconds + 40e-9 * step.context_tokens + 1e-9 * step.chunk_positions


def batches(seed: int, count: int) -> list[Features]:
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        decodes = dice.randrange(0, 64)
        prefill = dice.choice([0, 0, 0, 256, 512, 1024]) if decodes else 512
        position = prefill + dice.randrange(0, 4096)
        drafts = dice.choice([0, 0, 2, 4])
        made.append(
            Features(
                prefill, decodes, decodes * dice.randrange(50, 4000), prefill * position, decodes * drafts
            )
        )
    return made


def page(
    steps: list[Features],
    seconds: Callable[[Features], float],
    fields: tuple[str, ...] = FIELDS,
) -> bytearray:
    """What an engine leaves behind that computed these steps, `GAP_NS` apart."""
    told = tuple(STEP_FIELDS[name] for name in dict.fromkeys(fields))
    manifest = with_hook_fields(Manifest("test", "1", "tiny", 16, 100, 1024, 2048, "cpu", KNOBS, told))
    buffer = bytearray(plan_page(manifest, 16_384).page_bytes)
    writer = TelemetryWriter(buffer, manifest, nonce=NONCE, identity=IDENTITY, record_count=16_384)
    values = dict.fromkeys((field.name for field in manifest.fields), 0)
    values["time_ns"] = IDENTITY.start_monotonic_ns
    for step in steps:
        values["duration_ns"] = round(seconds(step) * 1e9)
        values["time_ns"] += values["duration_ns"] + GAP_NS
        values["steps_total"] += 1
        for name, value in step._asdict().items():
            values[f"{name}_total"] = values.get(f"{name}_total", 0) + int(value)
        writer.write_step([values[field.name] for field in manifest.fields])
    return buffer


def noisy(sigma: float, seed: int = 1) -> Callable[[Features], float]:
    dice = random.Random(seed)
    return lambda step: truth_s(step) * exp(dice.gauss(0, sigma))


def law_of(seconds: Callable[[Features], float], count: int = 3000):
    steps = batches(1, count)
    return calibrated(steps_of(recording(bytes(page(steps, seconds)), Path("p"), alive=False, copied=True)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=4, max_size=4), st.integers(0, 99))
def test_non_negative_coefficients_are_recovered(coefficients: list[float], seed: int) -> None:
    dice = random.Random(seed)
    columns = [[dice.random() for _ in range(80)] for _ in coefficients]
    assert fit(columns, predict(columns, coefficients)) == pytest.approx(coefficients, abs=1e-3)


def test_outliers_and_negative_slopes_have_no_say() -> None:
    dice = random.Random(2)
    columns = [[1.0] * 300, [dice.random() for _ in range(300)], [dice.random() for _ in range(300)]]
    targets = [2 + 3 * a - b + dice.gauss(0, 0.01) for _, a, b in zip(*columns, strict=True)]
    assert fit(columns, targets)[2] == 0
    targets = [2 + 3 * a + (50 if dice.random() < 0.05 else 0) for a in columns[1]]
    assert fit(columns[:2], targets) == pytest.approx([2, 3], abs=0.05)
    assert fit([columns[0], [0.0] * 300], [4.0] * 300) == pytest.approx([4, 0])


def test_a_quiet_engine_is_fitted_closely_and_says_so() -> None:
    law = law_of(truth_s)
    assert law.fidelity.held_out.steps > 2900
    assert law.fidelity.held_out.p90 < 0.05
    plant = Fitted(law, noise=False)
    fresh = batches(2, 400)
    errors = sorted(abs(plant.mean_seconds(step) / truth_s(step) - 1) for step in fresh)
    assert errors[200] < 0.02
    assert errors[360] < 0.05
    assert law.gap_s == pytest.approx(GAP_NS / 1e9, rel=0.01)
    step = fresh[0]
    assert plant.step_seconds(step) == plant.mean_seconds(step) + law.gap_s


def test_the_error_that_is_told_is_of_steps_that_the_fit_had_not_seen() -> None:
    """Drafts, which cost a lot here, come in every fifth block only: nobody else can know their cost."""
    steps = [
        Features(0, 1 + i % 40, 500 + 37 * i, 0, (3 * (1 + i % 40)) if i // BLOCK_STEPS % FOLDS == 0 else 0)
        for i in range(640)
    ]

    def seconds(step: Features) -> float:
        return 4e-3 + 1e-3 * step.drafted_tokens + 1e-4 * step.decode_sequences

    law = calibrated(steps_of(recording(bytes(page(steps, seconds)), Path("p"), alive=False, copied=True)))
    assert law.fidelity.fitted.p90 < 0.01
    assert law.fidelity.held_out.median < 0.01
    assert law.fidelity.held_out.p90 > 0.5


def test_noise_is_told_and_replayed() -> None:
    law = law_of(noisy(0.2))
    assert 0.1 < law.fidelity.held_out.median < 0.2
    assert law.correlation < 0.1
    step = Features(0, 32, 32_000)
    plant = Fitted(law, seed=4)
    drawn = sorted((plant.step_seconds(step) - law.gap_s) / plant.mean_seconds(step) for _ in range(2000))
    assert drawn[200] == pytest.approx(exp(-1.28 * 0.2), rel=0.06)
    assert drawn[1800] == pytest.approx(exp(1.28 * 0.2), rel=0.06)
    again, other = Fitted(law, seed=4), Fitted(law, seed=5)
    series = [[one.step_seconds(step) for _ in range(20)] for one in (Fitted(law, seed=4), again, other)]
    assert series[0] == series[1] != series[2]


def test_slow_spells_stay_together() -> None:
    dice = random.Random(3)
    state = 0.0

    def drifting(step: Features) -> float:
        nonlocal state
        state = 0.9 * state + dice.gauss(0, 0.09)
        return truth_s(step) * exp(state)

    law = law_of(drifting)
    assert law.correlation == pytest.approx(0.9, abs=0.06)
    step, plant = Features(0, 32, 32_000), Fitted(law, seed=1)
    drawn = [plant.step_seconds(step) for _ in range(2000)]
    mean = sum(drawn) / len(drawn)
    together = sum((a - mean) * (b - mean) for a, b in pairwise(drawn))
    assert together / sum((a - mean) ** 2 for a in drawn) > 0.75


def test_a_plant_survives_its_file(tmp_path: Path) -> None:
    law = law_of(noisy(0.05), 400)
    law.write(tmp_path / "plant.json")
    assert read(tmp_path / "plant.json") == law


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("not json", "not JSON"),
        ("[]", "no plant"),
        ('{"format": "kvpilot-plant", "version": 9}', "version 9"),
        ('{"format": "kvpilot-plant", "version": 1}', "damaged"),
        ('{"format": "kvpilot-plant", "version": 1, "fidelity": {}, "terms": {"step": -1}}', "damaged"),
    ],
)
def test_what_is_no_plant_is_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "plant.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlantError, match=says) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_what_a_recording_lacks_is_said(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.kvp"
    path.write_bytes(page(batches(1, 20), truth_s))
    with pytest.raises(PlantError, match=r"19 steps .* at least 64"):
        recorded(path)
    path.write_bytes(page(batches(1, 100), truth_s, ("time_ns", "steps_total")))
    with pytest.raises(PlantError, match="test records no duration_ns, prefill_tokens_total"):
        recorded(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(PlantError, match="give a telemetry page"):
        recorded(path)
    with pytest.raises(PlantError, match="No such file"):
        recorded(tmp_path / "none")


def test_kinds_of_work_that_are_not_there_are_named() -> None:
    only = [Features(0, 1 + index % 40, 100 + 37 * index) for index in range(300)]
    law = calibrated(steps_of(recording(bytes(page(only, truth_s)), Path("p"), alive=False, copied=True)))
    assert {"chunk_positions", "drafted_tokens", "depth"} <= set(law.unseen)
    assert law.fidelity.held_out_prefilling is None
    assert law.prefilling == law.decoding


def test_the_command_prints_residuals_and_writes_the_plant(tmp_path: Path) -> None:
    path, out = tmp_path / "telemetry.kvp", tmp_path / "plant.json"
    path.write_bytes(page(batches(1, 600), noisy(0.1)))
    done = CliRunner().invoke(app, ["calibrate", str(path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "not seen by the fit" in done.output
    assert "noise that is replayed" in done.output
    done = CliRunner().invoke(app, ["calibrate", str(path), "--json"])
    assert json.loads(done.output)["terms"] == dict(read(out).terms)
    done = CliRunner().invoke(app, ["calibrate", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert len(done.output.strip().splitlines()) == 1


def test_noise_of_short_steps_is_not_that_of_long_ones_and_no_time_is_lost() -> None:
    """A scheduler that takes the processor away for 8 ms, now and then: a lot for a short step."""
    dice = random.Random(5)

    def disturbed(step: Features) -> float:
        return truth_s(step) + (8e-3 if dice.random() < 0.3 else 0.0)

    steps = [Features(0, 1 + i % 2 * 900, (1 + i % 2 * 900) * 500) for i in range(3000)]
    law = calibrated(steps_of(recording(bytes(page(steps, disturbed)), Path("p"), alive=False, copied=True)))
    short, long = [band for band in law.bands if not band.prefilling][:: len(law.bands) - 1]
    assert short.residuals[-1] - short.residuals[0] > 3 * (long.residuals[-1] - long.residuals[0])
    plant = Fitted(law, seed=1)
    for step in steps[:2]:
        drawn = sum(plant.step_seconds(step) - law.gap_s for _ in range(4000)) / 4000
        assert drawn == pytest.approx(truth_s(step) + 0.3 * 8e-3, rel=0.08)


def test_a_plant_with_bands_comes_back_from_its_file(tmp_path: Path) -> None:
    law = law_of(noisy(0.2), 600)
    law.write(tmp_path / "plant.json")
    assert read(tmp_path / "plant.json") == law
    assert len(law.bands) > 2
    raw = json.loads((tmp_path / "plant.json").read_text())
    raw["bands"][0]["residuals"] = []
    (tmp_path / "plant.json").write_text(json.dumps(raw))
    with pytest.raises(PlantError, match="damaged plant"):
        read(tmp_path / "plant.json")
