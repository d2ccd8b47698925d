"""Metrics of the pilot itself: ticks, policies, decisions and their effects, knobs and leases, alerts."""

from collections.abc import Mapping

from kvpilot.adapters.valves import ValveSight
from kvpilot.clock import NS
from kvpilot.flight import Flight
from kvpilot.journal.ledger import Ledger
from kvpilot.journal.records import format_scope
from kvpilot.policy.expr import LOWEST
from kvpilot.policy.state import Phase
from kvpilot.publish.board import Tick
from kvpilot.publish.gpu_metrics import add_gpus
from kvpilot.publish.sheet import Sheet
from kvpilot.version import version


def add_pilot(sheet: Sheet, flight: Flight) -> None:
    """The pilot's own workings; there also without an engine."""
    pilot, board = flight.pilot, flight.pilot.board
    tick = board.tick
    sheet.add("build_info", 1.0, version())
    sheet.add("control_ticks", board.ticks)
    sheet.add("control_ticks_missed", board.missed)
    sheet.add("control_ticks_failed", board.failures)
    sheet.add_durations("control_tick_duration_seconds", board.durations)
    sheet.add_durations("control_tick_lateness_seconds", board.lateness)
    sheet.add_durations("control_publish_duration_seconds", board.publishing)
    sheet.add("control_armed", float(bool(tick and tick.armed)))
    sheet.add("control_off", float(bool(tick and tick.off)))
    sheet.add("control_actions", pilot.ledger.actions)
    sheet.add("control_unconfirmed", len(pilot.actuator.unconfirmed))
    sheet.add("journal_lost", flight.journal.lost)
    if pilot.gpus is not None:
        add_gpus(sheet, pilot.gpus.latest, pilot.gpu_signals.parts)
    for alarm in (*pilot.watch.firing.values(), *pilot.devices.firing.values()):
        sheet.add("alert_firing", 1.0, alarm.name, alarm.severity)
    for (receiver, outcome), count in flight.outbox.outcomes.items():
        sheet.add("webhook_deliveries", count, receiver, outcome)
    sheet.add("webhook_queue_length", flight.outbox.waiting)
    sheet.add("engine_restarts", pilot.watch.restarts)
    for klass, promises in pilot.slo.items():
        if isinstance(promises, Mapping) and klass != LOWEST:
            for promise, seconds in promises.items():
                sheet.add("slo_seconds", seconds, klass, promise)
    _add_policies(sheet, flight)
    _add_effects(sheet, pilot.ledger)
    if tick is None or tick.sight.manifest is None:
        for state in ("waiting", "dead", "idle", "live", "stalled", "wedged"):
            sheet.add("engine_state", float(state == "waiting"), state)


def _add_policies(sheet: Sheet, flight: Flight) -> None:
    directory, ledger = flight.directory, flight.pilot.ledger
    sheet.add("policy_load_success", float(directory.good))
    sheet.add("policy_last_reload_timestamp_seconds", directory.taken_wall_ns / NS)
    for policy in flight.pilot.policies.policies:
        sheet.add("policy_mode", 1.0, policy.name, policy.mode)
    for names, count in ledger.counts.items():
        sheet.add("control_decisions", count, *names)


def _add_effects(sheet: Sheet, ledger: Ledger) -> None:
    """Counts by outcome; of each rule's newest change that could be judged, both changes as shares."""
    for names, total in ledger.effect_counts.items():
        sheet.add("control_effects", total, *names)
    for effect in ledger.judged.values():
        labels = (effect.policy, effect.rule, effect.input)
        sheet.add("control_effect_expected_ratio", effect.ratio, *labels)
        if effect.after is not None and effect.before:
            sheet.add("control_effect_realised_ratio", effect.after / effect.before - 1, *labels)


def add_control(sheet: Sheet, tick: Tick, now_ns: int) -> None:
    """Knobs, leases, rules and orders as of the last tick."""
    _add_knobs(sheet, tick)
    since_ns = max(0, now_ns - tick.at_ns)
    for lease in tick.leases:
        scope = format_scope(lease.scope)
        sheet.add("lease_value", lease.value, lease.knob, scope, lease.policy, lease.rule)
        left_s = max(0, lease.ttl_ns - since_ns) / NS
        sheet.add("lease_remaining_seconds", left_s, lease.knob, scope)
    for order in tick.context.overrides if tick.context else ():
        left_s = max(0, order.until_ns - now_ns) / NS
        sheet.add("override_remaining_seconds", left_s, order.knob, format_scope(order.scope))
    for (policy, rule), state in tick.outcome.state.rules.items() if tick.outcome else ():
        for phase in Phase:
            sheet.add("rule_state", float(state.phase is phase), policy, rule, phase.value)
        for claim in state.claims:
            scope, shadow = format_scope(claim.scope), "true" if state.shadow else "false"
            sheet.add("rule_claim_value", claim.value, policy, rule, claim.knob, scope, shadow)


def _add_knobs(sheet: Sheet, tick: Tick) -> None:
    record = tick.sight.record
    for knob in tick.context.knobs.values() if tick.context else ():
        echo = record.get(f"knob.{knob.name}") if record else None
        if echo is not None:
            sheet.add("knob_value", echo, knob.name)
        sheet.add("knob_baseline", knob.baseline, knob.name)
        sheet.add("knob_min", knob.minimum, knob.name)
        sheet.add("knob_max", knob.maximum, knob.name)


def add_valves(sheet: Sheet, valve: ValveSight) -> None:
    """What the valves say of themselves, as sums over their processes."""
    sheet.add("valve_processes", valve.processes - valve.silent, "writing")
    sheet.add("valve_processes", valve.silent, "silent")
    for (class_name, why), count in valve.shed_by.items():
        sheet.add("valve_shed", count, class_name, why)
    for class_name, tokens in valve.credits_left.items():
        sheet.add("valve_credits_left_tokens", tokens, class_name)
    for (knob, scope), value in valve.obeyed.items():
        sheet.add("valve_lease_value", value, knob, format_scope(scope))
