/** The body of a report on a LoRA that was converted or merged: one column a layer, as high as the share of the LoRA that the layer keeps. */
import { bytes, h, s } from "./dom.mjs";
import { ACTIONS } from "./plot.mjs";

const HEIGHT = 96; // pixels of the axis, 0 to 100 %
const TICKS = [0, 0.5, 1];
const LISTED = 60; // layers; more of them would make the node too tall to open
const share = (kept) => `${(100 * kept).toFixed(kept > 0.995 && kept < 1 ? 2 : 1)} %`;

/** chart JSON -> elements under the heading. */
export function keptBody(chart) {
  const rows = (chart.rows ?? []).filter((row) => Number.isFinite(row.kept));
  return rows.length
    ? [
        h(
          "div.nibble-plot-title",
          h("span", "Kept of the LoRA, %"),
          h("span.nibble-note", note(rows)),
        ),
        plot(rows),
        legend(rows),
      ]
    : [];
}

/** chart JSON -> the list of layers, closed, those that lost most first; null without any. */
export function keptList(chart) {
  const rows = [...(chart.rows ?? [])].sort((a, b) => a.kept - b.kept);
  if (!rows.length) return null;
  const more = rows.length - LISTED;
  return h(
    "details.nibble-details",
    h("summary", "Layers ", h("span", `${rows.length}, what lost most first`)),
    h(
      "div.nibble-why",
      h(
        "ul",
        rows
          .slice(0, LISTED)
          .map((row) =>
            h(
              "li",
              h("span", h("b", row.name), h("br"), row.why),
              h("span", share(row.kept), h("br"), bytes(row.bytes)),
            ),
          ),
      ),
      more > 0 && h("div", `and ${more} more`),
    ),
  );
}

function note(rows) {
  return rows.some((row) => Number.isFinite(row.nearest))
    ? "per layer; dashes: rounding to 4 bits alone"
    : "per layer";
}

function plot(rows) {
  const y = (part) => HEIGHT * (1 - part);
  const wide = 100 / rows.length;
  const gap = rows.length > 120 ? 0 : 0.2 * wide;
  const grid = TICKS.map((part) =>
    s("line.nibble-grid", { x1: "0%", x2: "100%", y1: y(part), y2: y(part) }),
  );
  const columns = rows.map((row, index) =>
    s(
      `rect.nibble-cell.nibble-${row.action}`,
      {
        x: `${index * wide + gap / 2}%`,
        width: `${wide - gap}%`,
        y: y(row.kept),
        height: Math.max(1, HEIGHT * row.kept),
      },
      s("title", `${row.name}: ${share(row.kept)}; ${row.why}`),
    ),
  );
  const nearest = rows.flatMap((row, index) =>
    Number.isFinite(row.nearest)
      ? [
          s("line.nibble-median", {
            x1: `${index * wide}%`,
            x2: `${(index + 1) * wide}%`,
            y1: y(row.nearest),
            y2: y(row.nearest),
          }),
        ]
      : [],
  );
  const least = Math.min(...rows.map((row) => row.kept));
  return h(
    "div.nibble-plot",
    TICKS.map((part) =>
      h("span.nibble-tick", { style: `top:${y(part).toFixed(1)}px` }, 100 * part),
    ),
    s(
      "svg",
      {
        height: HEIGHT + 2,
        role: "img",
        "aria-label": `Share kept by ${rows.length} layers, the least ${share(least)}`,
      },
      grid,
      columns,
      nearest,
    ),
  );
}

function legend(rows) {
  const kinds = Object.keys(ACTIONS)
    .map((action) => [action, rows.filter((row) => row.action === action)])
    .filter(([, part]) => part.length);
  return h(
    "div.nibble-legend",
    kinds.map(([action, part]) =>
      h(
        "span",
        h(`span.nibble-swatch.nibble-${action}`),
        ACTIONS[action],
        " ",
        h("span", `${part.length} ${part.length === 1 ? "layer" : "layers"}`),
      ),
    ),
  );
}
