// Policies with the state of their rules, and whether their own tests pass.

import { byId, el, mark, say } from "./dom.js";
import { seconds } from "./format.js";

let known = "";
let tests = null;
let current = true;
const cells = new Map();

export function showPolicies(frame) {
  const now = JSON.stringify(frame.policies);
  if (now !== known) {
    known = now;
    current = frame.policies.current;
    build(frame.policies);
    run();
  }
  for (const rule of frame.rules) {
    const cell = cells.get(`${rule.policy}/${rule.rule}`);
    if (!cell) continue;
    mark(cell, "data-phase", rule.state);
    mark(cell, "data-shadow", rule.shadow && rule.state !== "inactive" ? "yes" : "no");
    say(cell, `${rule.rule}: ${rule.state}${rule.state === "inactive" ? "" : ` ${seconds(rule.for_s)}`}${rule.shadow ? " (shadow)" : ""}`);
  }
}

function build(policies) {
  cells.clear();
  const all = [...policies.all].sort((a, b) => b.priority - a.priority);
  byId("rules").replaceChildren(...all.map((policy) => {
    const list = el("ul");
    for (const rule of policy.rules) {
      const cell = el("li", { class: "phase", "data-phase": "inactive" }, rule);
      cells.set(`${policy.name}/${rule}`, cell);
      list.append(cell);
    }
    return el("div", { class: "policy", "data-policy": policy.name },
      el("p", { class: "head" }, el("b", {}, policy.name), el("span", { class: "mode" }, `${policy.mode}, priority ${policy.priority}`), el("span", { class: "tested" })),
      policy.summary ? el("p", { class: "said" }, policy.summary) : null, list);
  }));
  showTests();
}

async function run() {
  tests = null;
  say(byId("tests"), "running their tests");
  try {
    const answer = await fetch("console/tests");
    tests = await answer.json();
    if (!answer.ok) throw new Error(tests.error);
  } catch (error) {
    tests = null;
    say(byId("tests"), `tests could not be run: ${error.message}`);
    return;
  }
  showTests();
}

function showTests() {
  if (!tests) return;
  let passed = 0, failed = 0;
  for (const place of document.querySelectorAll("[data-policy]")) {
    const found = tests.policies[place.dataset.policy] || { passed: 0, failed: [] };
    passed += found.passed;
    failed += found.failed.length;
    const node = place.querySelector(".tested");
    mark(node, "data-ok", found.failed.length ? "no" : "yes");
    node.title = found.failed.join("\n");
    say(node, found.failed.length ? `${found.failed.length} of ${found.passed + found.failed.length} tests fail`
      : found.passed ? `${found.passed} test${found.passed === 1 ? "" : "s"} pass` : "no tests");
  }
  say(byId("tests"), !current ? "the newest set was rejected: these fly on" : tests.errors.length ? `not testable: ${tests.errors[0]}` : failed ? `${failed} tests fail` : `all ${passed} tests pass`);
}
