/**
 * What the charts share: a section with a heading, figures, titled plots, legends of layers, and
 * lists that open.
 */
import { h } from "../dom.mjs";

/** What was done to a layer, as the chart JSON names it -> as a legend says it. */
export const ACTIONS = {
  w4a4: "4-bit",
  w4a8: "4-bit, read as int8",
  nvfp4: "4-bit floats",
  w8a8: "8-bit",
  w4a16: "4-bit weights",
  vq: "VQ",
  rows8: "8-bit rows",
  keep: "16-bit",
};

const LONG = 40; // characters; a longer value is a sentence and not a figure
const LISTED = 60; // layers; more of them would make the node too tall to open

/** A chart's element: its heading, then its content. */
export function section(chart, ...content) {
  const heading = h(
    "header",
    h("div.nibble-title", chart.title ?? ""),
    chart.subtitle && h("div.nibble-subtitle", chart.subtitle),
  );
  return h("section.nibble-chart", heading, ...content);
}

/** [[label, value], ...] -> a row of figures; labels in `shown` are told elsewhere in the chart. */
export function statistics(summary = [], shown = new Set()) {
  const figures = summary.filter(([label]) => !shown.has(label));
  return h(
    "dl.nibble-stats",
    figures.map(([label, value]) =>
      h(
        "div",
        h("dt", label),
        h(String(value).length > LONG ? "dd.nibble-long" : "dd", scale(value) ?? value),
      ),
    ),
  );
}

/** What an error in dB means for pictures, by quant/files/report.py, from the worst up. */
const GRADES = ["poor", "fair", "good"];

/** "fair: the same picture, ..." -> its place between poor and good; null for any other value. */
export function scale(value) {
  const [grade, ...words] = String(value).split(": ");
  if (!GRADES.includes(grade)) return null;
  const part = (name) =>
    h(name === grade ? `b.nibble-grade.nibble-grade-${name}` : "span.nibble-grade", name);
  return h(
    "div.nibble-scale",
    h("div.nibble-grades", { role: "img", "aria-label": grade }, GRADES.map(part)),
    h("div", words.join(": ")),
  );
}

export function plotTitle(text, note) {
  return h("div.nibble-plot-title", h("span", text), h("span.nibble-note", note));
}

/** A closed list: a title, a note beside it, and what opens. */
export function details(title, note, ...content) {
  return h("details.nibble-details", h("summary", title, " ", h("span", note)), ...content);
}

/** "1 layer", "2 layers". */
export function layerCount(rows) {
  return `${rows.length} ${rows.length === 1 ? "layer" : "layers"}`;
}

/** Rows by the value of a field, in the order of `names`; values without any row are left out. */
export function partsBy(rows, field, names) {
  return names
    .map((name) => ({ name, part: rows.filter((row) => row[field] === name) }))
    .filter(({ part }) => part.length);
}

/** [{swatch, label, note}, ...] -> a legend of coloured squares. */
export function legend(entries) {
  return h(
    "div.nibble-legend",
    entries.map(({ swatch, label, note }) =>
      h("span", h(`span.nibble-swatch.nibble-${swatch}`), label, " ", h("span", note)),
    ),
  );
}

/** A closed list of layers: name and reason at the left, the items of values(row) at the right. */
export function layerList(rows, note, values) {
  const more = rows.length - LISTED;
  const line = (row) =>
    h("li", h("span", h("b", row.name), h("br"), row.why), h("span", ...values(row)));
  return details(
    "Layers",
    `${rows.length}, ${note}`,
    h(
      "div.nibble-why",
      h("ul", rows.slice(0, LISTED).map(line)),
      more > 0 && h("div", `and ${more} more`),
    ),
  );
}
