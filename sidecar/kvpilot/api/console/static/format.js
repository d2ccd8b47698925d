// Quantities as people say them. What is missing has a reason, never a number.

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

const REASONS = {
  no_samples: "nothing measured",
  too_few_samples: "too few samples",
  too_old: "too old",
  restarted: "engine just started",
  reset: "counter began anew",
  not_provided: "not reported",
};

export function seconds(value) {
  if (value === Infinity) return "not in sight";
  if (value < 1) return `${Number((value * 1000).toPrecision(value < 0.1 ? 2 : 3))} ms`;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${value.toFixed(0)} s`;
  return value < 7200 ? `${(value / 60).toFixed(0)} min` : `${(value / 3600).toFixed(0)} h`;
}

export function number(value) {
  if (value === null || value === undefined) return "?";
  if (typeof value === "string") return value;
  if (Math.abs(value) >= 1e7) return `${grouped.format(value / 1e6)}M`;
  if (Number.isInteger(value) || Math.abs(value) >= 1000) return grouped.format(value);
  return String(Number(value.toPrecision(3)));
}

export const percent = (ratio) => (ratio > 0 && ratio < 0.01 ? "<1%" : `${Math.round(ratio * 100)}%`);

export const time = (wall_ns) => clock.format(new Date(wall_ns / 1e6));

/** Seconds of wall time, for an axis. */
export const timeOfDay = (wall_s) => clock.format(new Date(wall_s * 1000));

/** A signal's number, infinity included; null where it is missing. */
export function valueOf(signal) {
  if (!signal || signal.value === undefined) return null;
  return typeof signal.value === "string" ? (signal.value === "+Inf" ? Infinity : null) : signal.value;
}

export const reasonOf = (signal) => (signal ? REASONS[signal.missing] || signal.missing || "" : "not reported");

/** A shell word: what somebody pastes must mean what they read. */
export const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);
