/**
 * Draws the charts that Nibble's nodes report: chart JSON in (its schema is nodes/bridge/host/charts.py), one HTML element out.
 * Pure drawing: knows nothing of ComfyUI but the names of its palette variables.
 */
import { calibrationPlots } from "./calibration.mjs";
import { curvePlot } from "./curve.mjs";
import { bytes, decibels, groupBy, h, sum } from "./dom.mjs";
import { keptBody, keptList } from "./kept.mjs";
import { loraBody, loraList } from "./lora.mjs";
import { patchesPlot } from "./patches.mjs";
import { ACTIONS, layerPlot } from "./plot.mjs";
import { strip } from "./strip.mjs";
import { CSS } from "./style.mjs";
import { blocksPlot, usedCodebooks } from "./vq.mjs";

const HARDEST = 6; // layers in the list of the least accurate
const LONG = 40; // characters; a longer value is a sentence and not a figure
const DRAWN = new Set(["size", "layers"]); // summary lines that the bar and its legend already tell
const DRAW = {
  layers: layersChart,
  facts: factsChart,
  lora: loraChart,
  kept: keptChart,
  curve: curveChart,
  blocks: blocksChart,
  codebooks: layersChart,
  strip: stripChart,
  calibration: calibrationChart,
  patches: patchesChart,
};
const afterOf = (rows) => sum(rows, (row) => row.bytes_after);
let sheet = null;

/** chart JSON -> element with a shadow root. An unknown kind still shows its title and summary. */
export function drawChart(chart) {
  const host = h("div.nibble-chart-host");
  const root = host.attachShadow({ mode: "open" });
  root.adoptedStyleSheets = [styles()];
  root.append((DRAW[chart.kind] ?? factsChart)(chart));
  return host;
}

function styles() {
  if (!sheet) {
    sheet = new CSSStyleSheet();
    sheet.replaceSync(CSS);
  }
  return sheet;
}

/** The report of a quantization. */
function layersChart(chart) {
  const rows = chart.rows ?? [];
  const plot = rows.length ? layerPlot(rows) : null;
  const measured = rows.filter((row) => Number.isFinite(row.db));
  return h(
    "section.nibble-chart",
    heading(chart),
    sizeBar(rows, chart),
    statistics(chart.summary),
    plot && [plotTitle(), plot],
    measured.length > HARDEST && hardest(measured, plot.select),
    plot && usedCodebooks(rows, plot.select),
    kept(rows),
  );
}

/** A calibration at work: each block's error from its first step to its last. */
function blocksChart(chart) {
  return h(
    "section.nibble-chart",
    heading(chart),
    statistics(chart.summary),
    h(
      "div.nibble-plot-title",
      h("span", "Accuracy of each block"),
      h("span.nibble-note", "signal to error of its outputs in dB, higher is better"),
    ),
    blocksPlot(chart),
  );
}

/** What a loader has to say: label and value rows; "6.9 GB of 8.0 GB" becomes a bar. */
function factsChart(chart) {
  const facts = (chart.summary ?? []).map(
    ([label, value]) => meter(label, value) ?? h("div", h("dt", label), h("dd", value)),
  );
  return h("section.nibble-chart", heading(chart), h("dl.nibble-facts", facts));
}

/** What LoRAs do to a model's layers. */
function loraChart(chart) {
  return h(
    "section.nibble-chart",
    heading(chart),
    loraBody(chart),
    statistics(chart.summary),
    loraList(chart),
  );
}

/** How much of a LoRA each layer keeps. */
function keptChart(chart) {
  return h(
    "section.nibble-chart",
    heading(chart),
    keptBody(chart),
    statistics(chart.summary),
    keptList(chart),
  );
}

/** A training: its figures, and the loss over its steps. */
function curveChart(chart) {
  return h(
    "section.nibble-chart",
    heading(chart),
    statistics(chart.summary),
    chart.points?.length && [
      h(
        "div.nibble-plot-title",
        h("span", "Loss"),
        h("span.nibble-note", "dots: steps; line: their mean; ring: its lowest point"),
      ),
      curvePlot(chart),
    ],
  );
}

/** What FEATHER kept of a prompt's images. */
function patchesChart(chart) {
  return h("section.nibble-chart", heading(chart), patchesPlot(chart), statistics(chart.summary));
}

/** A sampling run with a cache: which steps were computed and which reused. */
function stripChart(chart) {
  return h(
    "section.nibble-chart",
    heading(chart),
    strip(chart),
    chart.summary?.length > 0 && statistics(chart.summary),
  );
}

/** What a calibration found out about a model: how its output follows its input, and what reusing a result would cost at each step. */
function calibrationChart(chart) {
  return h(
    "section.nibble-chart",
    heading(chart),
    statistics(chart.summary),
    calibrationPlots(chart),
  );
}

function heading(chart) {
  return h(
    "header",
    h("div.nibble-title", chart.title ?? ""),
    chart.subtitle && h("div.nibble-subtitle", chart.subtitle),
  );
}

function statistics(summary = []) {
  return h(
    "dl.nibble-stats",
    summary
      .filter(([label]) => !DRAWN.has(label))
      .map(([label, value]) =>
        h("div", h("dt", label), h(String(value).length > LONG ? "dd.nibble-long" : "dd", value)),
      ),
  );
}

