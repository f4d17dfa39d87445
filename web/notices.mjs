/**
 * Draws a notice: a few sentences with a coloured edge, a bar where something is under way, and
 * buttons. Knows nothing of ComfyUI but the names of its palette variables.
 */
import { h } from "./dom.mjs";
import { sheet } from "./style.mjs";

/** What a notice is about -> its role, so that a screen reader tells an error at once. */
const ROLES = { error: "alert", stopped: "status", working: "status", files: "note" };

/**
 * {tone: of ROLES, title, lines: [text, ...], share: 0...1 | null, actions: [{label, run} |
 * {label, href}, ...]} -> element with a shadow root
 */
export function drawNotice({ tone, title, lines = [], share = null, actions = [] }) {
  const host = h("div.nibble-notice-host");
  const root = host.attachShadow({ mode: "open" });
  root.adoptedStyleSheets = [sheet()];
  root.append(
    h(
      `section.nibble-chart.nibble-notice.nibble-notice-${tone}`,
      { role: ROLES[tone] },
      title && h("div.nibble-notice-title", title),
      lines.map((line) => h("p", line)),
      share !== null && bar(share),
      actions.length > 0 && h("div.nibble-actions", actions.map(action)),
    ),
  );
  return host;
}

function bar(share) {
  const percent = Math.round(100 * Math.min(1, Math.max(0, share)));
  const facts = { role: "progressbar", "aria-valuenow": percent };
  return h("div.nibble-bar", facts, h("span", { style: `width:${percent}%` }));
}

function action({ label, run, href }) {
  if (href) return h("a.nibble-action", { href, target: "_blank", rel: "noopener" }, label);
  const button = h("button.nibble-action", { type: "button" }, label);
  button.addEventListener("click", () => run(button));
  // the canvas has uses of its own for Enter, space and Delete
  button.addEventListener("keydown", (event) => event.stopPropagation());
  return button;
}
