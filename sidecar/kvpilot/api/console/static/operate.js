// The exact command to copy. Nothing here sends one.

import { announce, byId, el, mark, say } from "./dom.js";
import { quoted } from "./format.js";

let knobs = {};
let config = "";

export function startOperate() {
  byId("compose").addEventListener("input", compose);
  byId("compose").addEventListener("submit", (event) => event.preventDefault());
  byId("order-knob").addEventListener("change", () => { byId("order-value").value = ""; limits(); compose(); });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy]");
    if (button) copy(button);
  });
}

export function showOperate(frame) {
  const now = frame.operate.config ? ` --config ${quoted(frame.operate.config)}` : "";
  const names = Object.keys(frame.knobs).join();
  const changed = now !== config || names !== Object.keys(knobs).join() || !byId("command-off").textContent;
  config = now;
  knobs = frame.knobs;
  if (!changed) return;
  say(byId("command-off"), `kvpilot off --why 'what you saw'${config}`);
  say(byId("command-on"), `kvpilot on --why 'what has changed'${config}`);
  const select = byId("order-knob"), before = select.value;
  select.replaceChildren(...Object.keys(knobs).map((name) => el("option", {}, name)));
  if (before in knobs) select.value = before;
  limits();
  compose();
}

function limits() {
  const knob = knobs[byId("order-knob").value], value = byId("order-value");
  if (!knob) return;
  mark(value, "min", knob.minimum);
  mark(value, "max", knob.maximum);
  mark(value, "placeholder", `${knob.minimum} to ${knob.maximum}`);
  if (value.value === "") value.value = String(knob.value ?? knob.baseline);
}

function compose() {
  const [knob, value, why] = ["order-knob", "order-value", "order-why"].map((id) => byId(id).value);
  say(byId("command-override"),
    `kvpilot override ${knob ? quoted(`${knob}=${value}`) : "KNOB=VALUE"} --for ${byId("order-for").value} --why ${quoted(why || "what you saw")}${config}`);
}

async function copy(button) {
  const source = byId(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    say(button, "Copied");
    announce("Copied");
  } catch {
    // No clipboard without a secure context: select it, so that one key press copies.
    getSelection().selectAllChildren(source);
    say(button, "Selected");
    announce("Selected: copy it with the keyboard");
  }
  setTimeout(() => say(button, "Copy"), 2000);
}