/** Size after as a part of the size before, split by what was done to the layers. */
function sizeBar(rows, chart) {
  const before = chart.bytes_before ?? sum(rows, (row) => row.bytes_before);
  const after = chart.bytes_after ?? afterOf(rows);
  if (!(before > 0 && after > 0)) return null;
  const kinds = Object.keys(ACTIONS)
    .map((action) => ({ action, part: rows.filter((row) => row.action === action) }))
    .filter(({ part }) => part.length);
  const width = (part) => `width:${(100 * afterOf(part)) / Math.max(before, after)}%`;
  const count = (part) =>
    `${part.length} ${part.length === 1 ? "layer" : "layers"}, ${bytes(afterOf(part))}`;
  return h(
    "div",
    h(
      "div.nibble-size",
      h("span.nibble-size-after", bytes(after)),
      h("span.nibble-size-before", `from ${bytes(before)}`),
      h("span.nibble-size-ratio", `${(before / after).toFixed(1)}\u00d7 smaller`),
    ),
    h(
      "div.nibble-bar",
      { role: "img", "aria-label": `${bytes(after)} of ${bytes(before)}` },
      kinds.map(({ action, part }) => h(`span.nibble-${action}`, { style: width(part) })),
    ),
    h(
      "div.nibble-legend",
      kinds.map(({ action, part }) =>
        h(
          "span",
          h(`span.nibble-swatch.nibble-${action}`),
          ACTIONS[action],
          " ",
          h("span", count(part)),
        ),
      ),
    ),
  );
}

function plotTitle() {
  return h(
    "div.nibble-plot-title",
    h("span", "Accuracy per layer"),
    h("span.nibble-note", "signal to noise in dB, higher is better; dashes: median"),
  );
}

/** The layers that lost most: the ones worth keeping in 16 bit if a picture is not good enough. */
function hardest(measured, select) {
  const worst = [...measured].sort((a, b) => a.db - b.db).slice(0, HARDEST);
  const scale = Math.max(...measured.map((row) => row.db));
  const lines = worst.map((row) => {
    const bar = h(`span.nibble-${row.action}`, {
      style: `width:${Math.max(0, (100 * row.db) / scale)}%`,
    });
    const line = h(
      "div",
      h("span.nibble-name", row.name),
      h("span.nibble-bar", bar),
      h("span.nibble-value", decibels(row.db)),
    );
    line.addEventListener("pointerenter", () => select(row));
    line.addEventListener("pointerleave", () => select(null));
    return line;
  });
  return details(
    "Least accurate layers",
    `lowest ${decibels(worst[0].db)}`,
    h("div.nibble-hard", lines),
  );
}

/** The layers left as they were, grouped by the reason, numbered blocks folded into one line. */
function kept(rows) {
  const list = rows.filter((row) => row.action === "keep");
  if (!list.length) return null;
  const reasons = [...groupBy(list, (row) => row.why || "No reason recorded")];
  const line = ({ name, part }) => h("li", h("span", name), h("span", bytes(afterOf(part))));
  return details(
    "Kept in 16 bit",
    `${list.length} of ${rows.length} layers, ${bytes(afterOf(list))}`,
    reasons.map(([why, group]) =>
      h("div.nibble-why", h("div", why), h("ul", foldNames(group).map(line))),
    ),
  );
}

/** "double_blocks.0.img_mod.lin" ... "double_blocks.18.img_mod.lin" -> "double_blocks.0-18.img_mod.lin". */
export function foldNames(rows) {
  return [...groupBy(rows, (row) => row.name.replace(/\d+/, "#"))].map(([pattern, part]) => {
    const numbers = part.map((row) => Number(row.name.match(/\d+/)?.[0])).sort((a, b) => a - b);
    return { name: part.length > 1 ? pattern.replace("#", ranges(numbers)) : part[0].name, part };
  });
}

/** [0, 1, 2, 5] -> "0-2,5". */
function ranges(numbers) {
  const found = [];
  for (const number of numbers) {
    if (found.length && number === found.at(-1)[1] + 1) found.at(-1)[1] = number;
    else found.push([number, number]);
  }
  return found.map(([from, to]) => (from === to ? from : `${from}-${to}`)).join(",");
}

function details(title, aside, ...content) {
  return h("details.nibble-details", h("summary", title, " ", h("span", aside)), ...content);
}

/** A bar for a value such as "about 6.9 GB of 8.0 GB, ..."; null for anything else. */
function meter(label, value) {
  const match = /^(?:about )?([\d.]+) ?(k|M|G|T)?i?B of ([\d.]+) ?(k|M|G|T)?i?B\b/.exec(
    String(value),
  );
  if (!match) return null;
  const scale = { k: 1e3, M: 1e6, G: 1e9, T: 1e12 };
  const share =
    (Number(match[1]) * (scale[match[2]] ?? 1)) / (Number(match[3]) * (scale[match[4]] ?? 1));
  if (!Number.isFinite(share)) return null;
  return h(
    "div.nibble-meter",
    h("div", h("dt", label), h("dd", value)),
    h(
      "div.nibble-bar",
      h(share > 1 ? "span.nibble-over" : "span", { style: `width:${Math.min(100, 100 * share)}%` }),
    ),
  );
}
