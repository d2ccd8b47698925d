// Frames come twice a second from the pilot; each view shows its part of them.

import { showAnswers } from "./answers.js";
import { startDecisions, showDecisions } from "./decisions.js";
import { byId, mark, say } from "./dom.js";
import { time } from "./format.js";
import { showIncidents, startIncidents } from "./incidents.js";
import { countDown, showKnobs } from "./knobs.js";
import { showLatency, takeHistory, takePoint } from "./latency.js";
import { showMemory, startMemory } from "./memory.js";
import { showOperate, startOperate } from "./operate.js";
import { showPolicies } from "./policies.js";
import { startTheme } from "./theme_colours.js";

const SILENT_MS = 2500;
const RETRY_MS = 3000;
let heard = 0;
let newest = null;

function show(frame) {
  newest = frame;
  showAnswers(frame);
  showMemory(frame.memory);
  showLatency(frame);
  showKnobs(frame);
  showDecisions(frame.decisions);
  showPolicies(frame);
  showOperate(frame);
  showIncidents(frame.engine);
  const { engine, pilot } = frame;
  const rank = pilot.rank ? ` rank ${pilot.rank}` : "";
  say(byId("who"), `${engine.name}${rank}${engine.model ? ` · ${engine.kind} ${engine.version} · ${engine.model} · ${engine.device}` : ""}`);
  say(byId("about"), `kvpilot ${pilot.version}; ${pilot.ticks} ticks, ${pilot.missed_ticks} missed, ${pilot.failed_ticks} failed. Read-only: nothing on this page can move a knob.`);
  document.title = `${{ good: "●", caution: "▲", bad: "■", quiet: "○" }[frame.answers.state.level]} ${engine.name} · kvpilot`;
}

/** Whether frames come: what is old must look old. */
function look() {
  const silent = performance.now() - heard > SILENT_MS;
  const live = byId("live"), trouble = byId("trouble");
  mark(live, "data-level", silent ? "bad" : "good");
  say(live, silent ? "not live" : `live, ${newest?.at_wall_ns ? time(newest.at_wall_ns) : "no tick yet"}`);
  trouble.hidden = !silent || !heard;
  if (silent && heard) {
    say(trouble, "The pilot does not answer: what follows is as it was. The engine flies itself, and leases run out to baseline.");
  }
  countDown(silent);
}

function listen() {
  const stream = new EventSource("console/stream");
  const on = (name, take) => stream.addEventListener(name, (event) => {
    heard = performance.now();
    take(JSON.parse(event.data));
    look();
  });
  on("history", takeHistory);
  on("point", takePoint);
  on("frame", show);
  // After an answer that is no stream (a proxy's 502, too many viewers) a browser gives up: try again.
  stream.addEventListener("error", () => {
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, RETRY_MS);
  });
}

startTheme(byId("theme"));
startMemory();
startDecisions();
startOperate();
startIncidents();
listen();
setInterval(look, 1000);
