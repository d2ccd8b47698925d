// The palette's colours, as canvases need them; read again when the theme changes.

export const colour = {};
const listeners = [];
const NAMES = ["good", "measured", "held", "held-alt", "caution", "bad", "expected", "shadow", "reference",
  "free", "ink", "soft", "line", "card", "trace"];

function read() {
  const style = getComputedStyle(document.documentElement);
  for (const name of NAMES) colour[name] = style.getPropertyValue(`--${name}`).trim();
  // A variable that refers to another comes back resolved.
  for (const listener of listeners) listener();
}

export function onTheme(listener) {
  listeners.push(listener);
}

export function startTheme(button) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  read();
  system.addEventListener("change", read);
  button.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("kvpilot-theme", root.dataset.theme); } catch { /* it holds for this visit */ }
    read();
  });
}
