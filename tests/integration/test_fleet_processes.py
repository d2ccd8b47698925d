"""A fleet over real processes is the fleet in one: what becomes of it does not depend on how many fly it."""

import random

from kvpilot.simulate.deployment import USUAL_PROMISES
from kvpilot.simulate.fleet import Fleet, fly_fleet
from kvpilot.simulate.legs import Leg, Scene, deployment_on
from kvpilot.simulate.plants.named import Machine
from kvpilot.workload.arrival import Arrival


def test_processes_do_not_matter() -> None:
    dice, machine = random.Random(11), Machine()
    times = sorted(dice.uniform(0.0, 3.0) for _ in range(40))
    coming = [
        Arrival(at_s, dice.randrange(50, 900), dice.randrange(5, 60), "interactive", "acme", "json", number)
        for number, at_s in enumerate(times)
    ]
    scene = Scene(deployment_on(machine), machine.plant, USUAL_PROMISES, drain_s=10.0)
    here, away = (
        fly_fleet(scene, Leg("x"), coming, 3.0, Fleet(3, "least_kv", processes)).as_dict()
        for processes in (1, 2)
    )
    assert here == away
    assert here["finished"] == 40
