/** The body of a LoRA report: a bar of the patched layers by how they are computed, and the list of them, the most memory first. */
import { bytes, h, sum } from "./dom.mjs";

const HOW = {
  branch: ["w4a4", "in the branch"],
  rows: ["w4a4", "in the branch, rows scaled"],
  dense: ["w4a16", "dense"],
  comfyui: ["keep", "16-bit layer"],
  refused: ["over", "does not fit"],
};
const LISTED = 60; // layers; more of them would make the node too tall to open

/** chart JSON -> elements under the heading. */
export function loraBody(chart) {
  const rows = chart.rows ?? [];
  if (!rows.length) return [];
  return [bar(rows), legend(rows)];
}

/** chart JSON -> the list of layers, closed; null without any. */
export function loraList(chart) {
  const rows = [...(chart.rows ?? [])].sort(
    (a, b) => (b.how === "refused") - (a.how === "refused") || b.bytes - a.bytes,
  );
  if (!rows.length) return null;
  const more = rows.length - LISTED;
  return h(
    "details.nibble-details",
    h("summary", "Layers ", h("span", `${rows.length}, the most memory first`)),
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
              h("span", row.bytes ? bytes(row.bytes) : ""),
            ),
          ),
      ),
      more > 0 && h("div", `and ${more} more`),
    ),
  );
}

function kinds(rows) {
  return Object.keys(HOW)
    .map((how) => [how, rows.filter((row) => row.how === how)])
    .filter(([, part]) => part.length);
}

function bar(rows) {
  return h(
    "div.nibble-bar",
    {
      role: "img",
      "aria-label": kinds(rows)
        .map(([how, part]) => `${part.length} ${HOW[how][1]}`)
        .join(", "),
    },
    kinds(rows).map(([how, part]) =>
      h(`span.nibble-${HOW[how][0]}`, { style: `width:${(100 * part.length) / rows.length}%` }),
    ),
  );
}

function legend(rows) {
  return h(
    "div.nibble-legend",
    kinds(rows).map(([how, part]) =>
      h(
        "span",
        h(`span.nibble-swatch.nibble-${HOW[how][0]}`),
        HOW[how][1],
        " ",
        h(
          "span",
          `${part.length} ${part.length === 1 ? "layer" : "layers"}, ${bytes(sum(part, (row) => row.bytes))}`,
        ),
      ),
    ),
  );
}
