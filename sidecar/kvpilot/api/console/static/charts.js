// Small lines over time. Each says in words what it shows; the numbers stand beside it as text.

import { el, mark } from "./dom.js";
import { timeOfDay } from "./format.js";
import { colour, onTheme } from "./theme_colours.js";

const FONT = "10.5px system-ui, sans-serif";
const charts = new Set();

/**
 * A chart in `place`. `lines`: [{label, stroke: palette name, dash, fill}]; `limit()` gives a dashed target.
 * Columns are [seconds, ...values]; a null is a gap.
 */
export function chart(place, { lines, height = 84, limit = null, format, top = null, label }) {
  const box = el("div", { role: "img", "aria-label": label });
  place.append(box);
  const width = () => Math.max(120, place.clientWidth);
  const options = {
    width: width(), height, legend: { show: false }, cursor: { show: false }, select: { show: false },
    padding: [6, 14, 0, 0],
    scales: { y: { range: (u, low, high) => bounds(high, limit, top) } },
    axes: [
      {
        stroke: () => colour.soft, grid: { show: false }, ticks: { show: false }, size: 20, gap: 6, font: FONT, space: 86,
        // One that would be cut off at the edge is left out.
        values: (u, ticks) => ticks.map((tick) => (u.valToPos(tick, "x") > u.bbox.width / devicePixelRatio - 20 ? "" : timeOfDay(tick))),
      },
      {
        stroke: () => colour.soft, grid: { stroke: () => colour.line, width: 1 }, ticks: { show: false },
        size: 44, gap: 4, font: FONT, space: 26, values: (u, ticks) => ticks.map((tick) => (tick === 0 ? "" : format(tick))),
      },
    ],
    series: [{}, ...lines.map((line) => ({
      label: line.label, stroke: () => colour[line.stroke], width: line.width || 1.6, dash: line.dash,
      fill: line.fill ? () => `${colour[line.stroke]}22` : undefined, points: { show: false }, spanGaps: false,
    }))],
    hooks: limit ? { draw: [(u) => drawLimit(u, limit())] } : {},
  };
  const plot = new uPlot(options, [[], ...lines.map(() => [])], box);
  const one = {
    plot,
    set: (columns) => plot.setData(columns),
    say: (text) => mark(box, "aria-label", text),
    resize: () => plot.setSize({ width: width(), height }),
    drop: () => { charts.delete(one); plot.destroy(); box.remove(); },
  };
  charts.add(one);
  return one;
}

function bounds(high, limit, top) {
  if (top !== null) return [0, top];
  const target = limit ? limit() : null;
  const most = Math.max(high === null || !isFinite(high) ? 0 : high, target || 0);
  return [0, most > 0 ? most * 1.15 : 1];
}

function drawLimit(u, value) {
  if (value === null) return;
  const y = u.valToPos(value, "y", true);
  const { ctx, bbox } = u;
  ctx.save();
  ctx.strokeStyle = colour.reference;
  ctx.lineWidth = 1.4 * devicePixelRatio;
  ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
  ctx.beginPath();
  ctx.moveTo(bbox.left, y);
  ctx.lineTo(bbox.left + bbox.width, y);
  ctx.stroke();
  ctx.restore();
}

let pending = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => charts.forEach((each) => each.resize()));
});
onTheme(() => charts.forEach((each) => each.plot.redraw(false)));
