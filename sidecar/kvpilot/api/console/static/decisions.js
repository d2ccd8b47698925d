// The decision feed. A row opens onto the whole why: inputs and thresholds, rule, arbitration, effect.

import { byId, el, mark, say } from "./dom.js";
import { number, seconds, time } from "./format.js";

const MOST = 100;
const TONES = {
  applied: "done", clamped: "done", unconfirmed: "wait", shadowed: "shadow", overruled: "none", rate_limited: "wait",
  cooling_down: "wait", missing_input: "wait", unsupported: "no", rejected_by_engine: "no", lease_expired: "no",
  undone: "no", inconclusive: "wait", suspended: "wait",
};
const rows = new Map();

export function startDecisions() {
  byId("filter").addEventListener("change", (event) => mark(byId("feed"), "data-show", event.target.value));
}

export function showDecisions(decisions) {
  const feed = byId("feed");
  for (const row of [...decisions].reverse()) {
    const known = rows.get(row.number);
    if (known) {
      verdict(known, row);
    } else if (!rows.size || row.number > Math.max(...rows.keys())) {
      const made = make(row);
      rows.set(row.number, made);
      feed.prepend(made.root);
    }
  }
  // A pilot with another journal counts anew.
  const newest = decisions.length ? decisions[0].number : 0;
  for (const number of [...rows.keys()].sort((a, b) => a - b)) {
    if (rows.size <= MOST && number <= newest) break;
    rows.get(number).root.remove();
    rows.delete(number);
  }
  byId("no-decisions").hidden = rows.size > 0;
}

function make(row) {
  const badge = el("span", { class: "verdict" });
  const why = el("div", { class: "why" });
  const root = el("details", {},
    el("summary", {}, el("time", {}, time(row.at_wall_ns)), el("span", { class: "change" }, change(row)), badge,
      el("span", { class: "reason" }, `${row.policy}/${row.rule}: ${row.reason}${seen(row)}`)), why);
  const made = { root, badge };
  mark(root, "data-moved", row.before !== row.after && row.verdict !== "shadowed" ? "yes" : "no");
  verdict(made, row);
  root.addEventListener("toggle", () => root.open && explain(row.number, why));
  return made;
}

/** The first inputs that it saw, for a glance. */
function seen(row) {
  const texts = Object.entries(row.inputs).slice(0, 3).map(([name, value]) => `${name} ${number(value)}`);
  return texts.length ? ` (${texts.join(", ")})` : "";
}

function verdict(made, row) {
  say(made.badge, row.verdict.replaceAll("_", " "));
  mark(made.badge, "data-tone", TONES[row.verdict] || "none");
  mark(made.root, "data-shadow", row.verdict === "shadowed" ? "yes" : "no");
}

const scope = (row) => (row.scope === "all" ? "" : ` ${row.scope}`);
const word = (value) => (value === null ? "baseline" : number(value));

function change(row) {
  if (row.before === row.after) return `${row.knob}${scope(row)} stays ${word(row.after)}`;
  return `${row.knob}${scope(row)} ${word(row.before)} → ${word(row.after)}`;
}

async function explain(number_, place) {
  if (!place.childElementCount) place.append(el("p", { class: "note" }, "asking the journal"));
  let told;
  try {
    const answer = await fetch(`console/decisions/${number_}`);
    told = await answer.json();
    if (!answer.ok) throw new Error(told.error);
  } catch (error) {
    place.replaceChildren(el("p", { class: "note" }, `no answer: ${error.message}`));
    return;
  }
  const list = el("dl");
  for (const [title, texts] of grounds(told)) {
    if (!texts.length) continue;
    list.append(el("dt", {}, title), ...texts.map((text) => el("dd", {}, text)));
  }
  place.replaceChildren(list);
}

/** [title, texts] of all that the journal holds about one decision. */
function grounds(told) {
  const rule = told.rule || {};
  const because = [told.reason, told.condition, told.with_values, rule.choose].filter(Boolean);
  const timing = ["for", "keepFor", "cooldown", "lease"].filter((key) => rule[key]).map((key) => `${key} ${rule[key]}`);
  return [
    ["Because", [...new Set(because)]],
    ["Policy", [rule.summary].filter(Boolean)],
    ["Inputs", inputs(told, rule)],
    ["Targets", Object.entries(rule.slo || {}).map(([name, value]) => `${name} = ${number(value)}`)],
    ["Rule", [
      told.phase ? `${told.phase} for ${seconds(told.phase_s || 0)}` : "",
      rule.when ? `when ${rule.when}` : "",
      rule.until ? `until ${rule.until}` : "",
      rule.do?.length ? `do ${rule.do.join("; ")}` : "",
      rule.mode ? `${rule.mode}, priority ${rule.priority}${rule.protective ? ", a limit" : ""}${timing.length ? `; ${timing.join(", ")}` : ""}` : "",
    ].filter(Boolean)],
    ["Arbitration", (told.claims || []).map(claim)],
    ["Effect", effects(told, rule)],
    ["In force", told.confirmed_after_s === null ? [] : [`echoed by the engine ${seconds(told.confirmed_after_s)} later`]],
    ["In a terminal", [`kvpilot explain ${told.number}`]],
  ];
}

function inputs(told, rule) {
  const windows = rule.inputs || {};
  const names = Object.keys(windows).length ? Object.keys(windows) : Object.keys(told.inputs);
  return names.map((name) => {
    const value = told.inputs[name];
    const age = told.ages?.[name];
    const shown = typeof value === "number" ? `= ${number(value)}` : value ?? "unknown";
    return `${name} ${shown}${age === undefined ? "" : `, ${seconds(age)} old`}${windows[name] ? `: ${windows[name]}` : ""}`;
  });
}

const claim = (each) =>
  `${each.rule}${each.scope === "all" ? "" : ` ${each.scope}`} ${number(each.value)} ${each.by === null ? "holds" : `overruled by ${each.by}`}`;

function effects(told, rule) {
  const said = { true: "came", false: "did not come" };
  const found = (told.effects || []).map((each) =>
    `${each.input} ${each.expected}: ${number(each.before)} → ${number(each.after)}, ${said[Boolean(each.met)] && each.met !== null ? said[Boolean(each.met)] : "cannot be judged"} (${each.reason})`);
  return found.length ? found : rule.verify ? [`expected: ${rule.verify}; not measured`] : [];
}
